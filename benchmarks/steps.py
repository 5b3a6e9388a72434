"""What the benchmarks of one optimizer step share: steps on the models of models.py, their time, their options and what is stored."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradreg import GradientPenalty
from gradreg.torch import GradientRegularizer
from memory import keep_freed_memory
from models import WORKLOADS, Workload
from reporting import command, environment, report
from rounds import CLOCKS, interleaved

Loss = Callable[[], Tensor]
Update = Callable[[Loss], None]
"""A training step of a model, given the closure of its loss."""
Build = Callable[[nn.Module], Update]
Step = Callable[[], None]
Clock = Callable[[], float]
SGD: dict[str, Any] = {"lr": 0.01, "momentum": 0.9}


def plain(model: nn.Module, *, passes: int, accumulating: bool = False) -> Update:
    """SGD after ``passes`` over the same loss, whose gradients add up or replace each other."""
    optimizer = torch.optim.SGD(model.parameters(), **SGD)

    def update(loss: Loss) -> None:
        for _ in range(passes):
            if not accumulating:
                optimizer.zero_grad()
            loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def regularized(model: nn.Module, *, penalty: GradientPenalty, measure_norm: bool = True) -> Update:
    """SGD with gradreg's ``penalty``; see ``GradientRegularizer`` for ``measure_norm``."""
    regularizer = GradientRegularizer(model, penalty, measure_norm=measure_norm)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)

    def update(loss: Loss) -> None:
        regularizer.backward(loss)
        optimizer.step()
        regularizer.decoupled_step(optimizer)
        optimizer.zero_grad()

    return update


def step_of(workload: Workload, build: Build, device: torch.device) -> tuple[nn.Module, Step]:
    """A fresh model, and a function that trains it for one step, always on the same batch."""
    torch.manual_seed(0)
    model = workload.build().to(device)
    x, y = workload.batch(device)
    criterion, update = nn.CrossEntropyLoss(), build(model)
    return model, lambda: update(lambda: criterion(model(x), y))


def size_of(model: nn.Module) -> int:
    """The bytes of its parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def times(steps: Mapping[str, Step], device: torch.device, clock: Clock, rounds: Iterable[object]) -> dict[str, list[float]]:
    """The seconds of each step in each round."""
    return interleaved({name: partial(_seconds, step, device, clock) for name, step in steps.items()}, rounds)


def _seconds(step: Step, device: torch.device, clock: Clock) -> float:
    start = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def run(
    description: str | None,
    *,
    least: str,
    packages: tuple[str, ...],
    measure: Callable[[Workload, torch.device, float, Clock], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    beside: Callable[[], dict[str, Any]] = dict,
) -> None:
    """The command of such a benchmark.

    Args:
        description: the documentation of the command.
        least: what is timed at least, in words.
        packages: whose versions are stored.
        measure: the methods' results, from a workload, the device, the seconds to spend and the clock.
        table: the text for all results.
        beside: what is stored beside the results of the models.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="which models to measure")
    parser.add_argument("--seconds", type=float, default=60.0, help=f"how long to time each model (at least {least})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of PyTorch")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what times are measured by")
    parser.add_argument("--keep-freed-memory", action="store_true", help="see step_cost.py")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md beside printing the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.keep_freed_memory:
        keep_freed_memory()
    warnings.filterwarnings("ignore", message="CUDA initialization")

    results: dict[str, Any] = {
        "command": command(),
        "clock": options.clock,
        "keep_freed_memory": options.keep_freed_memory,
        "environment": environment(packages, device),
        **beside(),
        "models": {},
    }
    for name in options.models:
        workload = WORKLOADS[name]
        methods = measure(workload, device, options.seconds, CLOCKS[options.clock])
        results["models"][name] = {"description": workload.description, "methods": methods}
        print(f"{workload.description}: done", file=sys.stderr)
    report(results, table(results), options.out)
