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
        consumable: whether nobody else needs the vectors, so that they may be overwritten.
    """

    parameters: Sequence[nn.Parameter]
    vectors: list[Tensor]
    norm: Tensor | float
    weight: float = 1.0
    scale: float | Tensor = 1.0
    consumable: bool = False

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


def along_gradient(direction: Direction, ascent: Ascent, average: list[Tensor]) -> Ascent:
    """``ascent``, which holds the gradient and its norm, turned into ``direction``; ``average`` of the gradients is for ``Friendly``."""
    if not ascent.vectors:
        return ascent
    if isinstance(direction, Adaptive):
        _scale(ascent, direction)
    elif isinstance(direction, Friendly):
        share = -direction.sigma * ascent.weight * ascent.scale
        if not isinstance(share, float):
            average, share = list(torch._foreach_mul(average, share)), 1.0
        if ascent.consumable:
            torch._foreach_add_(ascent.vectors, average, alpha=share)
        else:
            ascent.vectors = list(torch._foreach_add(ascent.vectors, average, alpha=share))
        ascent.norm = norm_of_shards(ascent.vectors, ascent.parameters)
    return ascent


def _scale(ascent: Ascent, direction: Adaptive) -> None:
    """Turn the gradient into T²·gradient, and its norm into ‖T·gradient‖."""
    parameters = ascent.parameters
    scaled = [i for i, p in enumerate(parameters) if p.dim() > 1 or direction.one_dimensional]
    if not scaled:
        return
    here = local_shards([parameters[i] for i in scaled])
    if direction.scale == "element":
        scales = torch._foreach_abs(here)
        torch._foreach_add_(scales, direction.eta)
    else:
        scales = torch._foreach_add(tensor_norms(here, [parameters[i] for i in scaled]), direction.eta)
    products = [ascent.vectors[i] for i in scaled]
    if ascent.consumable:
        torch._foreach_mul_(products, scales)
    else:
        products = torch._foreach_mul(products, scales)
    for i, product in zip(scaled, products, strict=True):
        ascent.vectors[i] = product
    ascent.norm = norm_of_shards(ascent.vectors, parameters)
    torch._foreach_mul_(products, scales)
