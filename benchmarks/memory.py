"""What the allocator of PyTorch hands out during a call, and what glibc's does with what is freed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that ``call`` holds above what was allocated before it, temporaries within operations included."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    allocations: list[tuple[int, int]] = []
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == _EventType.Allocation:
            fields: Any = event.extra_fields  # of an allocation
            allocations.append((event.start_time_ns, fields.alloc_size))
    held = peak = 0
    for _, size in sorted(allocations):
        held += size
        peak = max(peak, held)
    return peak


def keep_freed_memory() -> None:
    """No block of its own for a large allocation, and nothing handed back to the system: M_MMAP_MAX 0, M_TRIM_THRESHOLD the largest."""
    mallopt = ctypes.CDLL(None).mallopt
    if not (mallopt(-4, 0) and mallopt(-1, 2**31 - 1)):
        raise OSError("mallopt refused; leave --keep-freed-memory out on systems without glibc.")
