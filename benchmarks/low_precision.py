"""What remains of a perturbation when the parameters are stored in, or cast to, 16 bits.

Parameters N(0, 0.02²) and a Gaussian direction d of norm ``radius``, in float32. The effective perturbation is what the network sees:
bf16(θ + d) − θ for parameters kept in 16 bits (θ itself representable), cast(θ + d) − cast(θ) for float32 parameters under autocast.
Its cosine with d and its norm relative to d are printed, with the share of coordinates that do not move.

    python benchmarks/low_precision.py --parameters 10_000_000
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor


def nearest(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).float()


def stochastic(x: Tensor) -> Tensor:
    """bf16 by unbiased stochastic rounding: random bits added below the ones that stay."""
    bits = x.view(torch.int32)
    noise = torch.randint_like(bits, 0, 1 << 16)
    return ((bits + noise) & ~0xFFFF).view(torch.float32)


def effective(kind: str, theta: Tensor, d: Tensor) -> Tensor:
    if kind == "bf16 parameters":
        theta = theta.bfloat16().float()
        return nearest(torch.bfloat16)(theta + d) - theta
    if kind == "bf16 parameters, stochastic rounding":
        theta = theta.bfloat16().float()
        return stochastic(theta + d) - theta
    if kind == "fp16 parameters":
        theta = theta.half().float()
        return nearest(torch.float16)(theta + d) - theta
    if kind == "fp32 parameters, bf16 autocast":
        return nearest(torch.bfloat16)(theta + d) - nearest(torch.bfloat16)(theta)
    if kind == "fp32 parameters, fp16 autocast":
        return nearest(torch.float16)(theta + d) - nearest(torch.float16)(theta)
    return (theta + d) - theta


KINDS = (
    "fp32 parameters",
    "fp32 parameters, fp16 autocast",
    "fp32 parameters, bf16 autocast",
    "fp16 parameters",
    "bf16 parameters",
    "bf16 parameters, stochastic rounding",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--radius", type=float, nargs="+", default=[0.05, 0.2, 1.0, 5.0])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    theta = 0.02 * torch.randn(arguments.parameters)
    unit = torch.nn.functional.normalize(torch.randn(arguments.parameters), dim=0)
    print("| stored and used as | radius | cosine | norm / radius | unmoved |")
    print("|---|---|---|---|---|")
    for kind in KINDS:
        for radius in arguments.radius:
            d = radius * unit
            e = effective(kind, theta, d).double()
            norm = float(e.norm())
            cosine = float(e @ d.double()) / max(norm * radius, 1e-300)
            print(f"| {kind} | {radius:g} | {cosine:.3f} | {norm / radius:.2f} | {float((e == 0).double().mean()):.0%} |")


if __name__ == "__main__":
    main()
