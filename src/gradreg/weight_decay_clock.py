"""The clock of weight decay, η·λ·t; its conventions, and its transfer to other batch sizes, data sizes and learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gradreg import checks
from gradreg.weight_decay import check_momentum

_TOO_MANY = 2**63
"""Examples, beyond which their ratios are no numbers."""


@dataclass(frozen=True, kw_only=True)
class DecayClock:
    """The timescale of weight decay: each step removes the share η·λ of the weights, so the timescale is τ = 1/(η·λ) steps.

    Runs with equal η·λ·T (equal τ in units of the run) are comparable. The law t* ≈ c/(η·λ), the λ predicted for a budget, and AdamW's
    averaging timescale are all based on it.

    Args:
        learning_rate: η, > 0; the mean over the run if it has a schedule.
        weight_decay: λ as PyTorch and optax understand it, > 0: the step is multiplied by the learning rate.
        batch_size: examples a step, ≥ 1.
        samples: training examples in an epoch, ≥ 1.
        momentum: μ of SGD with coupled weight decay, ≥ 0 and < 1, whose clock is η/(1 − μ). 0 for decoupled weight decay (AdamW), which
            momentum does not affect.

    Source: Lewkowycz and Gur-Ari 2020, arXiv 2006.08643; the factor 1/(1 − μ) is derived here.

    >>> clock = DecayClock(learning_rate=0.1, weight_decay=1e-3, batch_size=100, samples=50_000)
    >>> clock.timescale_steps, clock.timescale_epochs
    (10000.0, 20.0)
    """

    learning_rate: float
    weight_decay: float
    batch_size: int
    samples: int
    momentum: float = 0.0

    def __post_init__(self) -> None:
        remedy = "Without weight decay there is no clock."
        object.__setattr__(self, "learning_rate", checks.positive("learning_rate", self.learning_rate))
        object.__setattr__(self, "weight_decay", checks.positive("weight_decay", self.weight_decay, remedy=remedy))
        object.__setattr__(self, "momentum", check_momentum(self.momentum))
        for name in ("batch_size", "samples"):
            if checks.whole(name, number := getattr(self, name), minimum=1) >= _TOO_MANY:
                raise ValueError(f"{name} must be < 2**63; got {checks.describe(number)}. Count examples.")
        if not 0.0 < self.rate < math.inf or 1 / self.rate == math.inf:
            raise ValueError(
                f"learning_rate * weight_decay must be a share, > 0 and finite in floating point, as must be its inverse; got "
                f"{self.learning_rate:g} * {self.weight_decay:g}. Check their units."
            )

    @property
    def rate(self) -> float:
        """Share of the weights that decay removes in a step: η·λ/(1 − μ)."""
        return effective_learning_rate(self.learning_rate, self.momentum) * self.weight_decay

    @property
    def steps_per_epoch(self) -> float:
        """``samples / batch_size``, not rounded."""
        return self.samples / self.batch_size

    @property
    def timescale_steps(self) -> float:
        """τ = 1/(η·λ), in optimizer steps: after τ steps decay alone leaves 1/e of the weights."""
        return 1 / self.rate

    @property
    def timescale_epochs(self) -> float:
        """τ in epochs."""
        return self.timescale_steps / self.steps_per_epoch

    def elapsed(self, steps: float) -> float:
        """The clock after ``steps`` optimizer steps (≥ 0): η·λ·steps, in units of τ."""
        return self.rate * checks.non_negative("steps", steps)

    def transfer(
        self,
        *,
        learning_rate: float | None = None,
        batch_size: int | None = None,
        samples: int | None = None,
        momentum: float | None = None,
    ) -> DecayClock:
        """The clock of another run with the weight decay that keeps τ the same number of epochs: λ' = λ·(η/η')·(B'/B)·(N/N').

        Args:
            learning_rate: η' of the other run; None keeps it.
            batch_size: B'; None keeps it.
            samples: N', examples in an epoch; None keeps it.
            momentum: μ'; None keeps it.

        >>> DecayClock(learning_rate=0.1, weight_decay=1e-3, batch_size=100, samples=50_000).transfer(batch_size=400).weight_decay
        0.004
        """
        given = {"learning_rate": learning_rate, "batch_size": batch_size, "samples": samples, "momentum": momentum}
        other = replace(self, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
        factor = (self.learning_rate / other.learning_rate) * ((1 - other.momentum) / (1 - self.momentum))
        return replace(other, weight_decay=self.weight_decay * factor * (self.steps_per_epoch / other.steps_per_epoch))


def effective_learning_rate(learning_rate: float, momentum: float = 0.0) -> float:
    """η/(1 − μ), the learning rate of SGD with momentum μ once its buffer has filled.

    >>> round(effective_learning_rate(0.1, 0.9), 12)
    1.0
    """
    return checks.positive("learning_rate", learning_rate) / (1 - check_momentum(momentum))


def l2_from_authors(learning_rate: float, l2: float, *, classes: int) -> tuple[float, float]:
    """(lr, weight_decay) of ``torch.optim.SGD`` for the (η, λ) of Lewkowycz and Gur-Ari: (η/C, 2·C·λ) for C classes.

    Their loss is the cross entropy averaged over examples and classes, plus λ·‖θ‖², so theirs is 1/C of PyTorch's mean cross entropy plus
    C·λ·‖θ‖² = (2·C·λ/2)·‖θ‖².

    Args:
        learning_rate: their η, > 0.
        l2: their λ, ≥ 0.
        classes: C, ≥ 2.

    Source: arXiv 2006.08643 and the authors' code.

    >>> l2_from_authors(2.0, 0.01, classes=10)
    (0.2, 0.2)
    """
    count = checks.whole("classes", classes, minimum=2)
    return checks.positive("learning_rate", learning_rate) / count, 2 * count * checks.non_negative("l2", l2)


def l2_to_authors(lr: float, weight_decay: float, *, classes: int) -> tuple[float, float]:
    """The (η, λ) of Lewkowycz and Gur-Ari for the (lr, weight_decay) of ``torch.optim.SGD``: (C·lr, weight_decay/(2·C)) for C classes.

    >>> l2_to_authors(0.2, 0.2, classes=10)
    (2.0, 0.01)
    """
    count = checks.whole("classes", classes, minimum=2)
    return checks.positive("lr", lr) * count, checks.non_negative("weight_decay", weight_decay) / (2 * count)


def coupled_to_independent(learning_rate: float, weight_decay: float) -> float:
    """The share η·λ of the weights that a step removes, which some papers on AdamW call the (independent) weight decay.

    PyTorch's and optax's AdamW multiply ``weight_decay`` by the learning rate; code in which the two are independent takes this product.

    >>> coupled_to_independent(0.001, 0.1)
    0.0001
    """
    return checks.positive("learning_rate", learning_rate) * checks.non_negative("weight_decay", weight_decay)
