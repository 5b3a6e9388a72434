"""Every method that both gradreg and pytorch_optimizer have: time, memory, and what it computes, side by side.

    python benchmarks/peers.py --seconds 60 --out benchmarks/results/peers

Time and memory as in step_cost.py: one process, a random order in each round, medians of the ratio to two plain passes within the
round; memory at the peak of a first step over plain training. A step is an average one: a round goes through all steps of LookSAM's period.

What is computed: ten steps of SGD with momentum on a small network in float64, by gradreg, by pytorch_optimizer, and by the paper's
formulas written out (tests/torch/twins.py); the largest difference of a weight from the paper's, relative to the largest change of a
weight. A note says where theirs computes something else.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gradreg
import steps
from gradreg import GradientPenalty
from memory import peak_bytes
from models import Workload
from reporting import signature
from rounds import lasting, ratio_quartiles
from steps import SGD, Build, Loss, Update
from tests.torch import twins

RHO, ETA, GAP, GAMMA, PERIOD, REUSED, SIGMA, DECAY = 0.1, 0.01, 0.4, 0.8, 5, 0.7, 1.0, 0.9
AGREES = 1e-5


@dataclass(frozen=True)
class Method:
    """One method three times.

    Args:
        ours: the penalty.
        theirs: given a model, the function that takes a training step with a closure for the loss.
        paper: the gradient of step t and what it remembers, from a loss, parameters, t and what was remembered.
        beside: what is subtracted beside the optimizer, times the learning rate.
        note: where theirs computes something else.
    """

    ours: GradientPenalty
    theirs: Build
    paper: Callable[[twins.Loss, twins.Parameters, int, Any], tuple[twins.Parameters, Any]]
    beside: Callable[[twins.Loss, twins.Parameters], twins.Parameters] | None = None
    note: str = ""


def two_steps(name: str, **options: Any) -> Build:
    """Their optimizers of two steps, used as their documentation shows."""

    def build(model: nn.Module) -> Update:
        import pytorch_optimizer

        kind = getattr(pytorch_optimizer, name)
        arguments = (model, model.parameters(), torch.optim.SGD) if name == "WSAM" else (model.parameters(), torch.optim.SGD)
        optimizer = kind(*arguments, **options, **SGD)

        def update(loss: Loss) -> None:
            def closure() -> Tensor:
                optimizer.zero_grad()
                value = loss()
                value.backward()
                return value

            if name != "WSAM":  # whose step evaluates the first gradient itself
                closure()
            optimizer.step(closure)

        return update

    return build


def surrogate_gap(model: nn.Module) -> Update:
    from pytorch_optimizer import GSAM

    class Radius:
        def step(self) -> float:
            return RHO

    base = torch.optim.SGD(model.parameters(), **SGD)
    optimizer = GSAM(model.parameters(), base, model, Radius(), alpha=GAP)

    def update(loss: Loss) -> None:
        def closure() -> tuple[None, Tensor]:
            base.zero_grad()
            with torch.enable_grad():
                value = loss()
            value.backward()
            return None, value.detach()

        optimizer.step(closure)  # type: ignore[arg-type]  # it wants the outputs beside the loss

    return update


def without_memory(gradient: Callable[[twins.Loss, twins.Parameters], twins.Parameters]) -> Any:
    return lambda loss, theta, step, memory: (gradient(loss, theta), memory)


def sharpness(loss: twins.Loss, theta: twins.Parameters) -> twins.Parameters:
    there, here = twins.sam(loss, theta, RHO), grad(loss)(theta)
    return twins.scaled(GAMMA / (1 - GAMMA), twins.total(there, twins.scaled(-1.0, here)))


def friendly(loss: twins.Loss, theta: twins.Parameters, step: int, m: Any) -> tuple[twins.Parameters, twins.Parameters]:
    return twins.friendly(loss, theta, m or twins.scaled(0.0, theta), RHO, SIGMA, DECAY)


METHODS: dict[str, Method] = {
    "SAM": Method(gradreg.sam(rho=RHO), two_steps("SAM", rho=RHO), without_memory(lambda f, at: twins.sam(f, at, RHO))),
    "ASAM": Method(
        gradreg.asam(rho=RHO, eta=ETA),
        two_steps("SAM", rho=RHO, adaptive=True),
        without_memory(lambda f, at: twins.asam(f, at, RHO, ETA, [n for n, v in at.items() if v.dim() > 1])),
        note="T = \\|θ\\|, without η, for biases and normalization layers too",
    ),
    "GSAM": Method(gradreg.gsam(rho=RHO, a=GAP), surrogate_gap, without_memory(lambda f, at: twins.gsam(f, at, RHO, GAP))),
    "WSAM, coupled": Method(
        gradreg.wsam(rho=RHO, gamma=GAMMA),
        two_steps("WSAM", rho=RHO, gamma=GAMMA, decouple=False),
        without_memory(lambda f, at: twins.gnp(f, at, RHO, GAMMA / (1 - GAMMA))),
    ),
    "WSAM, decoupled": Method(
        gradreg.wsam(rho=RHO, gamma=GAMMA, decoupled=True),
        two_steps("WSAM", rho=RHO, gamma=GAMMA, decouple=True),
        without_memory(lambda f, at: grad(f)(at)),
        sharpness,
    ),
    "LookSAM, k = 5": Method(
        gradreg.looksam(rho=RHO, k=PERIOD, a=REUSED),
        two_steps("LookSAM", rho=RHO, k=PERIOD, alpha=REUSED),
        lambda f, at, t, g_v: twins.looksam(f, at, t, g_v, RHO, PERIOD, REUSED),
        note="projects and rescales each tensor for itself; its step runs two passes always",
    ),
    "Friendly SAM": Method(
        gradreg.friendly_sam(rho=RHO, sigma=SIGMA, beta=DECAY),
        two_steps("FriendlySAM", rho=RHO, sigma=SIGMA, lmbda=DECAY),
        friendly,
        note="the average begins at the first gradient, and is updated after it is subtracted, as in the authors' code",
    ),
}


def builds() -> dict[str, Build]:
    """Everything that is timed, by name."""
    found: dict[str, Build] = {"plain": partial(steps.plain, passes=1), "two": partial(steps.plain, passes=2)}
    for name, method in METHODS.items():
        found[f"{name}: gradreg"] = partial(steps.regularized, penalty=method.ours)
        found[f"{name}: pytorch_optimizer"] = method.theirs
    return found


def differences(count: int = 2 * PERIOD) -> dict[str, dict[str, float]]:
    """How far gradreg and pytorch_optimizer end from the papers after ``count`` steps, relative to the way the weights went."""
    found: dict[str, dict[str, float]] = {}
    for name, method in METHODS.items():
        ends = {}
        for who, build in (("gradreg", partial(steps.regularized, penalty=method.ours)), ("pytorch_optimizer", method.theirs)):
            model = small_network()
            start, update = twins.parameters_of(model), build(model)
            for step in range(count):
                x, y = small_batch(step)
                update(lambda model=model, x=x, y=y: nn.functional.mse_loss(model(x), y))
            ends[who] = twins.parameters_of(model)
        paper = by_the_paper(method, count)
        way = max(float((paper[n] - start[n]).abs().max()) for n in paper)
        found[name] = {who: max(float((end[n] - paper[n]).abs().max()) for n in paper) / way for who, end in ends.items()}
    return found


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def small_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(8, n, dtype=torch.float64, generator=generator) for n in (3, 2))
    return x, 2 * y


def by_the_paper(method: Method, count: int) -> twins.Parameters:
    model, memory = small_network(), None
    theta = twins.parameters_of(model)
    momentum = twins.scaled(0.0, theta)
    for step in range(count):
        loss = twins.loss_of(model, *small_batch(step))
        beside = None if method.beside is None else method.beside(loss, theta)
        gradient, memory = method.paper(loss, theta, step, memory)
        momentum = twins.total(twins.scaled(SGD["momentum"], momentum), gradient)
        theta = twins.plus(theta, -SGD["lr"], momentum)
        theta = theta if beside is None else twins.plus(theta, -SGD["lr"], beside)
    return theta


def measure(workload: Workload, device: torch.device, budget: float, clock: steps.Clock) -> dict[str, dict[str, Any]]:
    """Medians of the ratio to "two" of whole periods, and the memory of a first step over plain training in sizes of the parameters."""
    running, peaks = {}, {}
    for name, build in builds().items():
        model, step = steps.step_of(workload, build, device)
        peaks[name] = peak_bytes(step, device) / steps.size_of(model)
        running[name] = steps.step_of(workload, build, device)[1]
        running[name]()
    rounds = (None for _ in lasting(budget, least=3) for _ in range(PERIOD))
    times = {name: averages(own) for name, own in steps.times(running, device, clock, rounds).items()}
    return {
        name: {
            "milliseconds": round(1000 * statistics.median(own), 2),
            "ratio_to_two": round(ratio_quartiles(own, times["two"])[1], 3),
            "memory_over_plain": round(peaks[name] - peaks["plain"], 3),
            "periods": len(own),
        }
        for name, own in times.items()
    }


def averages(seconds: list[float]) -> list[float]:
    """The mean of each period."""
    return [statistics.mean(seconds[i : i + PERIOD]) for i in range(0, len(seconds), PERIOD)]


def table(results: dict[str, Any]) -> str:
    lines = []
    for model in results["models"].values():
        measured = model["methods"]
        lines += [f"{model['description']} ({measured['two']['periods']} periods of {PERIOD} steps)", ""]
        lines += ["| method | time: gradreg | pytorch_optimizer | memory: gradreg | pytorch_optimizer |", "|---|---|---|---|---|"]
        for name in METHODS:
            pair = [measured[f"{name}: {who}"] for who in ("gradreg", "pytorch_optimizer")]
            cells = [f"{m['ratio_to_two']:.2f}" for m in pair] + [f"{m['memory_over_plain']:.2f}" for m in pair]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["| method | gradreg from the paper | pytorch_optimizer from the paper | what theirs computes |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        far = results["differences"][name]
        note = "the same" if far["pytorch_optimizer"] < AGREES else method.note
        lines.append(f"| {name} | {far['gradreg']:.0e} | {far['pytorch_optimizer']:.0e} | {note} |")
    notes = (
        f"Time: {results['clock']} clock, median ratio to two plain passes. Memory: extra bytes at the peak of a first step over plain "
        "training, in sizes of the parameters. Difference: of the weights after two periods in float64, relative to the way they went; "
        "pytorch_optimizer takes its norms in float32.\n\n"
        f"{signature(results, 'torch', 'pytorch_optimizer')}"
    )
    return "\n".join(lines) + "\n\n" + notes + "\n"


def correctness() -> dict[str, Any]:
    found = differences()
    unexplained = [name for name, far in found.items() if far["pytorch_optimizer"] >= AGREES and not METHODS[name].note]
    if unexplained:
        print(f"theirs differs from the paper without a note: {', '.join(unexplained)}", file=sys.stderr)
    return {"differences": found}


if __name__ == "__main__":
    steps.run(
        __doc__,
        least="3 periods",
        packages=("torch", "timm", "pytorch_optimizer"),
        measure=measure,
        table=table,
        beside=correctness,
    )
