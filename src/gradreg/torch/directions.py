"""The vectors along which the parameters are moved, and the length by which a normalised move divides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from gradreg.directions import Adaptive, Direction, Friendly, Random, Remembered
from gradreg.torch.draws import signs
from gradreg.torch.memory import Memory
from gradreg.torch.norms import norm_of_shards, safe_ratio, tensor_norms
from gradreg.torch.parallel import local_shards

KIND = "average"
"""What the average of gradients is called in the memory."""


@dataclass
class Ascent:
    """Where to: θ + distance·vectors.

    Args:
        parameters: what is moved.
        vectors: v times ``weight`` and ``scale``: this rank's shards.
        norm: ‖w‖ times the same.
        weight: of the pass that the vectors come from.
        scale: the loss scale of that pass.
    """

    parameters: Sequence[nn.Parameter]
    vectors: list[Tensor]
    norm: Tensor | float
    weight: float = 1.0
    scale: float | Tensor = 1.0

    def distance(self, power: int, radius: float) -> float | Tensor:
        """By what the vectors are multiplied for a step of ``radius``, which is negative for a step back."""
        if power == 2:
            return radius / self.weight / self.scale
        # The weighted vector is w·v and its norm |w|·‖v‖: the sign of w is all that is left of it, and nothing of a loss scale.
        signed = radius if self.weight > 0 else -radius
        return safe_ratio(signed, self.norm) if isinstance(self.norm, Tensor) else signed / self.norm


def drawn(direction: Random, step: int, parameters: Sequence[nn.Parameter], places: Mapping[nn.Parameter, int]) -> Ascent:
    """Signs for ``step``."""
    vectors = signs(direction.seed, step, [(places[p], p) for p in parameters])
    return Ascent(parameters, vectors, sqrt(max(1, sum(p.numel() for p in parameters))))


def remembered(direction: Remembered, memory: Memory, parameters: Sequence[nn.Parameter]) -> Ascent:
    """The average of earlier results, or what is opposite to it."""
    average = memory.shards(KIND, parameters)
    return Ascent(parameters, average, norm_of_shards(average, parameters), weight=-1.0 if direction.ahead else 1.0)


def averaged(
    memory: Memory, decay: float, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], factor: float | Tensor
) -> list[Tensor]:
    """``decay·m + (1 − decay)·gradients·factor``: new tensors."""
    fresh = list(torch._foreach_mul(memory.shards(KIND, parameters), decay))
    share = factor * (1.0 - decay)
    if isinstance(share, float):
        torch._foreach_add_(fresh, list(gradients), alpha=share)
    else:
        torch._foreach_add_(fresh, torch._foreach_mul(list(gradients), share))
    return fresh


def along_gradient(direction: Direction, ascent: Ascent, average: list[Tensor]) -> Ascent:
    """``ascent``, which holds the gradient and its norm, turned into ``direction``; ``average`` of the gradients is for ``Friendly``."""
    if not ascent.vectors:
        return ascent
    if isinstance(direction, Adaptive):
        ascent.vectors, ascent.norm = _adaptive(direction, ascent.parameters, ascent.vectors)
    elif isinstance(direction, Friendly):
        left = list(torch._foreach_mul(average, -direction.sigma * ascent.weight * ascent.scale))
        torch._foreach_add_(left, ascent.vectors)
        ascent.vectors, ascent.norm = left, norm_of_shards(left, ascent.parameters)
    return ascent


def _adaptive(direction: Adaptive, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    scaled = [i for i, p in enumerate(parameters) if p.dim() > 1 or direction.one_dimensional]
    vectors = list(gradients)
    if not scaled:
        return vectors, norm_of_shards(vectors, parameters)
    here = local_shards([parameters[i] for i in scaled])
    if direction.scale == "element":
        scales = torch._foreach_abs(here)
        torch._foreach_add_(scales, direction.eta)
    else:
        scales = torch._foreach_add(tensor_norms(here, [parameters[i] for i in scaled]), direction.eta)
    products = torch._foreach_mul([gradients[i] for i in scaled], scales)
    for i, product in zip(scaled, products, strict=True):
        vectors[i] = product
    norm = norm_of_shards(vectors, parameters)
    torch._foreach_mul_(products, scales)
    return vectors, norm
