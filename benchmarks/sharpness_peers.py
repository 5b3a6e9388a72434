"""The largest eigenvalue of a Hessian, ours beside curvlinops and a plain power iteration: value, time and memory on a ResNet and a ViT.

All are asked for the same relative accuracy, each in its own way: our Lanczos by its error bound, curvlinops through SciPy's ``eigsh``, and
the power iteration (double backward, the graph kept, as PyHessian does it) by the change of its value in a step. ``reference`` is an
eigenvalue from our exact products in float64 to 1e-6. Rounds are interleaved, and times compared within a round.

    python benchmarks/sharpness_peers.py --seconds 60 --out sharpness_peers.json
"""

from __future__ import annotations

import argparse
import copy
import json
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
from rounds import interleaved, lasting

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
    """The eigenvalue of largest size: v ← Hv/‖Hv‖ until vᵀHv changes by less than ``tolerance`` of itself in a step."""
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
        if abs(value - before) <= tolerance * abs(value):
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


def candidates(case: Case, tolerance: float, *, attention: bool) -> dict[str, Callable[[], float]]:
    def ours(which: Case, **options: Any) -> Callable[[], float]:
        return lambda: float(sharpness.largest_eigenvalues(which.model, which.closure, tolerance=tolerance, **options))

    found: dict[str, Callable[[], float]] = {
        "gradreg, exact": ours(case, products="exact"),
        "gradreg, differences": ours(case, products="differences"),
        "curvlinops": lambda: curvlinops_eigenvalue(case, tolerance),
        "power iteration": lambda: power_iteration(case, tolerance),
    }
    if attention:
        found["gradreg, fused attention"] = ours(fused(case))
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
            row["peak_megabytes"] = peak_bytes(call, device) / 1e6
            working[what] = timed(call, device)
        except (RuntimeError, NotImplementedError, ImportError) as error:
            row["failed"] = str(error).splitlines()[0]
        rows.append(row)
    seconds = interleaved(working, lasting(arguments.seconds, least=arguments.rounds))
    fastest = min(map(statistics.median, seconds.values()))
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
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
    device = torch.device(arguments.device)
    rows: list[dict[str, Any]] = []
    for name, case in cases(device, arguments.batch).items():
        if name in arguments.models:
            rows += measure(name, case, arguments, device)
    print("| model | what | value | relative error | seconds | times the fastest | peak MB |\n|---|---|---|---|---|---|---|")
    for row in rows:
        if "failed" in row:
            print(f"| {row['model']} | {row['what']} | failed: {row['failed']} | | | | |")
            continue
        print(
            f"| {row['model']} | {row['what']} | {row['value']:.5g} | {row['error']:.1e} | {row['seconds']:.2f} | "
            f"{row['times_the_fastest']:.2f} | {row['peak_megabytes']:.0f} |"
        )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
