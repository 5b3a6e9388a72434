"""Every kind of penalty that the specification can express, for the contracts that both engines keep."""

import pytest

import gradreg
from gradreg import GradientPenalty

# Radii are large enough that a missing, reversed or rescaled perturbation changes every digit of the answer.
PENALTIES: dict[str, GradientPenalty] = {
    "sam": gradreg.sam(rho=0.3),
    "gnp": gradreg.gnp(r=0.3, alpha=0.8),
    "gnp-extrapolating": gradreg.gnp(r=0.3, alpha=1.5),
    "gnp-unit": gradreg.gnp(r=0.3, alpha=0.8, mixing="unit"),
    "norm-backward": GradientPenalty(power=1, strength=0.2, radius=0.3, difference="backward"),
    "norm-central": GradientPenalty(power=1, strength=0.2, radius=0.3, difference="central"),
    "fgr": gradreg.fgr(gamma=0.4, epsilon=0.4),
    "fgr-mixing": gradreg.fgr(gamma=0.2, epsilon=0.5),
    "fgr-extrapolating": gradreg.fgr(gamma=0.5, epsilon=0.2),
    "bgr": gradreg.bgr(gamma=0.3, epsilon=0.4),
    "cgr": gradreg.cgr(gamma=0.3, epsilon=0.4),
    "exact": gradreg.exact(gamma=0.3),
    "exact-norm": gradreg.exact(gamma=0.3, power=1),
    "sam-zero-warm-up": gradreg.sam(rho=0.3).warmup("zero", steps=3),
    "gnp-radius-warm-up": gradreg.gnp(r=gradreg.Cosine(start=0.2, end=0.1, steps=9), alpha=0.8).warmup("radius", steps=3),
    "fgr-strength-warm-up": gradreg.fgr(gamma=0.3, epsilon=0.4).warmup("strength", steps=3),
    "fgr-log-time": gradreg.fgr(gamma=gradreg.LogTime(value=0.4, t0=2), epsilon=0.5),
    "exact-zero-warm-up": gradreg.exact(gamma=0.3).warmup("zero", steps=3),
}

every_penalty = pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
