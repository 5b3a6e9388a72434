"""What forward passes read and write: buffers, frozen parameters, what modules hold as plain attributes, and random numbers.

All passes of a step over one closure must evaluate one function, so each later pass starts from the state that the first one read. A search
finds which state a forward pass writes, however it writes: in place, through ``.data``, by kernels that move no version counter, or by
assignment. The search compares the state before and after the first pass of the first regularized step, and again after a change of mode
(``train()``, ``eval()``, freezing, modules, buffers or attributes that are new). From then on only the writers are copied, and what is
small enough to cost nothing; other tensors are watched by version counter and address. A tensor that is first written to later is
copied from the next step on.

Of an attribute that is not a tensor the object counts, not the contents of a list or dictionary. A tensor that shares memory with a
trainable parameter (``self.w = self.weight.data``) is perturbed and restored with it, so its contents are left alone.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradreg.torch.norms import is_sharded, local_shards
from gradreg.torch.rng import RandomSources, is_generator

_SMALL = 1 << 16
"""Bytes of tensors that are copied in any case, so that writers that show late (every 100th step) are too."""
_AFFORDABLE = 1 << 26
"""Bytes that may be copied while writers are searched for, or as many as the trainable parameters have; beyond it a checksum tells."""
_CHUNK = 1 << 20
"""Elements that a checksum reads at a time."""

_ABSENT: Any = object()
"""Stands for state that was not there yet."""
_OWN = frozenset((*vars(nn.Module()), "forward"))
"""Attributes that are PyTorch's own, and what ``gradreg.torch.adapted`` sets: code, and no state."""
_WRAPPERS = ("torch.nn.parallel", "torch.distributed", "torch._dynamo")
"""Where modules come from whose attributes are bookkeeping of the passes themselves."""

Address = tuple[int, str]
Contents = dict[Address, tuple[Tensor, Tensor]]
_PLAIN = (Tensor, nn.Parameter)
"""Classes of tensors that are told by object and pointer."""


@dataclass(frozen=True, eq=False)
class _Slot:
    """Where one piece of state stands: under ``key`` in a dictionary of a module.

    Of some tensors the object itself is the slot: of a ``DTensor``, in whose place FSDP2 puts gathered copies during a pass, and of those
    of a scripted module, whose dictionaries are views.
    """

    holder: dict[str, Any]
    key: str
    fixed: Tensor | None = None

    @property
    def address(self) -> Address:
        return id(self.holder), self.key

    def value(self) -> Any:
        return self.holder.get(self.key, _ABSENT) if self.fixed is None else self.fixed

    def put(self, value: Any) -> None:
        if value is _ABSENT:
            self.holder.pop(self.key, None)
        elif self.fixed is None:
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
    contents: Contents
    random: list[Any] | None


@dataclass
class _Copies:
    """The copies that one snapshot of a step makes, kept so that later steps allocate nothing and need not look at each tensor.

    What can be copied is found out anew where anything is not as it was then: a slot, the object in it, the memory or shape of a tensor,
    or the memory of a parameter.

    Args:
        by_address: the copy of each slot that has one.
        slots: of the last step that looked at the tensors; empty where they must be looked at again.
        memory: of its parameters.
        known: for each slot its tensor and where that lay, None for other objects.
        copied: the slots that are copied, by their index, with the copy.
    """

    by_address: dict[Address, Tensor] = field(default_factory=dict)
    slots: Sequence[_Slot] = ()
    memory: list[int] | None = None
    known: list[tuple[weakref.ref[Tensor], int, torch.Size] | None] = field(default_factory=list)
    copied: list[tuple[int, Address, Tensor]] = field(default_factory=list)

    def fit(self, slots: Sequence[_Slot], values: Sequence[Any], memory: list[int] | None) -> bool:
        """Whether everything is as it was when the tensors were looked at."""
        if slots is not self.slots or memory != self.memory:
            return False
        for value, known in zip(values, self.known, strict=True):
            if known is None:
                if isinstance(value, Tensor):
                    return False
            else:
                tensor, pointer, shape = known
                if not isinstance(value, Tensor) or tensor() is not value or value.grad_fn is not None:
                    return False  # of a tensor that is gone the reference gives None, which its slot may hold now
                if value.data_ptr() != pointer or value.shape != shape:
                    return False
        return True

    def remember(self, slots: Sequence[_Slot], values: Sequence[Any], memory: list[int] | None, contents: Contents) -> None:
        """Note how everything is, if that can be told again by a look at pointers; nothing fits what an interrupt has left half-noted."""
        self.slots = ()
        plain = all(type(v) in _PLAIN and v.layout is torch.strided and not v.is_nested for v in values if isinstance(v, Tensor))
        if memory is None or not plain:
            return
        self.memory = memory
        self.known = [(weakref.ref(v), v.data_ptr(), v.shape) if isinstance(v, Tensor) else None for v in values]
        self.copied = [(i, slot.address, contents[slot.address][1]) for i, slot in enumerate(slots) if slot.address in contents]
        self.slots = slots

    def fill(self, values: Sequence[Any]) -> Contents:
        """Copy the tensors among ``values``, which fit."""
        contents = {address: (values[i], copy) for i, address, copy in self.copied}
        _copy(contents)
        return contents


