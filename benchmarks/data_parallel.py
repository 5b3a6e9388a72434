"""Step time under ``DistributedDataParallel``: ours, against plain DDP with one and with two backward passes, in gloo processes.

The floor for a two-pass method with one all-reduce is a forward and backward pass without synchronisation and one with. Medians of
interleaved rounds; every variant takes its turn in each, so that a busy machine slows all of them.

    python benchmarks/data_parallel.py --processes 2 --rounds 30
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradreg
from gradreg.torch import GradientRegularizer
from rounds import interleaved


def variants(model: DistributedDataParallel, loss: Callable[[], Tensor]) -> dict[str, Callable[[], object]]:
    def plain() -> None:
        loss().backward()

    def unsynchronised_then_plain() -> None:
        with model.no_sync():
            loss().backward()
        loss().backward()

    def plain_twice() -> None:
        loss().backward()
        loss().backward()

    def ours(penalty: gradreg.GradientPenalty, scope: str) -> Callable[[], object]:
        regularizer = GradientRegularizer(model, penalty, scope=scope)  # type: ignore[arg-type]
        return lambda: regularizer.backward(loss)

    return {
        "plain, one pass": plain,
        "plain, two passes, one all-reduce": unsynchronised_then_plain,
        "plain, two passes, two all-reduces": plain_twice,
        "SAM, scope local": ours(gradreg.sam(rho=0.05), "local"),
        "SAM, scope global": ours(gradreg.sam(rho=0.05), "global"),
        "F-GR, scope local": ours(gradreg.fgr(gamma=0.1, epsilon=0.1), "local"),
    }


def work(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=arguments.processes)
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inside in [3072, *[arguments.width] * arguments.layers]:
        layers += [nn.Linear(inside, arguments.width), nn.ReLU()]
    model = DistributedDataParallel(nn.Sequential(*layers, nn.Linear(arguments.width, 10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(arguments.batch, 3072), torch.randint(0, 10, (arguments.batch,))
    steps = variants(model, lambda: nn.functional.cross_entropy(model(x), y))

    def timed(step: Callable[[], object]) -> float:
        dist.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        step()
        optimizer.step()
        return time.perf_counter() - start

    candidates = {name: partial(timed, step) for name, step in steps.items()}
    interleaved(candidates, range(3))  # warms up
    times = interleaved(candidates, range(arguments.rounds))  # in the same orders on all ranks
    if rank == 0:
        floor = statistics.median(times["plain, two passes, one all-reduce"])
        tensors = sum(1 for _ in model.parameters())
        print(f"{tensors} tensors, {sum(p.numel() for p in model.parameters()):,} parameters, batch {arguments.batch} a process")
        print("| step | ms | against two passes and one all-reduce |\n|---|---|---|")
        for name, found in times.items():
            print(f"| {name} | {1e3 * statistics.median(found):.1f} | {statistics.median(found) / floor:.2f} |")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(arguments, str(Path(folder))), nprocs=arguments.processes)


if __name__ == "__main__":
    main()
