"""Lengths and inner products over many tensors together, whichever ranks hold their shards: 0-dimensional tensors that nobody waits for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradreg.torch.parallel import local_shards, reducing_groups
from gradreg.torch.precision import LOW_PRECISION

_SMALLEST_NORM = 1e-30
"""Gradients shorter than this are lengthened less than the radius asks, for 1 / norm must stay finite in float32."""


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm over all ``gradients`` together, a 0-dimensional tensor on the first one's device; no synchronisation.

    Sharded gradients count whole, whichever ranks hold them. Half precision is summed in float32, where its squares fit.
    """
    return norm_of_shards(local_shards(gradients), gradients)


def norm_of_shards(shards: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """The L2 norm over tensors of which this rank holds ``shards``, spread over the ranks as ``like``."""
    if not shards:
        return torch.zeros(())
    norms: list[Tensor] = []
    for over, places in reducing_groups(like):
        norm = _norm_of([shards[i] for i in places])
        if over:
            from torch.distributed import all_reduce

            square = norm.square()
            for group in over:
                all_reduce(square, group=group)
            norm = square.sqrt()
        norms.append(norm)
    return norms[0] if len(norms) == 1 else _norm_of(norms)


def tensor_norms(shards: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """The L2 norm of each tensor for itself."""
    norms: list[Tensor] = list(shards)
    for over, places in reducing_groups(like):
        own = torch._foreach_norm([shards[i] for i in places], 2)
        if over:
            from torch.distributed import all_reduce

            squares = torch.stack(own).square()
            for group in over:
                all_reduce(squares, group=group)
            own = squares.sqrt().unbind()
        for i, norm in zip(places, own, strict=True):
            norms[i] = norm
    return norms


def inner_products(first: Sequence[Tensor], second: Sequence[Tensor], like: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """⟨a, a⟩, ⟨a, b⟩ and ⟨b, b⟩ over the shards a of ``first`` and b of ``second``.

    ⟨a, b⟩ = (⟨a, a⟩ + ⟨b, b⟩ − ‖a − b‖²) / 2, because norms come in a few operations over all tensors and products do not.
    """
    a, b = norm_of_shards(first, like).square(), norm_of_shards(second, like).square()
    difference = norm_of_shards(torch._foreach_sub(list(first), list(second)), like).square() if first else a
    return a, (a + b - difference) / 2, b


def safe_ratio(numerator: float, norm: Tensor) -> Tensor:
    """``numerator / norm``, finite where the norm is 0: times a gradient of zeros it gives zeros, so nothing is perturbed or made NaN."""
    return numerator / norm.clamp_min(_SMALLEST_NORM)


def ratio_or_zero(numerator: float | Tensor, norm: Tensor) -> Tensor:
    """``numerator / norm``, and 0 where the norm is 0: for what is multiplied with more than the gradient that has this norm."""
    return (numerator / norm).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _norm_of(tensors: list[Tensor]) -> Tensor:
    low = [t for t in tensors if t.dtype in LOW_PRECISION]
    high = tensors if not low else [t for t in tensors if t.dtype not in LOW_PRECISION]
    norms: list[Tensor] = []
    if high:
        norms.extend(torch._foreach_norm(high, 2))
    if low:
        norms.extend(torch._foreach_norm(low, 2, dtype=torch.float32))
    device = tensors[0].device
    return torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]), 2)