class ForwardState:
    """What forward passes of ``model`` write, and the random numbers that they draw.

    Args:
        model: the module whose buffers, frozen parameters and attributes are kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._forget()

    def _forget(self) -> None:
        """As before the first step."""
        self._modules = list(self._model.modules())
        self._mode: object = None
        self._searching = self._searched = False
        self._compared: list[_Slot] = []
        self._by_checksum: list[tuple[_Slot, Tensor, tuple[int, ...]]] = []
        self._generators: list[_Slot] = []
        self._writers: list[_Slot] = []
        self._watched: list[tuple[_Slot, Tensor, tuple[int, int]]] = []
        self._quiet: set[Address] = set()
        self._pool: list[_Copies] = []
        self._pointers: list[int] | None = None
        self._taken = 0
        self._trainable: Sequence[nn.Parameter] = ()
        self._memory: _Ranges | None = None
        self._random: RandomSources | None = None
        self._keeps_state = self._replays_random = True

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": self._model}  # a copy looks for writers itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = state["_model"]
        self._forget()

    def begin(self, trainable: Sequence[nn.Parameter], *, closures: int, state: bool, random: bool) -> None:
        """Before the passes of a step: decide whether to search for writers.

        Args:
            trainable: the parameters that require a gradient.
            closures: how many closures a pass has, each of which starts from a copy of its own.
            state: whether passes share what they read and write; if not, snapshots leave it out.
            random: whether they share random numbers.
        """
        self._taken = 0
        self._keeps_state, self._replays_random = state, random
        self._trainable, self._memory = trainable, None
        self._pointers = [p.data_ptr() for p in trainable] if self._writers and all(type(p) in _PLAIN for p in trainable) else None
        self._searching = self._searched = self._mode_now(trainable) != self._mode
        if self._searching:
            self._mode = None  # until the search has ended: after a step that failed it begins again
            self._begin_search(trainable, closures)
        if self._random is not None and (self._generators or self._random.generators):
            self._random.generators = _once(slot.value() for slot in self._generators if is_generator(slot.value()))

    def search_again(self) -> None:
        """After a pass over something else than the training loss in which writers were searched for: search in the next step too."""
        if self._searched:
            self._mode = None

    def snapshot(self) -> Snapshot:
        """The state in the slots that are copied."""
        slots = (self._compared if self._searching else self._writers) if self._keeps_state else []
        values, contents = self._copied(slots) if slots else ([], {})
        return Snapshot(list(slots), values, contents, self.random_states())

    @torch.no_grad()
    def _copied(self, slots: Sequence[_Slot]) -> tuple[list[Any], Contents]:
        if self._taken == len(self._pool):
            self._pool.append(_Copies())
        kept = self._pool[self._taken]
        self._taken += 1
        values = [slot.value() for slot in slots]
        if kept.fit(slots, values, self._pointers):
            return values, kept.fill(values)
        pool, contents = kept.by_address, Contents()
        for slot, value in zip(slots, values, strict=True):
            if not isinstance(value, Tensor) or not self._copies_contents_of(value):
                continue
            tensor = local_shards([value])[0] if is_sharded(value) else value
            copy = pool.get(slot.address)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype or copy.device != tensor.device:
                copy = pool[slot.address] = torch.empty_like(tensor, requires_grad=False)
            contents[slot.address] = tensor, copy
        _copy(contents)
        kept.remember(slots, values, self._pointers, contents)
        return values, contents

    def restore(self, snapshot: Snapshot) -> None:
        """Put the state of ``snapshot`` back into its slots."""
        if snapshot.slots:
            self._put_back(snapshot)
        self.restore_random(snapshot.random)

    @torch.no_grad()
    def _put_back(self, snapshot: Snapshot) -> None:
        for slot, value in zip(snapshot.slots, snapshot.values, strict=True):
            slot.put(value)
        for tensor, copy in snapshot.contents.values():
            if tensor.shape != copy.shape:
                tensor.resize_(copy.shape)
        # What nothing has written so far may lie in read-only memory, and is looked at first: all of it while writers are searched for.
        looked_at = snapshot.contents.keys() if self._searching else self._quiet
        written = (pair for address, pair in snapshot.contents.items() if address not in looked_at or not _same(*pair))
        for tensors, copies in _alike(written):
            torch._foreach_copy_(tensors, copies)

    def random_states(self) -> list[Any] | None:
        """The states of the random generators, as a snapshot holds them."""
        return self._random.capture() if self._replays_random and self._random is not None else None

    def restore_random(self, states: list[Any] | None) -> None:
        """Put what ``random_states`` returned back."""
        if states is not None and self._random is not None:
            self._random.restore(states)

    def differs_from(self, snapshot: Snapshot) -> bool:
        """Whether any of the state in a snapshot has changed since; of a settled one, in which there are only writers and what is small."""
        return any(_differs(slot, value, snapshot) for slot, value in zip(snapshot.slots, snapshot.values, strict=True))

    def settle(self, starts: Sequence[Snapshot], trainable: Sequence[nn.Parameter]) -> None:
        """After the first evaluation of closures from ``starts``: determine what it wrote, and what of ``starts`` must be put back."""
        if self._searching and starts[0].random is not None and self._random is not None:
            self._random.note_use(starts[0].random)
        if self._searching:
            self._end_search(starts)
            self._mode = self._mode_now(trainable)
            return
        late = [slot for slot, value, version in self._watched if slot.value() is not value or _version_of(value) != version]
        if late:  # what they held before is not known
            self._writers = [*self._writers, *late]
            self._watch([slot for slot, _, _ in self._watched if slot not in late])

    def _mode_now(self, trainable: Sequence[nn.Parameter]) -> object:
        modules = [(m.training, len(m._buffers), len(m._modules), len(m.__dict__) - ("forward" in m.__dict__)) for m in self._modules]
        return [id(p) for p in trainable], modules, self._keeps_state

    def _begin_search(self, trainable: Sequence[nn.Parameter], closures: int) -> None:
        self._modules = list(self._model.modules())
        self._compared, self._by_checksum, self._generators = [], [], []
        room = max(_AFFORDABLE, sum(p.numel() * p.element_size() for p in trainable)) // closures
        known = {slot.address for slot in self._writers}
        # Known writers first, then the smallest, so that what is too large is what is least likely to be written.
        for slot in sorted(self._slots(), key=lambda s: (s.address not in known, self._bytes_of(s.value()))):
            value = slot.value()
            if is_generator(value):
                self._generators.append(slot)
            elif not self._keeps_state:
                continue
            elif slot.address in known or (room := room - self._bytes_of(value)) >= 0:
                self._compared.append(slot)
            else:
                self._by_checksum.append((slot, value, _checksum(value)))
        if self._random is None:
            self._random = RandomSources({p.device for p in trainable})

    def _end_search(self, starts: Sequence[Snapshot]) -> None:
        known = {slot.address for slot in (*starts[0].slots, *self._generators, *(slot for slot, _, _ in self._by_checksum))}
        new = [slot for slot in self._slots() if slot.address not in known and not isinstance(slot.value(), nn.Parameter)]
        new = new if self._keeps_state else [slot for slot in new if is_generator(slot.value())]
        found = [(slot, _differs(slot, value, starts[0])) for slot, value in zip(starts[0].slots, starts[0].values, strict=True)]
        found += [(slot, slot.value() is not value or _checksum(value) != before) for slot, value, before in self._by_checksum]
        quiet = [slot for slot, differs in found if not differs]
        room, small = _SMALL, list[_Slot]()
        for slot in sorted(quiet, key=lambda s: self._bytes_of(s.value())):
            room -= self._bytes_of(slot.value())
            if room < 0:
                break
            small.append(slot)
        self._writers = [*new, *(slot for slot, differs in found if differs), *small] if self._keeps_state else []
        self._generators += [slot for slot in (*new, *self._writers) if is_generator(slot.value())]
        self._quiet = {slot.address for slot in small if isinstance(slot.value(), Tensor) and slot.value().device.type == "cpu"}
        self._watch([slot for slot in quiet if slot not in small and isinstance(slot.value(), Tensor)])
        self._searching, self._compared, self._by_checksum = False, [], []
        copied = {slot.address for slot in self._writers}
        for kept in self._pool:
            kept.slots = ()
            for address in kept.by_address.keys() - copied:
                del kept.by_address[address]
        for start in starts:  # only what is written is put back: memory may be read-only, as that of a mapped file
            start.contents = {address: pair for address, pair in start.contents.items() if address in copied}
        if self._keeps_state:
            starts[0].slots += new
            starts[0].values += [_ABSENT] * len(new)

    def _watch(self, slots: Sequence[_Slot]) -> None:
        self._watched = [(slot, slot.value(), _version_of(slot.value())) for slot in slots]

    def _slots(self) -> Iterator[_Slot]:
        """All state to be looked at, each tensor once."""
        seen: set[int] = set()
        for module in self._modules:
            for slot in _slots_of(module):
                value = slot.value()
                if not isinstance(value, Tensor):
                    yield slot
                elif id(value) not in seen and not is_lazy(value) and value.device.type != "meta":
                    seen.add(id(value))
                    yield _Slot(slot.holder, slot.key, value) if is_sharded(value) else slot

    def _copies_contents_of(self, tensor: Tensor) -> bool:
        """Whether the contents of ``tensor`` are copied: they can be, and are nobody else's."""
        if not _can_be_written(tensor):
            return False
        if self._memory is None:  # made once a step, and only for models that have state
            self._memory = _Ranges(local_shards(self._trainable))
        return not self._memory.overlap(tensor)

    def _bytes_of(self, value: object) -> int:
        if not isinstance(value, Tensor) or not self._copies_contents_of(value):
            return 0
        (shard,) = local_shards([value])
        return shard.numel() * shard.element_size()


