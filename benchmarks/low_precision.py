"""What remains of a perturbation when the parameters are stored in, or cast to, 16 bits.

Parameters N(0, 0.02²) and a Gaussian direction d of norm ``radius``, in float32. The effective perturbation is what the network sees:
bf16(θ + d) − θ for parameters kept in 16 bits (θ itself representable), cast(θ + d) − cast(θ) for float32 parameters under autocast.
For each radius: its cosine with d, its norm relative to d, and the share of coordinates that do not move.

    python benchmarks/low_precision.py --out benchmarks/results/low_precision
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reporting import command, environment, report, signature
from tables import markdown


def nearest(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).float()


def stochastic(x: Tensor) -> Tensor:
    """bf16 by unbiased stochastic rounding: random bits added below the ones that stay."""
    bits = x.view(torch.int32)
    noise = torch.randint_like(bits, 0, 1 << 16)
    return ((bits + noise) & ~0xFFFF).view(torch.float32)


def effective(kind: str, theta: Tensor, d: Tensor) -> Tensor:
    if kind == "bf16, rounded to nearest (what the engine does)":
        theta = theta.bfloat16().float()
        return nearest(torch.bfloat16)(theta + d) - theta
    if kind == "bf16, rounded stochastically":
        theta = theta.bfloat16().float()
        return stochastic(theta + d) - theta
    if kind == "fp16":
        theta = theta.half().float()
        return nearest(torch.float16)(theta + d) - theta
    if kind == "fp32, bf16 autocast":
        return nearest(torch.bfloat16)(theta + d) - nearest(torch.bfloat16)(theta)
    if kind == "fp32, fp16 autocast":
        return nearest(torch.float16)(theta + d) - nearest(torch.float16)(theta)
    return (theta + d) - theta


KINDS = (
    "fp32, fp32",
    "fp32, fp16 autocast",
    "fp32, bf16 autocast",
    "fp16",
    "bf16, rounded to nearest (what the engine does)",
    "bf16, rounded stochastically",
)
"""How parameters are stored, and computed with."""


def measure(parameters: int, radii: list[float]) -> dict[str, list[dict[str, float]]]:
    """Kind -> for each radius the cosine, the relative norm, and the share of unperturbed coordinates."""
    torch.manual_seed(0)
    theta = 0.02 * torch.randn(parameters)
    unit = torch.nn.functional.normalize(torch.randn(parameters), dim=0)
    found: dict[str, list[dict[str, float]]] = {}
    for kind in KINDS:
        for radius in radii:
            d = radius * unit
            e = effective(kind, theta, d).double()
            norm = float(e.norm())
            cosine = float(e @ d.double()) / max(norm * radius, 1e-300)
            one = {"radius": radius, "cosine": cosine, "norm": norm / radius, "unperturbed": float((e == 0).double().mean())}
            found.setdefault(kind, []).append(one)
    return found


def table(results: dict[str, Any]) -> str:
    kinds = results["kinds"]
    radii = [f"{one['radius']:g}" for one in kinds[KINDS[0]]]
    rows = [[kind, *(f"{o['cosine']:.3f} / {o['norm']:.2f} / {o['unperturbed']:.0%}" for o in row)] for kind, row in kinds.items()]
    header = ("stored, computed", f"radius {radii[0]}", *radii[1:])
    return f"{markdown(header, rows)}\n\n{results['parameters']:,} parameters. {signature(results, 'torch')}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--radius", type=float, nargs="+", default=[0.05, 0.2, 1.0, 5.0])
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md beside printing the table")
    options = parser.parse_args()
    results: dict[str, Any] = {"command": command(), "environment": environment(("torch",)), "parameters": options.parameters}
    results["kinds"] = measure(options.parameters, options.radius)
    report(results, table(results), options.out)


if __name__ == "__main__":
    main()
