"""Time and memory of one optimizer step: plain, two plain passes, gradreg's penalties and pytorch_optimizer's SAM, side by side.

    python benchmarks/step_cost.py --out benchmarks/results/step_cost

Every round runs one step of every method in a random order, each on its own copy of the model, in one process; the reported time of
a method is the median over rounds of its ratio to "two" in the same round, so that a machine whose speed drifts disturbs all alike. "two"
is two forward and backward passes with the gradients set to None in between and one optimizer step: the floor for a method of two passes.
``--clock processor`` counts the processor time of all threads instead of the wall clock's, for machines on which others work too.

``--keep-freed-memory`` tells glibc's allocator to keep what is freed, as PyTorch's own on a GPU and jemalloc do. By default it may hand a
large freed gradient back to the system and fault the same pages in again at the next step, for some methods and sizes and not for others.

Memory is what the allocator hands out: the peak of a first step less that of plain training, in sizes of the parameters, what stays for
later steps included. Where the first gradient is part of the result it is held through the second forward pass, as in gradient
accumulation: "memory over accumulation" compares with two plain passes whose gradients add up. On a CPU the peak is read from the
allocation events of torch.profiler, C++ temporaries included; on a GPU from torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

import gradreg
from gradreg.torch import GradientRegularizer
from models import WORKLOADS, Workload
from reporting import command, environment, report

OURS = {
    "SAM": gradreg.sam(rho=0.05),
    "GNP": gradreg.gnp(r=0.1, alpha=0.8),
    "F-GR": gradreg.fgr(gamma=0.05, epsilon=0.1),
    "exact": gradreg.exact(gamma=0.05),
}
PEER = "pytorch_optimizer SAM"
METHODS = ("plain", "two", *OURS, PEER)
ACCUMULATING = "accumulating"  # two plain passes whose gradients add up: measured for its memory
Step = Callable[[], None]


def build_step(method: str, workload: Workload, device: torch.device) -> tuple[nn.Module, Step]:
    """A fresh model and a function that trains it for one step by ``method``."""
    torch.manual_seed(0)
    model = workload.build().to(device)
    x, y = workload.batch(device)
    loss_function = nn.CrossEntropyLoss()
    sgd: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9}

    def closure() -> torch.Tensor:
        return loss_function(model(x), y)

    if method == PEER:
        from pytorch_optimizer import SAM  # imported late: it is wanted for this method alone

        peer = SAM(model.parameters(), base_optimizer=torch.optim.SGD, rho=0.05, **sgd)

        def peer_step() -> None:
            closure().backward()
            peer.first_step(zero_grad=True)
            closure().backward()
            peer.second_step(zero_grad=True)

        return model, peer_step

    optimizer = torch.optim.SGD(model.parameters(), **sgd)
    if method in OURS:
        regularizer = GradientRegularizer(model, OURS[method])

        def our_step() -> None:
            regularizer.backward(closure)
            optimizer.step()
            optimizer.zero_grad()

        return model, our_step

    def plain_step() -> None:
        closure().backward()
        if method == "two":
            optimizer.zero_grad()
            closure().backward()
        if method == ACCUMULATING:
            closure().backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, plain_step


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def seconds(step: Step, device: torch.device, clock: Callable[[], float]) -> float:
    start = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def keep_freed_memory() -> None:
    """No block of its own for a large allocation, and nothing handed back to the system: M_MMAP_MAX 0, M_TRIM_THRESHOLD the largest."""
    mallopt = ctypes.CDLL(None).mallopt
    if not (mallopt(-4, 0) and mallopt(-1, 2**31 - 1)):
        raise OSError("mallopt refused; leave --keep-freed-memory out on systems without glibc.")


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most that ``step`` holds above what was allocated before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    allocations: list[tuple[int, int]] = []
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == _EventType.Allocation:
            allocations.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = peak = 0
    for _, size in sorted(allocations):
        held += size
        peak = max(peak, held)
    return peak


def runs(step: Step) -> bool:
    """False where double backprop cannot run, as through fused attention."""
    try:
        step()
    except RuntimeError as error:
        if "twice differentiable" not in str(error):
            raise
        return False
    return True


def measure_memory(workload: Workload, device: torch.device, methods: list[str]) -> dict[str, dict[str, float]]:
    """The peak of a first step, which allocates what stays (momentum, copies) as well, less that of plain training."""
    totals: dict[str, float] = {}
    size = 1
    for method in [*methods, ACCUMULATING]:
        model, step = build_step(method, workload, device)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        totals[method] = peak_bytes(step, device)
    return {
        method: {f"over_{base}": round((totals[method] - totals[base]) / size, 3) for base in ("plain", ACCUMULATING)} for method in methods
    }


def measure_time(workload: Workload, device: torch.device, budget: float, clock: Callable[[], float]) -> dict[str, dict[str, Any]]:
    """Medians of the milliseconds and of the ratio to "two" within each round, from as many rounds as ``budget`` seconds allow."""
    steps = {}
    for method in METHODS:
        step = build_step(method, workload, device)[1]
        if runs(step):
            steps[method] = step
            step()
    order = list(steps)
    shuffle = random.Random(0).shuffle
    times: dict[str, list[float]] = {method: [] for method in order}
    start = time.perf_counter()
    while time.perf_counter() - start < budget or len(times["two"]) < 5:
        shuffle(order)
        for method in order:
            times[method].append(seconds(steps[method], device, clock))
    result = {}
    for method, own in times.items():
        ratios = [mine / two for mine, two in zip(own, times["two"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        result[method] = {
            "milliseconds": round(1000 * statistics.median(own), 2),
            "ratio_to_two": round(statistics.median(ratios), 3),
            "ratio_quartiles": [round(low, 3), round(high, 3)],
            "rounds": len(own),
        }
    return result


def table(results: dict[str, Any]) -> str:
    lines = ["| model | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    rows: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        ("time", lambda m: m["ratio_to_two"]),
        ("memory over plain", lambda m: m["extra_memory"]["over_plain"]),
        ("memory over accumulation", lambda m: m["extra_memory"][f"over_{ACCUMULATING}"]),
    )
    for what, value in rows:
        for name, result in results["models"].items():
            measured = result["methods"]
            cells = [f"{value(measured[method]):.2f}" if method in measured else "–" for method in METHODS]
            lines.append(f"| {WORKLOADS[name].description}: {what} | " + " | ".join(cells) + " |")
    e = results["environment"]
    allocator = ", allocator keeps freed memory" if results["keep_freed_memory"] else ""
    rounds = ", ".join(str(result["methods"]["two"]["rounds"]) for result in results["models"].values())
    notes = (
        f"Time: {results['clock']} clock, median over {rounds} rounds of the ratio to two plain passes. "
        "Memory: extra bytes at the peak of a step over plain training or gradient accumulation, in sizes of the parameters. "
        "–: not twice differentiable (fused attention).\n\n"
        f"{e['device']}, {e['threads']} thread(s){allocator}, torch {e['torch']}, timm {e['timm']}, pytorch_optimizer "
        f"{e['pytorch_optimizer']}, {e['date']}. `{results['command']}`"
    )
    return "\n".join(lines) + "\n\n" + notes + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="which models to measure")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to time each model (at least 5 rounds)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of PyTorch")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what times are measured by")
    parser.add_argument("--keep-freed-memory", action="store_true", help="see above")
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
        "environment": environment(("torch", "timm", "pytorch_optimizer"), device),
        "models": {},
    }
    for name in options.models:
        workload = WORKLOADS[name]
        methods = measure_time(workload, device, options.seconds, CLOCKS[options.clock])
        for method, extra in measure_memory(workload, device, list(methods)).items():
            methods[method]["extra_memory"] = extra
        results["models"][name] = {"description": workload.description, "methods": methods}
        print(f"{workload.description}: done", file=sys.stderr)
    report(results, table(results), options.out)


if __name__ == "__main__":
    main()
