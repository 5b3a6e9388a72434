"""The random numbers that forward passes draw: the states of their generators, so that all passes of a step draw the same numbers."""

from __future__ import annotations

import ctypes
import random
import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch


class RandomSources:
    """Python's, NumPy's and torch's global generators, of the CPU and of the given devices, and generators that modules hold.

    NumPy's is included once something has imported NumPy.

    Args:
        devices: where parameters are.
        generators: ``torch.Generator``, ``numpy.random.Generator``, ``numpy.random.RandomState`` or ``random.Random`` objects.
    """

    def __init__(self, devices: Iterable[torch.device], generators: Sequence[Any] = ()) -> None:
        self._devices = sorted({d for d in devices if d.type not in ("cpu", "meta")}, key=str)
        self.generators = generators
        self._python = _Python()
        self._numpy = _NumPy() if "numpy" in sys.modules else None

    def note_use(self, before: list[Any]) -> None:
        """Determine which sources an evaluation drew from, whose states before it were ``before`` (from ``capture``)."""
        if self._numpy is not None:
            self._numpy.note_use(before[3])

    def capture(self) -> list[Any]:
        """The states of all sources."""
        return [
            torch.default_generator.get_state(),
            [torch.get_device_module(d).get_rng_state(d) for d in self._devices],
            self._python.capture(),
            None if self._numpy is None else self._numpy.capture(),
            [_state_of(generator) for generator in self.generators],
        ]

    def restore(self, states: list[Any]) -> None:
        """Restore what ``capture`` returned."""
        cpu, devices, python, numpy, generators = states
        torch.default_generator.set_state(cpu)
        for device, state in zip(self._devices, devices, strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
        self._python.restore(python)
        if self._numpy is not None:
            self._numpy.restore(numpy)
        for generator, state in zip(self.generators, generators, strict=True):
            _set_state_of(generator, state)


class _Python:
    """Python's global generator.

    ``random.getstate()`` and ``setstate()`` handle 625 numbers each, which together take a fifth of what a step of a small network costs
    beyond its passes. A copy of the memory of the words takes a microsecond. Where they lie is checked against ``getstate()`` first;
    where they lie elsewhere (another interpreter), or other threads may draw during the copy (no global lock), the whole state is captured.
    """

    _WORDS = 624

    def __init__(self) -> None:
        self._generator: Any = getattr(random.getstate, "__self__", None)  # what the functions of ``random`` are methods of
        self._memory: Any = None
        after_header, size = object.__basicsize__, 4 * (1 + self._WORDS)
        locked = getattr(sys, "_is_gil_enabled", lambda: True)()
        if sys.implementation.name == "cpython" and locked and type(self._generator).__basicsize__ >= after_header + size:
            self._memory = (ctypes.c_char * size).from_address(id(self._generator) + after_header)
            if self._state(self.capture()) != random.getstate():
                self._memory = None

    def capture(self) -> Any:
        return random.getstate() if self._memory is None else (self._memory.raw, self._generator.gauss_next)

    def restore(self, state: Any) -> None:
        if self._memory is None:
            random.setstate(state)
        elif self.capture() != state:
            random.setstate(self._state(state))

    def _state(self, captured: tuple[bytes, float | None]) -> tuple[Any, ...]:
        """What ``random.setstate`` takes: its version, the words and the position in them, and the second of a pair of normal numbers."""
        memory, gauss = captured
        position, *words = array("I", memory)
        return random.Random.VERSION, (*words, position), gauss


class _NumPy:
    """NumPy's global generator.

    Getting or setting its state takes a tenth of a millisecond. Until a model draws from it, a copy of the memory of its words, which takes
    a microsecond, is enough to detect a draw. The first draw is replayed from that copy, which lacks the second number of a pair of normal
    ones that the generator may hold; from then on the whole state is captured.
    """

    _SIZE = 624 * 4 + 4
    """Bytes of ``mt19937_state``: its words and the position in them."""

    def __init__(self) -> None:
        self._random = sys.modules["numpy"].random
        self._used = True
        self._bits: Any = None
        self._memory: Any = None

    def note_use(self, before: Any) -> None:
        if isinstance(before, bytes):
            self._used = self._memory.raw != before
            return
        self._bits = self._random.get_bit_generator() if hasattr(self._random, "get_bit_generator") else None
        known = type(self._bits).__name__ == "MT19937"
        if known:
            self._memory = (ctypes.c_char * self._SIZE).from_address(self._bits.ctypes.state_address)
        now = self._random.get_state(legacy=False)
        self._used = not (known and _flat(before) == _flat(now))

    def capture(self) -> Any:
        if self._used or self._random.get_bit_generator() is not self._bits:
            return self._random.get_state(legacy=False)
        return self._memory.raw

    def restore(self, state: Any) -> None:
        if not isinstance(state, bytes):
            self._random.set_state(state)
        elif self._memory.raw != state:
            self._memory.raw = state
            self._used = True


def _flat(state: dict[str, Any]) -> tuple[Any, ...]:
    """A state of NumPy's global generator in a comparable form."""
    return state["state"]["key"].tobytes(), state["state"]["pos"], state["has_gauss"], state["gauss"]


def is_generator(value: object) -> bool:
    """Whether ``value`` is a generator whose state can be captured."""
    if isinstance(value, (torch.Generator, random.Random)):
        return not isinstance(value, random.SystemRandom)
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state(legacy=False)


def _set_state_of(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
