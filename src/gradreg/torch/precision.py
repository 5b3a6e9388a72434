"""Parameters in 16 bits: which they are, and what rounding leaves of a perturbation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)

_FAITHFUL = 0.9
"""The cosine between the perturbation asked for and the one left by rounding, below which a user should hear of it."""


def warn_of_rounding(before: Sequence[Tensor], after: Sequence[Tensor], gradients: Sequence[Tensor], step: float | Tensor) -> None:
    """Warn if ``after − before``, for the parameters in 16 bits, is far from ``step·G``. Reads values: called once, at the first step.

    Rounding to the nearest, which the move does once and from float32, keeps more of a small perturbation than stochastic rounding does
    (``benchmarks/low_precision.py``); nothing finer fits between two neighbouring numbers.
    """
    moved = asked = along = 0.0
    for old, new, gradient in zip(before, after, gradients, strict=True):
        if old.dtype in LOW_PRECISION:
            effective, wanted = (new.double() - old.double()).flatten(), (gradient.double() * step).flatten()
            moved += float(effective @ effective)
            asked += float(wanted @ wanted)
            along += float(effective @ wanted)
    if not 0.0 < asked < float("inf"):
        return
    cosine = along / (moved * asked) ** 0.5 if moved > 0 else 0.0
    if cosine < _FAITHFUL:
        names = " and ".join(sorted({str(t.dtype).removeprefix("torch.") for t in before if t.dtype in LOW_PRECISION}))
        warnings.warn(
            f"{names} parameters round the perturbation: its cosine with the one asked for is {cosine:.2f} and its norm "
            f"{(moved / asked) ** 0.5:.2f} of it. Keep the parameters in float32 and compute under autocast, or raise the radius at "
            "the same strength, as in gnp(r=4 * rho, alpha=0.25) for sam(rho=rho).",
            stacklevel=6,
        )
