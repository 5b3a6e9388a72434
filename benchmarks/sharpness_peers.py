"""The largest eigenvalue of a Hessian, ours beside curvlinops, PyHessian's algorithm and hessian-eigenthings: value, time and memory.

On a ResNet and a ViT. All are asked for the same relative accuracy, each in its own way: our Lanczos by its error bound, curvlinops through
SciPy's ``eigsh``, PyHessian's algorithm (a power iteration by double backward, the graph kept; written here, since the package is no longer
kept up) by the change of its value in a step, hessian-eigenthings' Lanczos by its residual. That one is imported where it is installed; the
others need nothing more than ``.[dev]``. ``reference`` is an eigenvalue from our exact products in float64 to 1e-6. Rounds are
interleaved, and times compared within a round. "equal accuracy" says whether the value lies within ten tolerances of the reference: a
faster answer that does not is not the same answer.

    python benchmarks/sharpness_peers.py --seconds 60 --out benchmarks/results/sharpness_peers
    pip install --no-deps --target /tmp/peers hessian-eigenthings && PYTHONPATH=/tmp/peers python benchmarks/sharpness_peers.py
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from gradreg import sharpness
from memory import peak_bytes
from reporting import command, environment, report, signature
from rounds import interleaved, lasting
from tables import markdown

CRITERION = nn.CrossEntropyLoss()


@dataclass
class Case:
    """A model in eval mode, and a batch."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def closure(self) -> Tensor:
        return CRITERION(self.model(self.x), self.y)


def cases(device: torch.device, batch: int) -> dict[str, Case]:
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    models = {
        "resnet10t": timm.create_model("resnet10t", num_classes=10),
        "vit": timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=10),
    }
    for module in models["vit"].modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # exact products, and curvlinops, need attention that can be differentiated twice
    return {name: Case(model.eval().to(device), x.to(device), y.to(device)) for name, model in models.items()}


def fused(case: Case) -> Case:
    """The same model with PyTorch's fused attention."""
    model = copy.deepcopy(case.model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    return Case(model, case.x, case.y)


def power_iteration(case: Case, tolerance: float, limit: int = 300) -> float:
    """PyHessian's algorithm, for the eigenvalue of largest size: v ← Hv/‖Hv‖ until vᵀHv changes by less than ``tolerance`` of itself."""
    parameters = list(case.model.parameters())
    gradients = torch.autograd.grad(case.closure(), parameters, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in parameters]
    before = 0.0
    for _ in range(limit):
        length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(vector)))
        vector = list(torch._foreach_div(vector, length))
        product = torch.autograd.grad(gradients, parameters, vector, retain_graph=True)
        value = float(sum((p * v).sum() for p, v in zip(product, vector, strict=True)))
        if abs(value - before) < tolerance * (abs(before) + 1e-6):
            return value
        before, vector = value, list(product)
    return before


def curvlinops_eigenvalue(case: Case, tolerance: float) -> float:
    import numpy as np
    from curvlinops import HessianLinearOperator

    parameters = list(case.model.parameters())
    operator = HessianLinearOperator(case.model, CRITERION, parameters, [(case.x, case.y)], check_deterministic=False)
    start = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(np.float32)
    return float(eigsh(operator.to_scipy(), k=1, which="LA", tol=tolerance, v0=start, return_eigenvectors=False)[0])


def eigenthings_eigenvalue(case: Case, tolerance: float, *, method: str = "autograd") -> Callable[[], float]:
    """hessian-eigenthings' Lanczos, whose steps are fixed beforehand: the fewest of 10, 20, 40, ... that reach the tolerance.

    They are found in the first call, and its repeated calls are told them, which leaves out what finding them costs a user.
    ``method="finite_difference"`` is its road around fused attention.
    """
    steps = 10

    def measure() -> float:
        nonlocal steps
        from hessian_eigenthings import HessianOperator, lanczos, supervised_loss

        made: Any = HessianOperator(case.model, [(case.x, case.y)], supervised_loss(CRITERION), method=method)  # type: ignore[arg-type]
        while True:
            found = lanczos(made, k=1, which="LA", tol=tolerance, max_iter=steps, reorthogonalize=True, seed=0)
            if bool(found.converged.all()) or steps >= 320:
                return float(found.eigenvalues[0])
            steps *= 2

    return measure


