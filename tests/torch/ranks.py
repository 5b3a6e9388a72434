"""Running functions in several processes joined by gloo. Starting processes is what costs, so several jobs share one start."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Job = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function of (rank, world, *arguments), defined at the top of a module, and the arguments."""


def run_ranks(world: int, jobs: Mapping[str, Job], folder: Path) -> dict[str, list[Any]]:
    """Each job in ``world`` processes; returns, by its name, what the ranks returned. A failure in any fails here, with its traceback."""
    context = mp.spawn(_rank, args=(world, dict(jobs), str(folder)), nprocs=world, join=False)
    assert context is not None
    while not context.join(timeout=120):
        pass
    results = [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world)]
    return {name: [r[name] for r in results] for name in jobs}


def _rank(rank: int, world: int, jobs: dict[str, Job], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        results = {}
        for name, (function, arguments) in jobs.items():
            results[name] = function(rank, world, *arguments)
            dist.barrier()
        torch.save(results, Path(folder) / f"result-{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
