"""Norms and inner products over many tensors together, sharded or not, as 0-dimensional tensors.

They avoid device syncs. For a ``DTensor`` (FSDP2, tensor parallelism) each rank computes with its local shard, and the partial sums are
all-reduced over the process groups that hold the shards.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

LOW_PRECISION = (torch.bfloat16, torch.float16)
SUMMED = 1 << 17
"""Products that a CPU may add up one after the other in float32; longer sums are of such parts, added in float64.

Each part has an error of about 2e-7, or 3e-5 at worst, where all products are equal. PyTorch's own norm of 50 million numbers is off by
4e-3, and a matrix product with one row by 8e-3. On an accelerator sums are trees, and accurate.
"""

_WHOLE = frozenset((Tensor, nn.Parameter))
"""Classes of tensors that are no ``DTensor``: told first, because nearly all tensors are of them."""


def dtensor_class() -> Any:
    """The class ``DTensor`` if anything has imported it; until then no tensor can be one, and this avoids the import."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a ``DTensor``."""
    dtensor = dtensor_class()
    return dtensor is not None and isinstance(tensor, dtensor)


def _any_is(tensors: Sequence[Tensor], dtensor: Any) -> bool:
    """Whether any of ``tensors`` is a ``DTensor``: asked several times in a step, of the few types that there are."""
    if dtensor is None or _WHOLE.issuperset(map(type, tensors)):
        return False
    return any(issubclass(kind, dtensor) for kind in set(map(type, tensors)))


def local_shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The part of each tensor that this rank holds: of a ``DTensor`` its local shard, of any other tensor all of it."""
    dtensor = dtensor_class()
    if not _any_is(tensors, dtensor):
        return list(tensors)
    with torch.no_grad():
        return [cast(Any, t).to_local() if isinstance(t, dtensor) else t for t in tensors]


def placed_like(gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients with the placements of their parameters: partial sums over ranks are reduced, as the direction needs."""
    dtensor = dtensor_class()
    if not _any_is(gradients, dtensor):
        return list(gradients)
    placed: list[Tensor] = []
    for gradient, parameter in zip(gradients, parameters, strict=True):
        g, to = cast(Any, gradient), getattr(parameter, "placements", None)
        placed.append(g.redistribute(placements=to) if isinstance(gradient, dtensor) and to not in (None, g.placements) else gradient)
    return placed


