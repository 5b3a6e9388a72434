"""The random numbers that forward passes draw: the states of their generators, so that all passes of a step draw the same numbers."""

from __future__ import annotations

import random
import sys
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
        self._generators = generators

    def capture(self) -> list[Any]:
        """The states of all sources."""
        numpy = sys.modules.get("numpy")
        return [
            torch.get_rng_state(),
            [torch.get_device_module(d).get_rng_state(d) for d in self._devices],
            random.getstate(),
            None if numpy is None else numpy.random.get_state(legacy=False),
            [_state_of(generator) for generator in self._generators],
        ]

    def restore(self, states: list[Any]) -> None:
        """Restore what ``capture`` returned."""
        cpu, devices, python, numpy, generators = states
        torch.set_rng_state(cpu)
        for device, state in zip(self._devices, devices, strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(python)
        if numpy is not None:
            sys.modules["numpy"].random.set_state(numpy)
        for generator, state in zip(self._generators, generators, strict=True):
            _set_state_of(generator, state)


def is_generator(value: object) -> bool:
    """Whether ``value`` is a generator whose state can be captured."""
    if isinstance(value, (torch.Generator, random.Random)):
        return True
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
