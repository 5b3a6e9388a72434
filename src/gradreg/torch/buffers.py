"""What forward passes read and write: buffers, frozen parameters, plain attributes of modules, and random numbers.

All passes of a step over one closure must evaluate one function, so each later pass starts from what the first one read. Which state a
forward pass writes is found by comparing it before and after, at the first regularized step and after a change of mode (``train()``,
``eval()``, freezing, new buffers). This finds writes in place, through ``.data``, by kernels that leave the version counter unchanged, and
by assignment. From then on only what was written is copied, and tensors so small that copying is free; the others are watched by
version counter and address. A tensor that is first written later is copied from the next step on.

Attributes that are not tensors are compared and restored as objects, not by the contents of a list or dictionary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradreg.torch.norms import is_sharded, local_shards
from gradreg.torch.rng import RandomSources, is_generator

_SMALL = 1 << 16
"""Bytes of small tensors that are always copied, so that state that is written rarely (every 100th step) is covered."""
_AFFORDABLE = 1 << 26
"""Bytes that may be copied while searching for writers (or the size of the trainable parameters, if larger); the rest is checksummed."""
_CHUNK = 1 << 20
"""Elements that a checksum reads at a time."""

_ABSENT: Any = object()
"""Stands for state that was not there yet."""
_OWN = frozenset(vars(nn.Module()))
"""Attributes that are PyTorch's own."""
_WRAPPERS = ("torch.nn.parallel", "torch.distributed", "torch._dynamo")
"""Packages of modules whose attributes are bookkeeping of the passes themselves."""

Address = tuple[int, str]


@dataclass(frozen=True, eq=False)
class _Slot:
    """The location of one piece of state: ``key`` in a dictionary of a module.

    FSDP2 replaces its shards by gathered copies during a pass, so for a ``DTensor`` the object itself is kept.
    """

    holder: dict[str, Any]
    key: str
    sharded: Tensor | None = None

    @property
    def address(self) -> Address:
        return id(self.holder), self.key

    def value(self) -> Any:
        return self.holder.get(self.key, _ABSENT) if self.sharded is None else self.sharded

    def put(self, value: Any) -> None:
        if value is _ABSENT:
            self.holder.pop(self.key, None)
        elif self.sharded is None:
            self.holder[self.key] = value


@dataclass
class Snapshot:
    """The state in some slots: the objects, and by slot the contents of tensors that can be written to (this rank's shards).

    Args:
        slots: the slots.
        values: the object in each.
        contents: tensor and copy.
        random: the states of the random generators, or None.
    """

    slots: list[_Slot]
    values: list[Any]
    contents: dict[Address, tuple[Tensor, Tensor]]
    random: list[Any] | None


