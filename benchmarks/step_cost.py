"""Time and memory of one optimizer step: plain, two plain passes, gradreg's penalties and pytorch_optimizer's SAM, side by side.

    python benchmarks/step_cost.py --out benchmarks/results/step_cost

Every round runs one step of every method in a random order, each on its own copy of the model, in one process; the reported time of
a method is the median over rounds of its ratio to "two" in the same round, so that a machine whose speed drifts disturbs all alike. "two"
is two forward and backward passes with the gradients set to None in between and one optimizer step: the floor for a method of two passes.
"accumulating" is the same with gradients that add up, the floor for GNP and F-GR, whose result is a sum of two gradients. F-GR
does not need the norm of the gradient, which ``metrics`` tell all the same: "no norm" is without (``measure_norm=False``), as
``gradreg train`` runs it except for the last step of an epoch. "GNP by hand" is a loop with nothing but its arithmetic, the floor for ours.
``--clock processor`` counts the processor time of all threads instead of the wall clock's, for machines on which others work too.

``--keep-freed-memory`` tells glibc's allocator to keep what is freed, as PyTorch's own on a GPU and jemalloc do. By default it may hand a
large freed gradient back to the system and fault the same pages in again at the next step, for some methods and sizes and not for others.

Memory is what the allocator hands out: the peak of a first step less that of plain training, in sizes of the parameters, what stays for
later steps included. Where the first gradient is part of the result it is held through the second forward pass, as in gradient
accumulation: "memory over accumulation" compares with two plain passes whose gradients add up. On a CPU the peak is read from the
allocation events of torch.profiler, C++ temporaries included; on a GPU from torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import gradreg
import steps
from memory import peak_bytes
from models import Workload
from reporting import signature
from rounds import lasting, ratio_quartiles
from tables import markdown

OURS = {
    "SAM": gradreg.sam(rho=0.05),
    "GNP": gradreg.gnp(r=0.1, alpha=0.8),
    "F-GR": gradreg.fgr(gamma=0.05, epsilon=0.1),
    "exact": gradreg.exact(gamma=0.05),
}
ACCUMULATING = "accumulating"  # two plain passes whose gradients add up: the floor for a result that is a sum of two gradients


def their_sam(model: nn.Module) -> steps.Update:
    from pytorch_optimizer import SAM  # imported late: it is wanted for this method alone

    optimizer = SAM(model.parameters(), base_optimizer=torch.optim.SGD, rho=0.05, **steps.SGD)

    def update(loss: steps.Loss) -> None:
        loss().backward()
        optimizer.first_step(zero_grad=True)
        loss().backward()
        optimizer.second_step(zero_grad=True)

    return update


def by_hand(model: nn.Module, *, r: float, alpha: float) -> steps.Update:
    """GNP and nothing else: no state of a forward pass, no random numbers, nothing that an exception or another step might need."""
    optimizer = torch.optim.SGD(model.parameters(), **steps.SGD)
    parameters = list(model.parameters())
    copies: list[torch.Tensor] = []

    def update(loss: steps.Loss) -> None:
        ((1.0 - alpha) * loss()).backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))).item()
        with torch.no_grad():
            copies[:] = copies or [torch.empty_like(p) for p in parameters]
            for p, gradient, copy in zip(parameters, gradients, copies, strict=True):
                torch.add(p, gradient, alpha=r / norm, out=copy)
        originals = [p.data for p in parameters]
        for p, copy in zip(parameters, copies, strict=True):
            p.data = copy
        (alpha * loss()).backward()
        for p, original in zip(parameters, originals, strict=True):
            p.data = original
        optimizer.step()
        optimizer.zero_grad()

    return update


METHODS: dict[str, steps.Build] = {
    "plain": partial(steps.plain, passes=1),
    "two": partial(steps.plain, passes=2),
    ACCUMULATING: partial(steps.plain, passes=2, accumulating=True),
    **{name: partial(steps.regularized, penalty=penalty) for name, penalty in OURS.items()},
    "F-GR, no norm": partial(steps.regularized, penalty=OURS["F-GR"], measure_norm=False),
    "pytorch_optimizer SAM": their_sam,
    "GNP by hand": partial(by_hand, r=0.1, alpha=0.8),
}


def runs(step: steps.Step) -> bool:
    """False where double backprop cannot run, as through fused attention."""
    try:
        step()
    except RuntimeError as error:
        if "twice differentiable" not in str(error):
            raise
        return False
    return True


def memory(workload: Workload, device: torch.device, methods: list[str]) -> dict[str, dict[str, float]]:
    """The peak of a first step, which allocates what stays (momentum, copies) as well, less that of plain training."""
    totals: dict[str, float] = {}
    for method in methods:
        model, step = steps.step_of(workload, METHODS[method], device)
        totals[method] = peak_bytes(step, device) / steps.size_of(model)
    return {method: {f"over_{base}": round(totals[method] - totals[base], 3) for base in ("plain", ACCUMULATING)} for method in methods}


def measure(workload: Workload, device: torch.device, budget: float, clock: steps.Clock) -> dict[str, dict[str, Any]]:
    """Of every method that runs: medians of the milliseconds and of the ratio to "two" within each round, and memory."""
    running = {method: steps.step_of(workload, build, device)[1] for method, build in METHODS.items()}
    running = {method: step for method, step in running.items() if runs(step)}
    for step in running.values():
        step()
    times = steps.times(running, device, clock, lasting(budget, least=5))
    extra = memory(workload, device, list(times))
    result = {}
    for method, own in times.items():
        low, middle, high = ratio_quartiles(own, times["two"])
        result[method] = {
            "milliseconds": round(1000 * statistics.median(own), 2),
            "ratio_to_two": round(middle, 3),
            "ratio_quartiles": [round(low, 3), round(high, 3)],
            "rounds": len(own),
            "extra_memory": extra[method],
        }
    return result


def table(results: dict[str, Any]) -> str:
    shown: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        ("time", lambda m: m["ratio_to_two"]),
        ("memory over plain", lambda m: m["extra_memory"]["over_plain"]),
        ("memory over accumulation", lambda m: m["extra_memory"][f"over_{ACCUMULATING}"]),
    )
    rows = [
        [
            f"{result['description']}: {what}",
            *(f"{value(result['methods'][method]):.2f}" if method in result["methods"] else "–" for method in METHODS),
        ]
        for what, value in shown
        for result in results["models"].values()
    ]
    allocator = ", allocator keeps freed memory" if results["keep_freed_memory"] else ""
    rounds = ", ".join(str(result["methods"]["two"]["rounds"]) for result in results["models"].values())
    notes = (
        f"Time: {results['clock']} clock, median over {rounds} rounds of the ratio to two plain passes. "
        "Memory: extra bytes at the peak of a step over plain training or gradient accumulation, in sizes of the parameters. "
        "–: not twice differentiable (fused attention).\n\n"
        f"{signature(results, 'torch', 'timm', 'pytorch_optimizer', setting=allocator)}"
    )
    return f"{markdown(['model', *METHODS], rows)}\n\n{notes}\n"


if __name__ == "__main__":
    steps.run(__doc__, least="5 rounds", packages=("torch", "timm", "pytorch_optimizer"), measure=measure, table=table)
