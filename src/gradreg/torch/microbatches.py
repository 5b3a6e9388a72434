"""m-sharpness on one device: each micro-batch of a step is perturbed by its own gradient, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradreg.torch.closures import total
from gradreg.torch.step import Result


def restore_gradients(parameters: Sequence[nn.Parameter], held: Sequence[Tensor | None]) -> None:
    """Set ``.grad`` of ``parameters`` to ``held``."""
    for p, gradient in zip(parameters, held, strict=True):
        p.grad = gradient


def combined(results: Sequence[Result], *, in_sequence: bool) -> Result:
    """The result of a step whose micro-batches had steps of their own: losses add up, norms and cosines are means.

    Args:
        results: those of the micro-batches, in order.
        in_sequence: whether the closures were given as a sequence, whose aux are a list.
    """
    aux: Any = [result.aux for result in results]
    loss = total([result.loss for result in results])
    return Result(loss, aux if in_sequence else aux[0], _mean([r.norm for r in results]), _mean([r.cosine for r in results]))


def _mean(numbers: Sequence[Tensor | float]) -> Tensor | float:
    if all(isinstance(number, float) for number in numbers):
        return sum(float(number) for number in numbers) / len(numbers)
    return torch.stack([torch.as_tensor(number) for number in numbers]).mean()