class ForwardState:
    """What forward passes of ``model`` write, and the random numbers that they draw.

    Args:
        model: the module whose buffers, frozen parameters and attributes are kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._mode: object = None
        self._searching = False
        self._compared: list[_Slot] = []
        self._by_checksum: list[tuple[_Slot, Tensor, tuple[int, ...]]] = []
        self._writers: list[_Slot] = []
        self._watched: list[tuple[_Slot, Tensor, tuple[int, int]]] = []
        self._pool: list[dict[Address, Tensor]] = []
        self._taken = 0
        self._random: RandomSources | None = None
        self._keeps_state = self._replays_random = True

    def begin(self, trainable: Sequence[nn.Parameter], *, state: bool, random: bool) -> None:
        """Before the passes of a step: decide whether to search for writers.

        Args:
            trainable: the parameters that require a gradient.
            state: whether passes share what they read and write; if not, snapshots leave it out.
            random: whether they share random numbers.
        """
        self._taken = 0
        self._keeps_state, self._replays_random = state, random
        self._searching = self._mode_now(trainable) != self._mode
        if self._searching:
            self._mode = None  # until the search has finished, so that it is repeated after a step that failed
            self._begin_search(trainable)

    @torch.no_grad()
    def snapshot(self) -> Snapshot:
        """A copy of the current state."""
        slots: Sequence[_Slot] = self._compared if self._searching else self._writers
        slots = slots if self._keeps_state else ()
        if self._taken == len(self._pool):
            self._pool.append({})
        pool = self._pool[self._taken]
        self._taken += 1
        values = [slot.value() for slot in slots]
        written = [(slot, value) for slot, value in zip(slots, values, strict=True) if isinstance(value, Tensor) and _can_be_written(value)]
        contents: dict[Address, tuple[Tensor, Tensor]] = {}
        for slot, value in written:
            tensor = value if slot.sharded is None else local_shards([value])[0]
            copy = pool.get(slot.address)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype or copy.device != tensor.device:
                copy = pool[slot.address] = torch.empty_like(tensor, requires_grad=False)
            contents[slot.address] = tensor, copy
        for tensors, copies in _alike(contents.values()):
            torch._foreach_copy_(copies, tensors)
        random = self._random.capture() if self._replays_random and self._random is not None else None
        return Snapshot(list(slots), values, contents, random)

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Write ``snapshot`` back."""
        for slot, value in zip(snapshot.slots, snapshot.values, strict=True):
            slot.put(value)
        for tensors, copies in _alike(snapshot.contents.values()):
            torch._foreach_copy_(tensors, copies)
        if snapshot.random is not None and self._random is not None:
            self._random.restore(snapshot.random)

    def settle(self, start: Snapshot, trainable: Sequence[nn.Parameter]) -> None:
        """After the first evaluation from ``start``: determine what it wrote, and add newly created state to ``start``."""
        if self._searching and start.random is not None and self._random is not None:
            self._random.note_use(start.random)
        if not self._keeps_state:
            return
        if self._searching:
            self._end_search(start)
            self._mode = self._mode_now(trainable)
            return
        late = [slot for slot, value, version in self._watched if slot.value() is not value or _version_of(value) != version]
        if late:  # too late for this step, because their former contents were not copied
            self._writers = [*self._writers, *late]
            self._watch([slot for slot, _, _ in self._watched if slot not in late])

    def _mode_now(self, trainable: Sequence[nn.Parameter]) -> object:
        return [id(p) for p in trainable], [(m.training, len(m._buffers)) for m in self._modules]

    def _begin_search(self, trainable: Sequence[nn.Parameter]) -> None:
        budget = max(_AFFORDABLE, sum(p.numel() * p.element_size() for p in trainable))
        self._compared, self._by_checksum = [], []
        generators: list[Any] = []
        for slot in self._slots():
            value, size = slot.value(), _bytes_of(slot.value())
            if is_generator(value):
                generators += [value] if all(value is not other for other in generators) else []
            elif size > budget:
                self._by_checksum.append((slot, value, _checksum(value)))
            else:
                budget -= size
                self._compared.append(slot)
        self._random = RandomSources({p.device for p in trainable}, generators)

    def _end_search(self, start: Snapshot) -> None:
        known = {slot.address for slot in (*start.slots, *(slot for slot, _, _ in self._by_checksum))}
        new = [slot for slot in self._slots() if slot.address not in known and not is_generator(slot.value())]
        found = [(slot, _differs(slot, value, start)) for slot, value in zip(start.slots, start.values, strict=True)]
        found += [(slot, slot.value() is not value or _checksum(value) != before) for slot, value, before in self._by_checksum]
        quiet = [slot for slot, differs in found if not differs and isinstance(slot.value(), Tensor)]
        room, small = _SMALL, list[_Slot]()
        for slot in sorted(quiet, key=lambda s: _bytes_of(s.value())):
            room -= _bytes_of(slot.value())
            if room < 0:
                break
            small.append(slot)
        self._writers = [*new, *(slot for slot, differs in found if differs), *small]
        self._watch([slot for slot in quiet if slot not in small])
        self._searching, self._compared, self._by_checksum = False, [], []
        start.slots += new
        start.values += [_ABSENT] * len(new)

    def _watch(self, slots: Sequence[_Slot]) -> None:
        self._watched = [(slot, slot.value(), _version_of(slot.value())) for slot in slots]

    def _slots(self) -> Iterator[_Slot]:
        """All state that is considered, each tensor once."""
        seen: set[int] = set()
        for module in self._modules:
            own = [] if type(module).__module__.startswith(_WRAPPERS) else [key for key in vars(module) if key not in _OWN]
            frozen = [key for key, p in module._parameters.items() if p is not None and not p.requires_grad]
            for holder, keys in ((module._buffers, [*module._buffers]), (module._parameters, frozen), (vars(module), own)):
                for key in keys:
                    value = holder[key]
                    if not isinstance(value, Tensor):
                        yield _Slot(holder, key)
                    elif id(value) not in seen and not is_lazy(value) and value.device.type != "meta":
                        seen.add(id(value))
                        yield _Slot(holder, key, value if is_sharded(value) else None)


def _can_be_written(tensor: Tensor) -> bool:
    """Whether the content of ``tensor`` is copied: not of results of a graph, of inference tensors and of expanded ones."""
    if tensor.grad_fn is not None or tensor.is_inference():
        return False
    return not any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _bytes_of(value: object) -> int:
    if not isinstance(value, Tensor) or not _can_be_written(value):
        return 0
    (shard,) = local_shards([value])
    return shard.numel() * shard.element_size()


def _version_of(tensor: Tensor) -> tuple[int, int]:
    """Changes when a tensor is written in place or gets other memory, but not with writes through ``.data``."""
    return -1 if tensor.is_inference() else tensor._version, tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else 0


def _differs(slot: _Slot, before: object, start: Snapshot) -> bool:
    """Whether ``slot`` holds an object other than ``before``, or that object's content differs from ``start``."""
    if slot.value() is not before:
        return True
    return slot.address in start.contents and not torch.equal(*start.contents[slot.address])


@torch.no_grad()
def _checksum(tensor: Tensor) -> tuple[int, ...]:
    """A checksum of a tensor too large to be copied: sums of its 32-bit words, plain and weighted by position (odd weights)."""
    (shard,) = local_shards([tensor])
    flat = shard.contiguous().view(-1).view(torch.uint8)
    words, rest = flat[: len(flat) // 4 * 4].view(torch.int32), flat[len(flat) // 4 * 4 :]
    weights = torch.arange(1, 2 * _CHUNK, 2, device=words.device)
    plain = weighted = int(rest.sum())
    for i, chunk in enumerate(words.split(_CHUNK)):
        long = chunk.long()
        plain += int(long.sum())
        weighted += (i + 1) * int((long * weights[: len(long)]).sum())
    return plain, weighted


def _alike(pairs: Any) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Pairs of tensors as two lists for each dtype and device, which is the form that ``torch._foreach`` operations need."""
    groups: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for a, b in pairs:
        ours, theirs = groups.setdefault((a.dtype, a.device), ([], []))
        ours.append(a)
        theirs.append(b)
    return list(groups.values())