def candidates(case: Case, tolerance: float, *, attention: bool) -> dict[str, Callable[[], float]]:
    def ours(which: Case, **options: Any) -> Callable[[], float]:
        return lambda: float(sharpness.largest_eigenvalues(which.model, which.closure, tolerance=tolerance, **options))

    found: dict[str, Callable[[], float]] = {
        "gradreg, exact": ours(case, products="exact"),
        "gradreg, differences": ours(case, products="differences"),
        "curvlinops": lambda: curvlinops_eigenvalue(case, tolerance),
        "PyHessian's algorithm": lambda: power_iteration(case, tolerance),
        "hessian-eigenthings": eigenthings_eigenvalue(case, tolerance),
    }
    if attention:
        found["gradreg, fused attention"] = ours(fused(case))
        found["hessian-eigenthings, fused attention"] = eigenthings_eigenvalue(fused(case), tolerance, method="finite_difference")
    return found


def timed(call: Callable[[], float], device: torch.device) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return run


def measure(name: str, case: Case, arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    twin = Case(copy.deepcopy(case.model).double(), case.x.double(), case.y)
    reference = float(sharpness.largest_eigenvalues(twin.model, twin.closure, tolerance=1e-6))
    rows: list[dict[str, Any]] = []
    working: dict[str, Callable[[], float]] = {}
    for what, call in candidates(case, arguments.tolerance, attention=name == "vit").items():
        row: dict[str, Any] = {"model": name, "what": what, "reference": reference}
        try:
            row["value"] = call()  # also warms up
            row["error"] = abs(row["value"] - reference) / abs(reference)
            row["equal_accuracy"] = row["error"] <= 10 * arguments.tolerance
            row["peak_megabytes"] = peak_bytes(call, device) / 1e6
            working[what] = timed(call, device)
        except (RuntimeError, NotImplementedError, ImportError, ValueError) as error:
            row["failed"] = str(error).splitlines()[0]
        rows.append(row)
    seconds = interleaved(working, lasting(arguments.seconds, least=arguments.rounds))
    equal = [row["what"] for row in rows if row.get("equal_accuracy")]
    fastest = min(statistics.median(seconds[what]) for what in equal or seconds)  # of those with the right answer
    for row in rows:
        if row["what"] in seconds:
            row["seconds"] = statistics.median(seconds[row["what"]])
            row["times_the_fastest"] = row["seconds"] / fastest
            row["rounds"] = len(seconds[row["what"]])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="of rounds for each model")
    parser.add_argument("--rounds", type=int, default=3, help="at least")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=["resnet10t", "vit"])
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
    device = torch.device(arguments.device)
    rows: list[dict[str, Any]] = []
    for name, case in cases(device, arguments.batch).items():
        if name in arguments.models:
            rows += measure(name, case, arguments, device)
    installed = ["timm", "curvlinops-for-pytorch"]
    installed += ["hessian-eigenthings"] if importlib.util.find_spec("hessian_eigenthings") is not None else []
    results = {"command": command(), "environment": environment(installed, device), "rows": rows}
    header = ("model", "what", "value", "relative error", "equal accuracy", "seconds", "times the fastest", "peak MB")
    text = "\n".join([markdown(header, [cells(row) for row in rows]), "", signature(results, *installed)]) + "\n"
    report(results, text, arguments.out)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in row:
        return (row["model"], row["what"], f"failed: {row['failed']}", *[""] * 5)
    return (
        row["model"],
        row["what"],
        f"{row['value']:.5g}",
        f"{row['error']:.1e}",
        "yes" if row["equal_accuracy"] else "no",
        f"{row['seconds']:.2f}",
        f"{row['times_the_fastest']:.2f}",
        f"{row['peak_megabytes']:.0f}",
    )


if __name__ == "__main__":
    main()
