"""What wraps a model for data parallelism, and what the engine asks of it: when gradients are averaged, and that no stale copy is used.

``DistributedDataParallel`` averages gradients in a backward pass outside of ``no_sync()``. ``fully_shard`` (FSDP2) holds a shard of every
parameter on each rank and gathers a copy for a pass; autocast holds copies in low precision. A pass at moved parameters must see
neither of those copies.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn


class Parallelism:
    """The data parallelism of ``model``, read from its wrappers; a model without any is the trivial case.

    Raises:
        TypeError: the model holds ``FullyShardedDataParallel`` (FSDP1), whose flattened parameters cannot be moved from outside.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        if any(type(m).__name__ == "FullyShardedDataParallel" for m in modules):
            raise TypeError(
                "model must not be wrapped in FullyShardedDataParallel (FSDP1), which flattens the parameters; got one that is. "
                "Use torch.distributed.fsdp.fully_shard (FSDP2), which keeps them."
            )
        self._model = model
        self._sharded: list[Any] = [m for m in modules if hasattr(m, "reshard") and hasattr(m, "unshard")]
        self.drop_copies()

    def drop_copies(self) -> None:
        """After the parameters changed: drop what was cast (autocast) or gathered (FSDP2) from their former values."""
        torch.clear_autocast_cache()
        for module in self._sharded:
            module.reshard()

    def synchronised(self, synchronise: bool) -> AbstractContextManager[object]:
        """A context in which a backward pass averages the gradients over the ranks, or, under DDP, does not."""
        no_sync = getattr(self._model, "no_sync", None)
        return nullcontext() if synchronise or no_sync is None else no_sync()

    @property
    def averages(self) -> bool:
        """Whether this is a DDP model, whose gradients are each rank's own until they are averaged."""
        return getattr(self._model, "process_group", None) is not None

    def check_averaging(self, rule: str, received: str, remedy: str) -> None:
        """Fail with ``rule`` where an average is needed that the caller has switched off."""
        if getattr(self._model, "require_backward_grad_sync", True) is False:
            raise ValueError(
                f"{rule} inside no_sync(), where no gradient is averaged; got {received}. "
                f"Pass all micro-batches to one backward([...]) call outside of no_sync(), or {remedy}."
            )

    @property
    def reuses_gradients(self) -> bool:
        """Whether an averaged gradient lives in a buffer that the next average overwrites (``gradient_as_bucket_view``)."""
        return bool(getattr(self._model, "gradient_as_bucket_view", False))

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Average ``tensors`` over the ranks of a DDP model, in place and in one all-reduce a dtype; nothing without DDP."""
        group = getattr(self._model, "process_group", None)
        if group is None:
            return
        from torch.distributed import all_reduce

        for dtype in dict.fromkeys(t.dtype for t in tensors):
            these = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in these])
            all_reduce(flat, group=group)
            flat /= group.size()
            torch._foreach_copy_(these, [f.view_as(t) for f, t in zip(flat.split([t.numel() for t in these]), these, strict=True)])


def local_shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The part of each tensor that this rank holds: of a ``DTensor`` its local shard, of any other tensor all of it."""
    dtensor = _dtensor()
    if dtensor is None:
        return list(tensors)
    with torch.no_grad():
        return [cast(Any, t).to_local() if isinstance(t, dtensor) else t for t in tensors]


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a ``DTensor``."""
    dtensor = _dtensor()
    return dtensor is not None and isinstance(tensor, dtensor)


def placed_like(gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients with the placements of their parameters: sums that are still spread over ranks are summed, for the direction."""
    dtensor = _dtensor()
    if dtensor is None:
        return list(gradients)
    placed: list[Tensor] = []
    for gradient, parameter in zip(gradients, parameters, strict=True):
        g, to = cast(Any, gradient), getattr(parameter, "placements", None)
        placed.append(g.redistribute(placements=to) if isinstance(gradient, dtensor) and to not in (None, g.placements) else gradient)
    return placed


def reducing_groups(tensors: Sequence[Tensor]) -> list[tuple[tuple[Any, ...], list[int]]]:
    """Places in ``tensors`` by the process groups over which sums over local shards must be added up; ``()`` for whole tensors."""
    dtensor = _dtensor()
    if dtensor is None or not any(isinstance(t, dtensor) for t in tensors):
        return [((), list(range(len(tensors))))]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, tensor in enumerate(cast("Sequence[Any]", tensors)):
        over: tuple[Any, ...] = ()
        if isinstance(tensor, dtensor):
            mesh = tensor.device_mesh
            over = tuple(mesh.get_group(i) for i, placement in enumerate(tensor.placements) if not placement.is_replicate())
        groups.setdefault(over, []).append(i)
    return list(groups.items())


@dataclass(frozen=True)
class HeldRows:
    """Where this rank's shard lies in a whole tensor: in successive rows of its first dimension, of which it holds a part.

    Args:
        first: the place of the first row's first element in the whole flattened tensor.
        shape: of the rows, complete in every other dimension.
        part: which of their elements are held.
    """

    first: int
    shape: tuple[int, ...]
    part: tuple[slice, ...]

    def held(self, rows: Tensor) -> Tensor:
        """The shard, of values for all elements of the rows, flattened."""
        return rows.view(self.shape)[self.part].contiguous()


def held_rows(tensor: Tensor) -> HeldRows:
    """The rows of ``tensor``, all of them unless it is sharded, in which this rank's shard lies."""
    shape, offsets = tuple(tensor.shape), (0,) * tensor.dim()
    if is_sharded(tensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sharded = cast(Any, tensor)
        shape, offsets = compute_local_shape_and_global_offset(tensor.shape, sharded.device_mesh, sharded.placements)
    row = tuple(tensor.shape[1:])
    places = enumerate(zip(offsets, shape, strict=True))
    part = tuple(slice(offset, offset + size) if dimension else slice(None) for dimension, (offset, size) in places)
    return HeldRows(first=sum(offsets[:1]) * prod(row), shape=(*shape[:1], *row), part=part)


def _dtensor() -> Any:
    """The class ``DTensor`` if anything has loaded it: until then no tensor can be one, and nobody pays for the import."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor
