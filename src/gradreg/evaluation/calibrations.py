"""Whether a classifier's probabilities are right: the expected calibration error, and the negative log-likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradreg import checks

if TYPE_CHECKING:
    from numpy.typing import NDArray

BINS = 15
"""Bins of equal width, as most papers have it."""


@dataclass(frozen=True)
class Bin:
    """The samples whose confidence lies in one bin.

    Args:
        low: its lower end, which does not belong to it (but 0 to the first).
        high: its upper end, which does.
        samples: how many there are.
        accuracy: the share of them that is classified right; None without any.
        confidence: the mean of their confidences; None without any.
    """

    low: float
    high: float
    samples: int
    accuracy: float | None
    confidence: float | None


@dataclass(frozen=True)
class Calibration:
    """How far probabilities and accuracy agree.

    Args:
        error: the expected calibration error (ECE), 0 to 1.
        nll: the mean negative log-likelihood of the labels, in nats: the cross entropy.
        accuracy: the share that is classified right, 0 to 1.
        confidence: the mean probability of the predicted class. Above ``accuracy`` the classifier is overconfident.
        bins: what the error is made of, for a reliability diagram.
    """

    error: float
    nll: float
    accuracy: float
    confidence: float
    bins: tuple[Bin, ...]


def calibration(logits: Any, labels: Any, *, bins: int = BINS) -> Calibration:
    """The expected calibration error ``Σ_b n_b/n · |accuracy_b − confidence_b|`` and the negative log-likelihood ``−mean log p(label)``.

    A sample's confidence is the probability p of the class with the largest logit, and b runs over ``bins`` intervals of equal width, open
    on the left: (0, 1/15], (1/15, 2/15], ... Of several largest logits the first counts. The error depends on the bins and is biased upward
    with few samples, so compare only numbers of the same bins and samples; the negative log-likelihood has no such choice.

    Args:
        logits: [samples, classes] of any framework: what softmax is applied to. Of probabilities p pass log p.
        labels: [samples] of whole numbers from 0 to classes − 1.
        bins: how many, ≥ 1.

    Cost: no pass; in float64 on the host.
    Source: Guo et al. 2017, arXiv 1706.04599, equation 3; Naeini et al. 2015.

    Raises:
        TypeError: labels that are not whole numbers.
        ValueError: shapes that do not fit, no samples, labels out of range, or logits that are not finite (−inf is probability 0).

    >>> from math import log
    >>> found = calibration([[log(0.9), log(0.1)], [log(0.7), log(0.3)]], [0, 1], bins=10)
    >>> round(found.error, 3), round(found.nll, 3), found.accuracy
    (0.4, 0.655, 0.5)
    """
    checks.whole("bins", bins, minimum=1, remedy="Leave it out for 15.")
    scores, truth = _on_host(logits).astype(np.float64), _on_host(labels)
    _check(scores, truth)
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    predicted = scores.argmax(axis=1)
    samples = np.arange(len(truth))
    confidence = np.exp(log_p[samples, predicted])
    right = predicted == truth
    edges = np.linspace(0.0, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    found = tuple(_bin(edges[b], edges[b + 1], right[place == b], confidence[place == b]) for b in range(bins))
    gaps = [b.samples * abs(b.accuracy - b.confidence) for b in found if b.accuracy is not None and b.confidence is not None]
    return Calibration(
        error=float(sum(gaps) / len(truth)),
        nll=float(-log_p[samples, truth].mean()),
        accuracy=float(right.mean()),
        confidence=float(confidence.mean()),
        bins=found,
    )


def _bin(low: float, high: float, right: NDArray[Any], confidence: NDArray[Any]) -> Bin:
    if not len(right):
        return Bin(float(low), float(high), 0, None, None)
    return Bin(float(low), float(high), len(right), float(right.mean()), float(confidence.mean()))


def _on_host(values: Any) -> NDArray[Any]:
    if hasattr(values, "detach"):  # a tensor of PyTorch, whose 16-bit numbers NumPy does not know
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    return np.asarray(values)


def _check(logits: NDArray[Any], labels: NDArray[Any]) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not logits.size:
        raise ValueError(
            f"logits must have the shape [samples, classes] and labels [samples], with at least one; got {list(logits.shape)} and "
            f"{list(labels.shape)}. Flatten the tokens of a language model into samples first."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels must be whole numbers; got {labels.dtype}. Pass the classes, not their one-hot vectors.")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels must lie between 0 and {logits.shape[1] - 1}; got {labels.min()} to {labels.max()}. Leave samples without a label "
            "(-100, say) out of both."
        )
    if np.isnan(logits).any() or np.isposinf(logits).any() or np.isneginf(logits).all(axis=1).any():
        raise ValueError("logits must be finite, or -inf for a probability of 0; got others. The run has diverged: log nan instead.")