def reducing_groups(tensors: Sequence[Tensor]) -> list[tuple[tuple[Any, ...], list[int]]]:
    """Indices into ``tensors`` by the process groups over which sums over local shards must be reduced; ``()`` for whole tensors."""
    dtensor = dtensor_class()
    if not _any_is(tensors, dtensor):
        return [((), list(range(len(tensors))))]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, tensor in enumerate(cast("Sequence[Any]", tensors)):
        over: tuple[Any, ...] = ()
        if isinstance(tensor, dtensor):
            mesh = tensor.device_mesh
            over = tuple(mesh.get_group(d) for d, placement in enumerate(tensor.placements) if not placement.is_replicate())
        groups.setdefault(over, []).append(i)
    return list(groups.items())


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm over all ``gradients`` together, a 0-dimensional tensor on the first one's device, without a device sync.

    Sharded gradients count whole. Half precision is summed in float32, which can hold the squares.
    """
    return norm_of_shards(local_shards(gradients), gradients)


def norm_of_shards(shards: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """The L2 norm over tensors of which this rank holds ``shards``, sharded as ``like``."""
    if not shards:
        return torch.zeros(())
    norms: list[Tensor] = []
    for over, indices in reducing_groups(like):
        norm = _norm_of([shards[i] for i in indices])
        if over:
            from torch.distributed import all_reduce

            square = norm.square()
            for group in over:
                all_reduce(square, group=group)
            norm = square.sqrt()
        norms.append(norm)
    return norms[0] if len(norms) == 1 else _norm_of(norms)


def tensor_norms(shards: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """The L2 norm of each tensor."""
    norms: list[Tensor] = list(shards)
    for over, indices in reducing_groups(like):
        own = _norm_of_each([shards[i] for i in indices])
        if over:
            from torch.distributed import all_reduce

            squares = torch.stack(own).square()
            for group in over:
                all_reduce(squares, group=group)
            own = squares.sqrt().unbind()
        for i, norm in zip(indices, own, strict=True):
            norms[i] = norm
    return norms


def inner_products(first: Sequence[Tensor], second: Sequence[Tensor], like: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """⟨a, a⟩, ⟨a, b⟩ and ⟨b, b⟩ over the shards a of ``first`` and b of ``second``.

    ⟨a, b⟩ = (⟨a, a⟩ + ⟨b, b⟩ − ‖a − b‖²) / 2, because ``torch._foreach`` has norms over many tensors at once and no inner products.
    """
    a, b = _squared(norm_of_shards(first, like)), _squared(norm_of_shards(second, like))
    difference = _squared(norm_of_shards(torch._foreach_sub(list(first), list(second)), like)) if first else a
    return a, (a + b - difference) / 2, b


def safe_ratio(numerator: float | Tensor, norm: Tensor) -> float | Tensor:
    """``numerator / norm``, and 0 where the norm is too small to be accurate, so that no perturbation is longer than the radius.

    Squares of numbers below 1e-19 underflow in float32, so a norm is accurate from about 1e-15 on (1e-150 in float64). On a CPU smaller
    norms were computed again in float64, and are accurate down to 1e-36. There the ratio is a number, and elsewhere a tensor.
    """
    if reading_is_free(norm):
        read = float(norm)
        return 0.0 if read <= (1e-36 if norm.dtype == torch.float32 else _underflowing(norm.dtype)) else numerator / read
    return numerator / torch.threshold(norm, _underflowing(norm.dtype), torch.inf)


def ratio_or_zero(numerator: float | Tensor, norm: Tensor) -> Tensor:
    """``numerator / norm``, and 0 where the norm is 0: for factors of more than the gradient that has this norm."""
    return (numerator / norm).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def quotient(norm: Tensor, by: float | Tensor) -> float | Tensor:
    """``norm / by``: a number where it can be read without a device sync, since operations on tensors take longer there."""
    if isinstance(by, Tensor):
        return norm / by
    return norm if by == 1.0 else (float(norm) if reading_is_free(norm) else norm) / by


def _squared(norm: Tensor) -> Tensor:
    """``norm²``, in float64 on a CPU, because the square of a small norm underflows like those of its elements."""
    return (norm.double() if reading_is_free(norm) else norm).square()


def reading_is_free(tensor: Tensor) -> bool:
    """Whether the value of ``tensor`` can be read without a device sync."""
    return tensor.is_cpu


@cache
def _underflowing(dtype: torch.dtype) -> float:
    """The norm below which squares of the elements may have underflowed."""
    return 1e4 * torch.finfo(dtype).tiny ** 0.5


def _norm_of(tensors: list[Tensor]) -> Tensor:
    norm = _norm_in(tensors)
    if norm.dtype == torch.float32 and reading_is_free(norm) and float(norm) < _underflowing(norm.dtype):
        norm = _norm_in([t.to(torch.complex128 if t.is_complex() else torch.float64) for t in tensors]).float()
    return norm


def _norm_in(tensors: list[Tensor]) -> Tensor:
    if any(t.numel() > SUMMED for t in tensors) and all(map(reading_is_free, tensors)):
        wide = any(t.dtype in (torch.float64, torch.complex128) for t in tensors)
        return torch.full((), _on_a_cpu(tensors), dtype=torch.float64 if wide else torch.float32)
    if len({(t.dtype, t.device) for t in tensors}) == 1 and tensors[0].dtype not in LOW_PRECISION:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2)), 2)
    low = [t for t in tensors if t.dtype in LOW_PRECISION]
    high = [t for t in tensors if t.dtype not in LOW_PRECISION]
    norms: list[Tensor] = []
    if high:
        norms.extend(torch._foreach_norm(high, 2))
    if low:
        norms.extend(torch._foreach_norm(low, 2, dtype=torch.float32))
    device = tensors[0].device
    return torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]), 2)


def _on_a_cpu(tensors: Sequence[Tensor]) -> float:
    """The norm over ``tensors``, all on a CPU; of those that need no parts together."""
    tensors = [t.detach() if t.requires_grad else t for t in tensors]
    squares, short = 0.0, list[Tensor]()
    for t in tensors:
        if t.numel() <= SUMMED:
            short.append(t)
        else:
            squares += _square(t)
    low = [t for t in short if t.dtype in LOW_PRECISION]
    for alike, dtype in ((low, torch.float32), ([t for t in short if t.dtype not in LOW_PRECISION] if low else short, None)):
        if alike:
            for norm in torch._foreach_norm(alike, 2, dtype=dtype):
                read = norm.item()  # takes less time than one more norm, of the norms
                squares += read * read
    return _root(squares)


def _norm_of_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    norms = torch._foreach_norm(list(tensors), 2)
    return [
        torch.full_like(norm, _on_a_cpu([t])) if t.numel() > SUMMED and reading_is_free(t) else norm
        for t, norm in zip(tensors, norms, strict=True)
    ]


def _root(square: float) -> float:
    return math.sqrt(square) if square >= 0.0 else math.nan


def _square(tensor: Tensor) -> float:
    """‖t‖² of a long tensor on a CPU. ``torch.dot`` takes less time than a norm, but is no more accurate where it must skip numbers."""
    flat = _flat(torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor)
    low = flat.dtype in LOW_PRECISION
    square = 0.0
    for part in flat.unsafe_split(SUMMED):  # the parts are only read, so autograd need not know of each that it is a view
        numbers = part.float() if low else part.contiguous()
        square += torch.dot(numbers, numbers).item()
    return square


def _flat(tensor: Tensor) -> Tensor:
    """The elements of ``tensor`` in any order, without a copy where they lie side by side."""
    if not tensor.is_contiguous():
        order = sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d))  # a transposed matrix, or channels_last
        tensor = tensor.permute(order)
    return tensor.reshape(-1)
