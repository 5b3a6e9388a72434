"""How the gradients of a step become its result: one function per mixing; all arithmetic on this rank's shards, in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from gradreg.mixing import ClipEach, GradientMixing, Plain, SurrogateGap, Unit
from gradreg.registry import check_known
from gradreg.torch.norms import inner_products, norm_of_shards, ratio_or_zero


@dataclass
class MixingInputs:
    """The gradients that a mixing combines, of parameters ``like``.

    Args:
        result: P, the sum of the weighted gradients, the plain one's included; to be overwritten by the result.
        plain: g.
        like: the parameters, for norms over all shards.
        plain_weight: the weight of g in P: 1 − c for the forward difference, 1 + c for the backward one.
        scale: what both are multiplied by: the loss scale.
    """

    result: list[Tensor]
    plain: list[Tensor]
    like: Sequence[nn.Parameter]
    plain_weight: float | Tensor = 0.0
    scale: float | Tensor = 1.0


@singledispatch
def mix(mixing: GradientMixing, inputs: MixingInputs) -> None:
    """Turn P into the result, for a mixing that needs the plain gradient "apart"."""
    raise TypeError(f"no function for {mixing!r}")  # the regularizer has checked that there is one


@mix.register
def _(mixing: SurrogateGap, inputs: MixingInputs) -> None:
    _, along, squared = inner_products(inputs.plain, inputs.result, inputs.like)
    torch._foreach_mul_(inputs.result, 1.0 + mixing.a * ratio_or_zero(along, squared))
    torch._foreach_add_(inputs.result, inputs.plain, alpha=-mixing.a)


@mix.register
def _(mixing: ClipEach, inputs: MixingInputs) -> None:
    share, limit = inputs.plain_weight, mixing.max_norm * inputs.scale
    _add(inputs.result, inputs.plain, -share)  # what remains is ±c times the second gradient
    torch._foreach_mul_(inputs.result, _limited(limit * abs(1.0 - share), norm_of_shards(inputs.result, inputs.like)))
    _add(inputs.result, inputs.plain, _limited(limit, norm_of_shards(inputs.plain, inputs.like)) * share)


def _limited(limit: float | Tensor, norm: Tensor) -> Tensor:
    """min(1, limit/norm); 0 or NaN where a pass overflowed, which makes its gradient NaN."""
    return (limit / norm).clamp(max=1.0)


def _add(to: list[Tensor], tensors: list[Tensor], factor: float | Tensor) -> None:
    """``to += factor·tensors``, in place."""
    if isinstance(factor, Tensor):
        torch._foreach_add_(to, torch._foreach_mul(tensors, factor))
    else:
        torch._foreach_add_(to, tensors, alpha=factor)


@singledispatch
def weigh_plain(mixing: GradientMixing, weight: float, norm: Tensor) -> float | Tensor:
    """The factor of the plain gradient in the sum, for a mixing that needs it "summed" or "normalized", from its norm."""
    raise TypeError(f"no function for {mixing!r}")  # the regularizer has checked that there is one


@weigh_plain.register
def _(mixing: Plain, weight: float, norm: Tensor) -> float | Tensor:
    return weight


@weigh_plain.register
def _(mixing: Unit, weight: float, norm: Tensor) -> float | Tensor:
    return ratio_or_zero(weight, norm)


def check_mixing(mixing: Any) -> None:
    """Raise a ``TypeError`` for a mixing without a function here."""
    check_known(mixing, mix if mixing.plain_gradient == "apart" else weigh_plain, engine="PyTorch")


def orthogonal_part(inputs: MixingInputs) -> list[Tensor]:
    """The part of P orthogonal to g, for ``Reuse``: new tensors."""
    squared, along, _ = inner_products(inputs.plain, inputs.result, inputs.like)
    part = list(torch._foreach_mul(inputs.plain, -ratio_or_zero(along, squared)))
    torch._foreach_add_(part, inputs.result)
    return part


def add_reused(gradients: list[Tensor], reused: list[Tensor], a: float, like: Sequence[Tensor]) -> None:
    """g ← g + a·(‖g‖/‖h‖)·h, in place; nothing where h is 0."""
    factor = a * ratio_or_zero(norm_of_shards(gradients, like), norm_of_shards(reused, like))
    torch._foreach_add_(gradients, torch._foreach_mul(reused, factor))
