"""A model's loss on data that it is not trained on, and how much training on other data raised it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradreg import checks
from gradreg.torch.buffers import ForwardState
from gradreg.torch.closures import Closure, as_closures


def loss(model: nn.Module, closure: Closure | Sequence[Closure], *, sizes: Sequence[int] | None = None, mode: str = "eval") -> float:
    """The loss of ``closure`` without gradients, in eval mode: the mean over several, weighted by ``sizes``.

    The model is left as it was: its mode, what forward passes write (buffers, attributes), and the random numbers that follow.

    Args:
        model: what the closure evaluates.
        closure: runs a forward pass and returns the scalar loss; or several, one for each batch.
        sizes: the number of samples (of a language model: tokens) of each closure, whose losses are averaged with these weights; None
            weights them alike.
        mode: "eval", or "train" with dropout and the batches' own statistics.

    Returns:
        The loss in its own units; NaN or infinite if a closure's is. Under data parallelism it is that of this process.

    Cost: a forward pass of each closure.

    Raises:
        TypeError, ValueError: a model, closures, sizes or a mode that are none; a closure that does not return one number.

    >>> model = nn.Linear(2, 1, bias=False).requires_grad_(False)
    >>> _ = model.weight.fill_(3.0)
    >>> loss(model, [lambda: model(torch.ones(2)).sum(), lambda: model(torch.zeros(2)).sum()], sizes=[1, 2])
    2.0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {checks.describe(model)}. Pass the module that the closure evaluates.")
    checks.choice("mode", mode, ("eval", "train"))
    closures: Sequence[Closure] = [closure] if callable(closure) else as_closures("closure", closure)
    weights = _weights(sizes, len(closures))
    modes = [(m, m.training) for m in model.modules()]
    state = ForwardState(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    state.begin(trainable, closures=1, state=True, random=True)
    start = state.snapshot()
    try:
        for m, _ in modes:  # not by model.eval(), which some models override to merge weights
            m.training = mode == "train"
        with torch.no_grad():
            return math.fsum(weight * _number(one()) for weight, one in zip(weights, closures, strict=True))
    finally:
        for m, training in modes:
            m.training = training
        state.settle([start], trainable)
        state.restore(start)


class Forgetting:
    """How much the loss on earlier data rises while a model is trained on other data.

    ::

        forgetting = Forgetting(model, closures_of_earlier_data)  # before training: evaluates the loss now
        ...
        run.log(forgetting=forgetting.rise())                     # loss now − loss before, in nats: 0 is nothing forgotten

    Args:
        model: the model; the same object, or one that shares its modules, when ``rise`` is asked for.
        closure: of held-out samples of what it was trained on before, as ``gradreg.evaluation.loss`` takes it.
        sizes: as there.
        mode: as there.

    Attributes:
        before: the loss before training.

    Cost: a forward pass of each closure, now and at each ``rise()``.
    """

    def __init__(
        self, model: nn.Module, closure: Closure | Sequence[Closure], *, sizes: Sequence[int] | None = None, mode: str = "eval"
    ) -> None:
        self._loss: Callable[[], float] = lambda: loss(model, closure, sizes=sizes, mode=mode)
        self.before: float = self._loss()
        if not math.isfinite(self.before):
            raise ValueError(
                f"the loss on earlier data must be finite before training; got {self.before:g}. Check the closure and the data."
            )

    def rise(self) -> float:
        """The loss now minus the loss before: positive if something was forgotten."""
        return self._loss() - self.before


def _number(value: Any) -> float:
    if not isinstance(value, (Tensor, float, int)) or isinstance(value, bool):
        raise TypeError(f"closure must return the loss, a number or a tensor; got {checks.describe(value)}. Return the loss alone.")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"closure must return a scalar loss; got a tensor of shape {tuple(value.shape)}. Reduce it with .mean() or .sum()."
        )
    return float(value)


def _weights(sizes: Sequence[int] | None, count: int) -> list[float]:
    if sizes is None:
        return [1 / count] * count
    found = [checks.whole("sizes", size, minimum=1, remedy="Pass the number of samples of each closure.") for size in sizes]
    if len(found) != count:
        raise ValueError(f"sizes must hold one number for each closure; got {len(found)} for {count}. Leave it out to weight them alike.")
    return [size / sum(found) for size in found]