def _slots_of(module: nn.Module) -> Iterator[_Slot]:
    """The buffers, frozen parameters and attributes of one module."""
    if isinstance(module, torch.jit.ScriptModule):
        named = (*module.named_buffers(recurse=False), *module.named_parameters(recurse=False))
        yield from (_Slot(vars(module), name, value) for name, value in named if not value.requires_grad)
        return
    yield from (_Slot(module._buffers, key) for key in [*module._buffers])
    yield from (_Slot(module._parameters, key) for key, p in [*module._parameters.items()] if p is not None and not p.requires_grad)
    # FSDP2 derives a class of its own from that of each module it wraps, which is the one that counts.
    origin = next(cls.__module__ for cls in type(module).__mro__ if cls is nn.Module or not cls.__module__.startswith(_WRAPPERS))
    if origin == nn.Module.__module__ and type(module).__module__.startswith(_WRAPPERS):
        return
    layer = origin.startswith("torch.nn.modules")  # of PyTorch's own layers, which change no numbers and names of theirs in a forward pass
    for key, value in [*vars(module).items()]:
        if key not in _OWN and not isinstance(value, nn.Module) and (not layer or isinstance(value, Tensor) or is_generator(value)):
            yield _Slot(vars(module), key)


class _Ranges:
    """The memory of some tensors, as ranges of addresses."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        ranges = sorted(filter(None, map(_range_of, tensors)))
        self._starts = [start for start, _ in ranges]
        self._ends = list(accumulate((end for _, end in ranges), max))  # the furthest end so far: ranges may be nested

    def overlap(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` lies in any of them."""
        if is_sharded(tensor) or (found := _range_of(tensor)) is None:
            return False
        before = bisect_right(self._starts, found[1] - 1)
        return before > 0 and self._ends[before - 1] > found[0]


