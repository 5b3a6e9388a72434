"""Perturbing the parameters along a direction, and restoring them bit for bit.

There are two ways, chosen for each parameter:

- **swap**: θ + δ is written into a buffer, and the parameter is pointed at it; restoring points it back. θ itself is never written to. This
  takes three memory accesses per element (read θ, read δ, write) instead of seven for copying, adding and copying back. It is used for
  large tensors on a CPU whose memory nothing else shares.
- **copy**: θ is copied, changed in place, and copied back, in a few ``torch._foreach`` operations. It is used for everything else: memory
  shared with views, NumPy arrays or other processes, shards of a ``DTensor``, accelerators (CUDA graphs identify parameters by address),
  and small tensors, for which a few operations over all of them cost less than one operation each.

Both keep one copy of the parameters between steps. Restoring is bit for bit; subtracting the step again would not be.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from gradreg.torch.adapted import LayerNoise
from gradreg.torch.norms import LOW_PRECISION, local_shards

_LARGE = 1 << 15
"""Elements from which a parameter is swapped rather than copied."""

_CHUNK = 1 << 10
"""The smallest number of elements for which rounding is measured at a time."""

_FAITHFUL = 0.9
"""The cosine between the requested perturbation and what rounding leaves of it, below which the user is warned."""


@dataclass
class _Swapped:
    """A parameter that points at ``buffer``; ``original`` is its own memory."""

    parameter: Tensor
    original: Tensor
    buffer: Tensor
    version: int

    def point_back(self) -> None:
        self.parameter.data = self.original

    def is_untouched(self) -> bool:
        """Whether nothing else has written to the parameter since it was perturbed."""
        return self.parameter.data_ptr() == self.buffer.data_ptr() and self.parameter._version == self.version


@dataclass
class _Copied:
    """Parameters whose values ``copies`` hold; ``shards`` are what is written to."""

    parameters: list[Tensor]
    shards: list[Tensor]
    copies: list[Tensor]
    versions: list[int]


class Perturbation:
    """θ → θ + δ → … → θ.

    ``restoring()`` is a context that restores θ after any exception, at any instruction. If a second interrupt comes while it restores,
    ``recover()`` finishes the work before the next step starts.

    Args:
        drop_copies: called whenever the parameters have changed, to drop what was computed from their old values.
    """

    def __init__(self, drop_copies: Callable[[], None] = lambda: None) -> None:
        self._drop_copies = drop_copies
        self._buffers: dict[Tensor, Tensor] = {}
        self._swapped: list[_Swapped] = []
        self._copied: list[_Copied] = []
        self._noise: LayerNoise | None = None
        self._checked_rounding = False
        self.looks_for_writes: Collection[Tensor] = ()
        """Whether ``restore`` checks if something else wrote to a perturbed parameter, and sets ``was_written``."""
        self.was_written: bool = False

    @property
    def is_perturbed(self) -> bool:
        """Whether any parameter differs from θ, or a layer computes with another weight than its own."""
        return bool(self._swapped or self._copied or self._noise)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """A context at whose end θ is restored, after any exception too."""
        try:
            try:
                yield
            finally:
                self.restore()
        except BaseException:
            self.restore()  # again, because an interrupt may have come during the first time
            raise

    def perturb(
        self, parameters: Sequence[nn.Parameter], vectors: list[Tensor], step: float | Tensor, *, check_rounding: bool = True
    ) -> None:
        """Under ``torch.no_grad()``, add step·v to the parameters, which an earlier call may have perturbed already.

        ``step`` is a number, or a 0-dimensional tensor, which avoids a device sync. ``vectors`` are only read; for sharded parameters they
        are this rank's shards. Without parameters (if the selected ones have no gradient in this step) nothing is perturbed.
        """
        if not parameters:
            return
        if self.is_perturbed:
            self._perturb_further(parameters, vectors, step)
            self._drop_copies()
            return
        here = local_shards(parameters)
        large = {i for i, p in enumerate(parameters) if p.numel() >= _LARGE and _can_be_swapped(p, vectors[i])}
        # Allocate and compute everything before anything is registered or perturbed, so that running out of memory changes nothing.
        buffers = self._buffers_of(parameters, here)
        new: list[_Swapped] = []
        for i in large:
            p, original = parameters[i], parameters[i].data
            _added(original, vectors[i], step, buffers[i])
            new.append(_Swapped(p, original, buffers[i], p._version))
        copied = [i for i in range(len(parameters)) if i not in large]
        copies = [buffers[i] for i in copied]
        if copied:
            torch._foreach_copy_(copies, [here[i] for i in copied])
        # From here on parameters change, each after the record that restores it is registered.
        self._swapped = new
        for one in new:
            one.parameter.data = one.buffer
        if copied:
            record = _Copied([parameters[i] for i in copied], [here[i] for i in copied], copies, [])
            self._copied = [record]
            _add(record.shards, [vectors[i] for i in copied], step, copies)
            record.versions = [p._version for p in record.parameters]
        self._drop_copies()
        if check_rounding and not self._checked_rounding:
            self._checked_rounding = True
            originals = {id(one.parameter): one.original for one in new}
            before = [originals.get(id(p), b) for p, b in zip(parameters, buffers, strict=True)]
            _warn_of_rounding(before, local_shards(parameters), vectors, step)

    def perturb_layers(self, noise: LayerNoise, distance: float | Tensor) -> None:
        """Let layers compute with weights perturbed by ``distance`` times ``noise``."""
        self._noise = noise
        noise.begin(distance)

    def _perturb_further(self, parameters: Sequence[nn.Parameter], vectors: list[Tensor], step: float | Tensor) -> None:
        """One more ascent step. A parameter that gets its first gradient only now is copied like those of the ``copy`` way."""
        known = {id(one.parameter) for one in self._swapped} | {id(p) for record in self._copied for p in record.parameters}
        fresh = [p for p in parameters if id(p) not in known]
        if fresh:
            shards = local_shards(fresh)
            copies = self._buffers_of(fresh, shards)
            torch._foreach_copy_(copies, shards)
            self._copied = [*self._copied, _Copied(list(fresh), shards, copies, [])]
        _add(local_shards(parameters), vectors, step, None)
        for one in self._swapped:
            one.version = one.parameter._version
        for record in self._copied:
            record.versions = [p._version for p in record.parameters]

    @torch.no_grad()
    def mirror(self) -> None:
        """θ + δ → θ − δ, by 2θ − (θ + δ)."""
        if self._swapped:
            torch._foreach_lerp_([one.buffer for one in self._swapped], [one.original for one in self._swapped], 2.0)
        for record in self._copied:
            torch._foreach_lerp_(record.shards, record.copies, 2.0)
            record.versions = [p._version for p in record.parameters]
        if self._noise is not None:
            self._noise.distance = -self._noise.distance
        self._drop_copies()

    @torch.no_grad()
    def restore(self) -> None:
        """Restore θ bit for bit; does nothing if it is not perturbed."""
        if not self.is_perturbed:
            return
        if self.looks_for_writes:
            watched = {id(p) for p in self.looks_for_writes}
            versions = [(p, v) for record in self._copied for p, v in zip(record.parameters, record.versions, strict=False)]
            self.was_written = any(id(one.parameter) in watched and not one.is_untouched() for one in self._swapped) or any(
                id(p) in watched and p._version != version for p, version in versions
            )
        for one in self._swapped:
            one.point_back()
        for record in self._copied:
            torch._foreach_copy_(record.shards, record.copies)
        if self._noise is not None:
            self._noise.end()
        self._drop_copies()
        self._swapped, self._copied, self._noise = [], [], None

    def recover(self) -> None:
        """Restore what an interrupted step left perturbed, but keep what was written since (a loaded checkpoint, for example).

        Writes are told by the parameter's version, which ``load_state_dict``, optimizers and in-place operations raise. What was written
        through ``p.data`` (``p.data.copy_(...)``) raises none and cannot be told from the perturbation: it is lost.
        """
        if self.is_perturbed:
            self._recover()

    @torch.no_grad()
    def _recover(self) -> None:
        for one in self._swapped:
            if one.is_untouched():
                one.point_back()
            else:
                self._buffers.pop(one.parameter, None)  # it is the parameter's own memory from now on
        for record in self._copied:
            versions = record.versions or [-1] * len(record.parameters)  # empty if it was interrupted while being perturbed
            for p, shard, copy, version in zip(record.parameters, record.shards, record.copies, versions, strict=True):
                if version in (-1, p._version):
                    shard.copy_(copy)
        if self._noise is not None:
            self._noise.end()
        self._swapped, self._copied, self._noise = [], [], None

    def _buffers_of(self, parameters: Sequence[Tensor], shards: Sequence[Tensor]) -> list[Tensor]:
        buffers: list[Tensor] = []
        for p, shard in zip(parameters, shards, strict=True):
            buffer = self._buffers.get(p)
            if buffer is None or buffer.shape != shard.shape or buffer.dtype != shard.dtype or buffer.device != shard.device:
                buffer = self._buffers[p] = torch.empty_like(shard, requires_grad=False)
            buffers.append(buffer)
        return buffers


def _can_be_swapped(p: nn.Parameter, vector: Tensor) -> bool:
    """Whether ``p`` is a CPU tensor whose memory nothing else uses."""
    if type(p) is not nn.Parameter or not p.is_cpu or vector.dtype != p.dtype:
        return False
    if not p.is_contiguous() and not p.is_contiguous(memory_format=torch.channels_last):
        return False
    storage = p.untyped_storage()
    if storage.nbytes() != p.numel() * p.element_size() or storage.is_shared():
        return False
    # Memory that PyTorch did not allocate (torch.from_numpy, a file) has users that it does not count, and cannot be resized.
    return storage.resizable() and _users_of(storage) <= _users_of_a_parameter()


def _users_of(storage: torch.UntypedStorage) -> int:
    return torch._C._storage_Use_Count(storage._cdata)


@cache
def _users_of_a_parameter() -> int:
    """``_users_of`` for a parameter whose memory nothing else uses; it differs between releases of PyTorch."""
    lonely = nn.Parameter(torch.zeros(1))
    storage = lonely.untyped_storage()
    return _users_of(storage)


def _added(original: Tensor, vector: Tensor, step: float | Tensor, out: Tensor) -> None:
    """``original + step·vector`` in one sweep over memory."""
    if isinstance(step, Tensor):
        torch.addcmul(original, vector, step.to(original.device, original.dtype), out=out)
    else:
        torch.add(original, vector, alpha=step, out=out)


def _add(shards: list[Tensor], vectors: list[Tensor], step: float | Tensor, originals: list[Tensor] | None) -> None:
    """``shards += step·vectors`` in place; ``originals``, if ``shards`` still equal them, allow fused operations on a GPU."""
    if not isinstance(step, Tensor):
        torch._foreach_add_(shards, vectors, alpha=step)
    elif originals is not None and step.device.type != "cpu" and all(t.device == step.device for t in shards):
        # On an accelerator addcmul with a broadcast factor would launch one kernel per tensor; these three are fused over all of them.
        torch._foreach_copy_(shards, vectors)
        torch._foreach_mul_(shards, step)
        torch._foreach_add_(shards, originals)
    else:
        torch._foreach_addcmul_(shards, vectors, [step.to(t.device) for t in shards])


def _warn_of_rounding(before: Sequence[Tensor], after: Sequence[Tensor], vectors: Sequence[Tensor], step: float | Tensor) -> None:
    """Warn if ``after − before`` is far from ``step·v``. Synchronizes with the device, so it is called once, at the first full step.

    Rounding to nearest, which the perturbation does once and from float32, keeps more of a small perturbation than stochastic rounding
    does (``benchmarks/low_precision.py``).
    """
    changed = asked = along = 0.0
    for whole in zip(before, after, vectors, strict=True):
        wide = torch.complex128 if whole[0].is_complex() else torch.float64
        size = max(_CHUNK, whole[0].numel() // 64)
        for old, new, vector in zip(*(t.detach().flatten().split(size) for t in whole), strict=True):
            effective, wanted = new.to(wide) - old.to(wide), vector.to(wide) * step
            changed += float(torch.linalg.vector_norm(effective)) ** 2
            asked += float(torch.linalg.vector_norm(wanted)) ** 2
            along += float(torch.vdot(effective, wanted).real)
    if not 0.0 < asked < float("inf") or not changed < float("inf"):
        return
    cosine = along / (changed**0.5 * asked**0.5) if changed > 0 else 0.0
    if cosine >= _FAITHFUL:
        return
    names = " and ".join(sorted({str(t.dtype).removeprefix("torch.") for t in before}))
    remedy = (
        "Keep the parameters in float32 and compute under autocast, or raise the radius at the same strength, as in "
        "gnp(r=4 * rho, alpha=0.25) for sam(rho=rho)."
        if any(t.dtype in LOW_PRECISION for t in before)
        else "Raise the radius: between two neighbouring numbers of the parameters there is nothing finer."
    )
    warnings.warn(
        f"{names} parameters round the perturbation: its cosine with the one asked for is {cosine:.2f} and its norm "
        f"{(changed / asked) ** 0.5:.2f} of it. {remedy}",
        stacklevel=10,
    )
