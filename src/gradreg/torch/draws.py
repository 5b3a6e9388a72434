"""Random numbers for the coordinates of parameters, from ``gradreg.hashing``: the same on every rank, however tensors are sharded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from gradreg import hashing
from gradreg.torch.norms import is_sharded

_BLOCK = 1 << 17
"""How many words are hashed at a time on a CPU: half a megabyte, which stays in a cache from one operation to the next."""
_HIGHEST = -(1 << 31)
"""The highest bit of an int32 and no other."""
_ONE = 0x3F800000
"""1.0 in float32, of whose bits the highest is the sign."""


def signs(seed: int, counter: int, parameters: Iterable[tuple[int, Tensor]]) -> list[Tensor]:
    """+1 or −1 for each coordinate, in the dtype of the parameter: +1 where bit i mod 32 of word ⌊i/32⌋ is 1.

    A word is 32 random bits that depend on ``seed``, ``counter``, the parameter's index and the number of the word.

    Args:
        seed: a whole number ≥ 0.
        counter: a whole number ≥ 0, the step for example.
        parameters: pairs of a parameter's index in the model and the parameter; signs are drawn for this rank's shard.
    """
    found: list[Tensor] = []
    for key, p in _keyed(seed, counter, parameters):
        rows = held_rows(p)
        # A shard may start inside a word: hash whole words and skip the ``before`` bits that belong to other ranks.
        before = rows.first % 32
        count = -(-(before + prod(rows.shape)) // 32)
        words = _words(key, rows.first // 32, torch.arange(count, dtype=torch.int32, device=p.device))
        # Shift bit i of each word to the highest bit, the sign of a float. Inverted (bit 1 is +1) and combined with the bits of 1.0, it
        # is read as ±1.0 directly, without a comparison, a multiplication or an integer-to-float conversion of every coordinate.
        raised = words.unsqueeze(1) << torch.arange(31, -1, -1, dtype=torch.int32, device=p.device)
        drawn = raised.bitwise_not_().bitwise_and_(_HIGHEST).bitwise_or_(_ONE).view(torch.float32).view(-1)
        found.append(rows.held(drawn[before : before + prod(rows.shape)]).to(p.dtype))
    return found


def chosen(share: float, seed: int, counter: int, parameters: Iterable[tuple[int, Tensor]]) -> list[Tensor]:
    """Whether each coordinate is chosen, independently with probability ``share``: where its own word is below share·2³²."""
    bound = round(share * 2**32)
    found: list[Tensor] = []
    for key, p in _keyed(seed, counter, parameters):
        rows = held_rows(p)
        below = torch.ones(prod(rows.shape), dtype=torch.bool, device=p.device)
        if bound < 2**32:  # 2³² does not fit into 32 bits, and chooses all
            # In blocks on a CPU, so that the words of a block stay in cache through the dozen operations that make them.
            size = min(_BLOCK, len(below)) if p.device.type == "cpu" else len(below)
            numbers = torch.arange(size, dtype=torch.int32, device=p.device)
            for i, block in enumerate(below.split(max(1, size))):
                words = _words(key, rows.first + i * size, numbers[: len(block)])
                # With the highest bits flipped, signed numbers compare as unsigned ones. In place, then copied, because comparing
                # int32 into bool takes four times as long on a CPU.
                block.copy_(words.bitwise_xor_(_HIGHEST).lt_(bound + _HIGHEST))
        found.append(rows.held(below))
    return found


def _keyed(seed: int, counter: int, parameters: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """Each parameter with the seed of its words."""
    common = hashing.hashed(seed, counter)
    return ((hashing.hashed(common, index), p) for index, p in parameters)


def _words(key: int, first: int, numbers: Tensor) -> Tensor:
    """``hashing.hashed(key, first + i)`` for each i of ``numbers``, all int32.

    In place, because memory traffic is the cost. int32 sums and products equal those of unsigned numbers modulo 2³². A right shift does
    not: it copies the sign bit, so the bits that it shifts in are cleared.
    """
    words = numbers + _signed(hashing.masked(hashing.mixed(key) + first))
    spare = torch.empty_like(words)

    def fold(shift: int) -> None:
        torch.bitwise_right_shift(words, shift, out=spare)
        words.bitwise_xor_(spare.bitwise_and_((1 << (32 - shift)) - 1))

    for shift, factor in hashing.ROUNDS:
        fold(shift)
        words.mul_(_signed(factor))
    fold(hashing.LAST_SHIFT)
    return words


def _signed(word: int) -> int:
    """The number from −2³¹ that has the same 32 bits as ``word``, from 0 to 2³² − 1."""
    return (word ^ 0x80000000) + _HIGHEST


@dataclass(frozen=True)
class HeldRows:
    """Where this rank's shard lies in the whole tensor: in consecutive rows of its first dimension, of which it holds a part.

    Args:
        first: the index of the first row's first element in the whole flattened tensor.
        shape: of the rows, complete in every other dimension.
        part: which of their elements this rank holds.
    """

    first: int
    shape: tuple[int, ...]
    part: tuple[slice, ...]

    def held(self, rows: Tensor) -> Tensor:
        """The shard, from flattened values for all elements of the rows."""
        return rows.view(self.shape)[self.part].contiguous()


def held_rows(tensor: Tensor) -> HeldRows:
    """The rows of ``tensor``, all of them unless it is sharded, in which this rank's shard lies."""
    shape, offsets = tuple(tensor.shape), (0,) * tensor.dim()
    if is_sharded(tensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sharded = cast(Any, tensor)
        shape, offsets = compute_local_shape_and_global_offset(tensor.shape, sharded.device_mesh, sharded.placements)
    row = tuple(tensor.shape[1:])
    starts = enumerate(zip(offsets, shape, strict=True))
    part = tuple(slice(offset, offset + size) if dimension else slice(None) for dimension, (offset, size) in starts)
    return HeldRows(first=sum(offsets[:1]) * prod(row), shape=(*shape[:1], *row), part=part)