def _range_of(tensor: Tensor) -> tuple[int, int] | None:
    """The addresses from the first element to behind the last; None where there is no such memory."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.numel() == 0 or tensor.device.type == "meta":
        return None
    start, size = tensor.data_ptr(), tensor.element_size()
    if tensor.is_contiguous():
        return start, start + tensor.numel() * size
    return start, start + (1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))) * size


def _can_be_written(tensor: Tensor) -> bool:
    """Whether the contents of ``tensor`` can be copied: not of a graph's results, of inference tensors, special layouts and views."""
    if tensor.grad_fn is not None or tensor.is_inference() or tensor.layout is not torch.strided or tensor.is_nested:
        return False
    if tensor.is_conj() or tensor.is_neg():
        return False
    return not any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _same(tensor: Tensor, copy: Tensor) -> bool:
    try:
        return torch.equal(tensor, copy)
    except (RuntimeError, NotImplementedError):  # a dtype without comparisons
        return False


def _once(values: Iterable[Any]) -> list[Any]:
    """``values`` without repetitions, by identity."""
    return list({id(value): value for value in values}.values())


def _version_of(tensor: Tensor) -> tuple[int, int]:
    """What tells that a tensor was written in place, or given other memory; nothing tells of writes through ``.data``."""
    return -1 if tensor.is_inference() else tensor._version, tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else 0


def _differs(slot: _Slot, before: object, start: Snapshot) -> bool:
    """Whether ``slot`` holds another object than ``before``, or that object other contents than at ``start``."""
    if slot.value() is not before:
        return True
    return slot.address in start.contents and not _same(*start.contents[slot.address])


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


def _copy(contents: Contents) -> None:
    for tensors, copies in _alike(contents.values()):
        torch._foreach_copy_(copies, tensors)


def _alike(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Pairs of tensors as two lists for each dtype and device, which is the form that ``torch._foreach`` operations need."""
    groups: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for a, b in pairs:
        ours, theirs = groups.setdefault((a.dtype, a.device), ([], []))
        ours.append(a)
        theirs.append(b)
    return list(groups.values())
