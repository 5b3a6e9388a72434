"""Time and memory of one optimizer step: plain, two plain passes, gradreg's penalties and pytorch_optimizer's SAM, side by side.

    python benchmarks/step_cost.py --out benchmarks/results/step_cost

Every round runs one step of every method in a random order, each on its own copy of the model, in one process; the reported time of
a method is the median over rounds of its ratio to "two" in the same round, so that a machine whose speed drifts disturbs all alike. "two" is
two forward and backward passes with the gradients set to None in between and one optimizer step: the floor for a method of two passes.

Memory is what the allocator hands out: the peak of a step above what the model, its gradients and the optimizer's state hold after plain
training, in units of the size of the parameters, counting what the method keeps between steps. On a CPU it is read from the allocation events of
torch.profiler, C++ temporaries included; on a GPU from torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

import gradreg
import torch
from gradreg.torch import GradientRegularizer
from models import WORKLOADS, Workload
from torch import nn

OURS = {
    "SAM": gradreg.sam(rho=0.05),
    "GNP": gradreg.gnp(r=0.1, alpha=0.8),
    "F-GR": gradreg.fgr(gamma=0.05, epsilon=0.1),
    "exact": gradreg.exact(gamma=0.05),
}
PEER = "pytorch_optimizer SAM"
METHODS = ("plain", "two", *OURS, PEER)
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
        optimizer.step()
        optimizer.zero_grad()

    return model, plain_step


def seconds(step: Step, device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


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


def measure_memory(workload: Workload, device: torch.device) -> dict[str, float]:
    """Peak of a step plus what the method keeps between steps, less the same of plain training, in sizes of the parameters."""
    totals: dict[str, float] = {}
    size = 1
    for method in METHODS:
        model, step = build_step(method, workload, device)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        # The first step allocates what stays (momentum, copies): its peak has everything, and nothing is missed by warming up.
        totals[method] = peak_bytes(step, device)
    return {method: round((total - totals["plain"]) / size, 3) for method, total in totals.items()}


def measure_time(workload: Workload, device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds, and median and quartiles of the ratio to "two" within each round."""
    steps = {method: build_step(method, workload, device)[1] for method in METHODS}
    order = list(METHODS)
    shuffle = random.Random(0).shuffle
    for step in steps.values():
        for _ in range(3):
            seconds(step, device)
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(rounds):
        shuffle(order)
        for method in order:
            times[method].append(seconds(steps[method], device))
    result = {}
    for method, own in times.items():
        ratios = [mine / two for mine, two in zip(own, times["two"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        result[method] = {
            "milliseconds": round(1000 * statistics.median(own), 2),
            "ratio_to_two": round(statistics.median(ratios), 3),
            "ratio_quartiles": [round(low, 3), round(high, 3)],
        }
    return result


def environment(device: torch.device) -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "gradreg": gradreg.__version__,
        **{package: importlib.metadata.version(package) for package in ("torch", "timm", "pytorch_optimizer")},
    }


def table(results: dict[str, Any]) -> str:
    lines = ["| model | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for what, key in (("time", "ratio_to_two"), ("memory", "extra_memory")):
        for name, result in results["models"].items():
            cells = [f"{result['methods'][method][key]:.2f}" for method in METHODS]
            lines.append(f"| {WORKLOADS[name].description}: {what} | " + " | ".join(cells) + " |")
    e = results["environment"]
    notes = (
        f"Time: median over {results['rounds']} rounds of the ratio to two plain passes. "
        "Memory: extra bytes at the peak of a step over plain training, in sizes of the parameters.\n"
        f"{e['device']}, {e['threads']} thread(s), torch {e['torch']}, timm {e['timm']}, pytorch_optimizer {e['pytorch_optimizer']}, {e['date']}.\n"
        f"`{results['command']}`"
    )
    return "\n".join(lines) + "\n\n" + notes + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="which models to measure")
    parser.add_argument("--rounds", type=int, default=60, help="rounds of one step of every method")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of PyTorch")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md beside printing the table")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds must be >= 2; got {options.rounds}.")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    warnings.filterwarnings("ignore", message="CUDA initialization")

    results: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/step_cost.py", *sys.argv[1:]]),
        "rounds": options.rounds,
        "environment": environment(device),
        "models": {},
    }
    for name in options.models:
        workload = WORKLOADS[name]
        methods: dict[str, dict[str, Any]] = dict(measure_time(workload, device, options.rounds))
        for method, extra in measure_memory(workload, device).items():
            methods[method]["extra_memory"] = extra
        results["models"][name] = {"description": workload.description, "methods": methods}
        print(f"{workload.description}: done", file=sys.stderr)
    text = table(results)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        options.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
