"""m-sharpness on one device: each micro-batch of a step is perturbed by its own gradient, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradreg.torch.closures import Evaluator, total
from gradreg.torch.gradients import ByParameter, Gradients
from gradreg.torch.norms import ratio_or_zero
from gradreg.torch.step import Result


def each_by_itself(evaluators: Sequence[Evaluator], gradients: Gradients, step: Callable[[Evaluator, bool], Result]) -> Result:
    """The result of a step of its own for each micro-batch, all of which add to ``.grad``; if one raises, ``.grad`` is restored.

    Args:
        evaluators: of the micro-batches, in order.
        gradients: writes ``.grad``.
        step: makes one step, given whether it is the last.
    """
    before = gradients.present()
    try:
        results = [step(evaluator, evaluator is evaluators[-1]) for evaluator in evaluators]
    except BaseException:
        gradients.restore(before)
        raise
    return _combined(results)


def _combined(results: Sequence[Result]) -> Result:
    """The result of a step whose micro-batches had steps of their own: losses add up; norms, cosines and shares are means."""
    aux: Any = [result.aux for result in results]
    loss = total([result.loss for result in results])
    norm, cosine = _mean([r.norm for r in results]), _mean([r.cosine for r in results])
    return Result(loss, aux, norm, cosine, lengths=_lengths([r.lengths for r in results if r.lengths]))


def _lengths(found: Sequence[ByParameter]) -> ByParameter:
    """Lengths whose squares are the mean shares of several perturbations in each parameter, each of a length of its own."""
    squares: ByParameter = {}
    for lengths in found:
        first = next(iter(lengths.values()))
        total = torch.stack([length.to(first) for length in lengths.values()]).square().sum()
        for p, length in lengths.items():
            share = ratio_or_zero(length.square(), total.to(length))
            squares[p] = squares[p] + share if p in squares else share
    return {p: square.sqrt() for p, square in squares.items()}


def _mean(numbers: Sequence[Tensor | float]) -> Tensor | float:
    if all(isinstance(number, float) for number in numbers):
        return sum(float(number) for number in numbers) / len(numbers)
    return torch.stack([torch.as_tensor(number) for number in numbers]).mean()
