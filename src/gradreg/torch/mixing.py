"""How the gradients of a step become its result: one function per mixing; all arithmetic on this rank's shards, in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from gradreg.mixing import GradientMixing, Plain, SurrogateGap, Unit
from gradreg.registry import check_known
from gradreg.torch.norms import inner_products, norm_of_shards, ratio_or_zero


@dataclass
class MixingInputs:
    """The gradients that a mixing combines, of parameters ``like``.

    Args:
        result: P, the sum of the weighted gradients, the plain one's included; to be overwritten by the result.
        plain: g.
        like: the parameters, for norms over all shards.
    """

    result: list[Tensor]
    plain: list[Tensor]
    like: Sequence[nn.Parameter]


@singledispatch
def mix(mixing: GradientMixing, inputs: MixingInputs) -> None:
    """Turn P into the result, for a mixing that needs the plain gradient "apart"."""
    raise TypeError(f"no function for {mixing!r}")  # the regularizer has checked that there is one


@mix.register
def _(mixing: SurrogateGap, inputs: MixingInputs) -> None:
    _, along, squared = inner_products(inputs.plain, inputs.result, inputs.like)
    torch._foreach_mul_(inputs.result, 1.0 + mixing.a * ratio_or_zero(along, squared))
    torch._foreach_add_(inputs.result, inputs.plain, alpha=-mixing.a)


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
