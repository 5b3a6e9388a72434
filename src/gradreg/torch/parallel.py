"""Data parallelism: when the wrappers of a model average gradients, and which copies of the parameters must be dropped.

``DistributedDataParallel``, wherever it sits in the module tree, averages gradients in a backward pass outside of ``no_sync()``.
``fully_shard`` (FSDP2) holds a shard of every parameter on each rank and gathers a copy for a pass; autocast holds copies in low
precision, and ``torch.nn.utils.parametrize.cached()`` the results of parametrizations. A pass at perturbed parameters must not use these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gradreg.torch.norms import is_sharded

REMEDY = "Pass all micro-batches to one backward([...]) call outside of no_sync(), or"


class Parallelism:
    """The data parallelism of ``model``, found among its modules; it may have none.

    Raises:
        TypeError: the model holds ``FullyShardedDataParallel`` (FSDP1), whose flattened parameters cannot be perturbed from outside.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        if any(type(m).__name__ == "FullyShardedDataParallel" for m in modules):
            raise TypeError(
                "model must not be wrapped in FullyShardedDataParallel (FSDP1), which flattens the parameters; got one that is. "
                "Use torch.distributed.fsdp.fully_shard (FSDP2), which keeps them."
            )
        self._sharded: list[Any] = [m for m in modules if hasattr(m, "reshard") and hasattr(m, "unshard")]
        self._replicas: list[Any] = [m for m in modules if isinstance(m, nn.parallel.DistributedDataParallel)]
        self._parameters = list(model.parameters())
        self._groups = {p: m.process_group for m in self._replicas for p in m.parameters()}
        self.averages: bool = bool(self._replicas)
        """Whether there is a DDP module, whose gradients differ between ranks until they are averaged."""
        self.drop_copies()

    def drop_copies(self) -> None:
        """After the parameters changed: drop what was cast (autocast), gathered (FSDP2) or computed (parametrizations) from them."""
        torch.clear_autocast_cache()
        if getattr(parametrize, "_cache_enabled", 0):
            parametrize._cache.clear()
        for module in self._sharded:
            module.reshard()

    @contextmanager
    def synchronised(self, synchronise: bool) -> Iterator[None]:
        """A context in which a backward pass averages the gradients over the ranks, or, under DDP, does not."""
        with ExitStack() as stack:
            for replica in () if synchronise else self._replicas:
                stack.enter_context(replica.no_sync())
            yield

    def check_local(self, received: str) -> None:
        """Raise where a pass must leave its gradients unaveraged and DDP cannot do so."""
        if any(getattr(replica, "static_graph", False) for replica in self._replicas):
            raise ValueError(
                "DistributedDataParallel(static_graph=True) must average in every backward pass, which the unaveraged first pass of "
                f"{received} is not; got static_graph=True. Build it with static_graph=False, or the regularizer with scope='global' and "
                "one closure a step."
            )

    def check_averaging(self, rule: str, received: str, remedy: str) -> None:
        """Raise with ``rule`` if an average is needed that the caller has switched off, or in which other ranks may not take part."""
        for replica in self._replicas:
            if replica.require_backward_grad_sync is False:
                raise ValueError(f"{rule} inside no_sync(), where no gradient is averaged; got {received}. {REMEDY} {remedy}.")
            if getattr(getattr(replica, "_join_config", None), "enable", False):
                raise ValueError(
                    f"{rule} inside join(), where ranks that have ended take no part in further averages; got {received}. "
                    f"Give every rank the same number of batches, or {remedy}."
                )

    @property
    def reuses_gradients(self) -> bool:
        """Whether an averaged gradient lives in a buffer that the next average overwrites (``gradient_as_bucket_view``)."""
        return any(replica.gradient_as_bucket_view for replica in self._replicas)

    @property
    def finds_unused(self) -> bool:
        """Whether there may be parameters that some ranks do not use (``find_unused_parameters``)."""
        return any(replica.find_unused_parameters for replica in self._replicas)

    def is_averaged(self, parameter: nn.Parameter) -> bool:
        """Whether a DDP module averages the gradient of ``parameter``."""
        return parameter in self._groups

    def average(self, tensors: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
        """Average ``tensors``, one for each of ``parameters``, over the ranks of their DDP module, in place; one all-reduce a dtype.

        Those of parameters outside of DDP are not averaged, like their gradients.
        """
        if not self._replicas:
            return
        from torch.distributed import all_reduce

        together: dict[tuple[Any, torch.dtype], list[Tensor]] = {}
        for tensor, p in zip(tensors, parameters, strict=True):
            if p in self._groups:
                together.setdefault((self._groups[p], tensor.dtype), []).append(tensor)
        for (group, _), these in together.items():
            flat = torch.cat([t.reshape(-1) for t in these])
            all_reduce(flat, group=group)
            flat /= group.size()
            torch._foreach_copy_(these, [f.view_as(t) for f, t in zip(flat.split([t.numel() for t in these]), these, strict=True)])

    def mean(self, value: Tensor) -> Tensor:
        """The mean of ``value``, which is overwritten, over the ranks of DDP."""
        if self._replicas:
            from torch.distributed import all_reduce

            group = self._replicas[0].process_group
            all_reduce(value, group=group)
            value /= group.size()
        return value

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """The mean of ``value`` over all ranks that see another part of the batch, or another part of the parameters."""
        groups = list(dict.fromkeys(replica.process_group for replica in self._replicas))
        meshes = [cast(Any, p).device_mesh for p in self._parameters if is_sharded(p)]
        if meshes:
            mesh = max(meshes, key=lambda mesh: mesh.size())
            groups += [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
        if not groups:
            return value
        from torch.distributed import all_reduce

        value = value.clone()
        for group in groups:
            all_reduce(value, group=group)
            value /= group.size()
        return value

    def forward_synchronisation(self) -> list[bool]:
        """Whether the next forward pass of each DDP module broadcasts its buffers; this is part of the state that a pass starts from."""
        return [replica.require_forward_param_sync for replica in self._replicas]

    def set_forward_synchronisation(self, flags: Sequence[bool]) -> None:
        """Restore what ``forward_synchronisation`` returned."""
        for replica, flag in zip(self._replicas, flags, strict=True):
            replica.require_forward_param_sync = flag
