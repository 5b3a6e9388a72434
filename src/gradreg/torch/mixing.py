"""Mixing two gradients that are held side by side; all arithmetic on this rank's shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradreg.torch.norms import inner_products, norm_of_shards, ratio_or_zero

KIND = "reused"
"""What the reused part of the gradient is called in the memory."""


def surrogate_gap(result: list[Tensor], plain: list[Tensor], a: float, like: Sequence[Tensor]) -> None:
    """P ← P − a·(part of g orthogonal to P), in place."""
    _, along, squared = inner_products(plain, result, like)
    torch._foreach_mul_(result, 1.0 + a * ratio_or_zero(along, squared))
    torch._foreach_add_(result, plain, alpha=-a)


def orthogonal_part(result: list[Tensor], plain: list[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """The part of P orthogonal to g: new tensors."""
    squared, along, _ = inner_products(plain, result, like)
    part = list(torch._foreach_mul(plain, -ratio_or_zero(along, squared)))
    torch._foreach_add_(part, result)
    return part


def add_reused(gradients: list[Tensor], reused: list[Tensor], a: float, like: Sequence[Tensor]) -> None:
    """g ← g + a·(‖g‖/‖h‖)·h, in place; nothing where h is 0."""
    factor = a * ratio_or_zero(norm_of_shards(gradients, like), norm_of_shards(reused, like))
    torch._foreach_add_(gradients, torch._foreach_mul(reused, factor))
