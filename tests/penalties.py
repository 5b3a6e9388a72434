"""Every kind of penalty that the specification can express, for the contracts that both engines keep."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

import gradreg
from gradreg import Adaptive, ClipEach, Clipped, EmaDirection, Friendly, GradientPenalty, LossEquated, SurrogateGap, Unified

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
    "asam": gradreg.asam(rho=0.6, eta=0.1),
    "asam-everywhere": GradientPenalty(power=1, strength=0.3, radius=0.6, direction=Adaptive(eta=0.2, one_dimensional=True)),
    "adaptive-central": GradientPenalty(power=2, strength=0.3, radius=0.4, difference="central", direction=Adaptive(eta=0.5)),
    "layerwise": gradreg.layerwise_sam(rho=0.4, eta=0.1),
    "loss-equated": gradreg.le_sam(sigma=0.5, rho_max=9.0),
    "capped-central": GradientPenalty(power=2, strength=0.1, radius=0.4, difference="central", direction=LossEquated(rho_max=0.1)),
    "unified": gradreg.unified_sam(rho=0.3),
    "unified-backward": GradientPenalty(power=2, strength=0.2, radius=0.3, difference="backward", direction=Unified(lam=0.5)),
    "fan-scaled": gradreg.mup2_sam(rho=0.4, layout="out-in"),
    "friendly": gradreg.friendly_sam(rho=0.3, sigma=0.7, beta=0.6),
    "friendly-mixing": GradientPenalty(power=2, strength=0.2, radius=0.5, difference="backward", direction=Friendly(sigma=0.7, beta=0.6)),
    "remembered": gradreg.remembered(epsilon=0.3, decay=0.4),
    "remembered-mixing": GradientPenalty(power=2, strength=0.2, radius=0.3, direction=EmaDirection(decay=0.4)),
    "msam": gradreg.msam(rho=0.3, decay=0.8),
    "random": gradreg.random_sam(rho=0.5, seed=1),
    "sparse-fisher": gradreg.sam(rho=0.5).sparse(0.4, every=5),
    "adaptive-sparse-fisher": gradreg.asam(rho=0.6, eta=0.1).sparse(0.4, every=5),
    "sparse-random": gradreg.gnp(r=0.5, alpha=0.8).sparse(0.4, choice="random", every=5),
    "sam-3-steps": gradreg.sam(rho=0.5, steps=3),
    "fgr-2-steps": gradreg.fgr(gamma=0.2, epsilon=0.5, steps=2),
    "gsam": gradreg.gsam(rho=0.3, a=0.4),
    "gap-central": GradientPenalty(power=2, strength=0.3, radius=0.4, difference="central", mixing=SurrogateGap(a=0.3)),
    "gap-remembered": GradientPenalty(power=2, strength=0.3, radius=0.3, mixing=SurrogateGap(a=0.3), direction=EmaDirection(decay=0.4)),
    "wsam-decoupled": gradreg.wsam(rho=0.3, gamma=0.6, decoupled=True),
    "looksam": gradreg.looksam(rho=0.4, k=2, a=0.7),
    "fgr-clipped": gradreg.fgr(gamma=0.2, epsilon=0.5, clip=0.3),
    "backward-clipped": GradientPenalty(
        power=2, strength=0.3, radius=0.4, difference="backward", direction=Clipped(max_norm=0.4), mixing=ClipEach(max_norm=0.2)
    ),
    "sam-every-2": gradreg.sam(rho=0.3).every(2),
    "gnp-every-2-compensated": gradreg.gnp(r=0.3, alpha=0.4).every(2, compensate=True),
    "sam-by-chance": gradreg.sam(rho=0.3).with_probability(0.7, seed=30),
}

every_penalty = pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)


def traits(penalty: GradientPenalty) -> set[object]:
    """What sets a step of ``penalty`` apart from another's, numbers aside: its passes, its parts, and whether it may rest."""
    direction, mask, plan = penalty.direction, penalty.mask, penalty.plan(penalty.at(50))
    return {
        (plan.exact, *((p.offset, p.of, p.gives_direction, p.keeps) for p in plan.passes)),
        ("power", penalty.power),
        (
            type(direction),
            getattr(direction, "scale", None),
            getattr(direction, "ahead", None),
            getattr(direction, "one_dimensional", None),
            isinstance(getattr(direction, "lam", None), str),
        ),
        (type(mask), getattr(mask, "choice", None)),
        type(penalty.mixing),
        ("reuse", penalty.reuse is not None),
        ("decoupled", penalty.decoupled),
        ("rests", penalty.difference == "exact", any(not penalty.at(step).acts for step in range(1, 50))),
    }


def of_each_trait() -> dict[str, GradientPenalty]:
    """Few penalties that together have all the traits that any has."""
    found = {name: traits(penalty) for name, penalty in PENALTIES.items()}
    missing = set[object]().union(*found.values())
    chosen: dict[str, GradientPenalty] = {}
    while missing:
        name = max(found, key=lambda name: len(found[name] & missing))
        chosen[name] = PENALTIES[name]
        missing -= found[name]
    return chosen


OF_EACH_TRAIT = of_each_trait()

each_trait = pytest.mark.parametrize("penalty", OF_EACH_TRAIT.values(), ids=OF_EACH_TRAIT)
"""For contracts that are multiplied with other factors: every plan and every part, but not every product of them."""


def sampled(every: Iterable[Any], sample: Collection[Any]) -> list[Any]:
    """``every`` value, or tuple of them, as parameters of a test: those in ``sample`` always, the others under ``--soak``."""
    values = list(every)
    missing = set(sample) - set(values)
    assert not missing, missing
    marks = {value: () if value in sample else pytest.mark.soak for value in values}
    parts = {value: value if isinstance(value, tuple) else (value,) for value in values}
    return [pytest.param(*parts[value], id="-".join(map(str, parts[value])), marks=marks[value]) for value in values]
