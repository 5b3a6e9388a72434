"""Every wrong value of a penalty fails at construction, in the symbols its user wrote, with the rule, the value and the remedy."""

import math

import pytest

from gradreg import Constant, GradientPenalty, LossEquated, Ramp, bgr, exact, fgr, gnp, le_sam, mup2_sam, sam, unified_sam

REMEDY = "Use penalty=None to train without one"


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: sam(rho=-0.05), ValueError, f"^rho must be finite and > 0; got -0.05. {REMEDY}"),
        (lambda: sam(rho=0), ValueError, f"^rho must be finite and > 0; got 0. {REMEDY}"),
        (lambda: sam(rho=math.nan), ValueError, "^rho must be a number > 0 and finite; got nan"),
        (lambda: sam(rho=math.inf), ValueError, "^rho must be a number > 0 and finite; got inf"),
        (lambda: sam(rho="0.05"), TypeError, r"^rho must be a number > 0; got '0.05' \(str\). Remove the quotes"),
        (lambda: sam(rho="1e-3"), TypeError, r"in YAML write exponents with a dot and a sign, as in 1.0e-3"),
        (lambda: sam(rho=True), TypeError, r"^rho must be a number > 0; got True \(bool\)"),
        (lambda: sam(rho=None), TypeError, r"^rho must be a number > 0; got None \(NoneType\)"),
        (lambda: sam(rho=lambda step: 0.1), TypeError, "^rho must be a number or a gradreg Schedule"),
        (lambda: sam(rho=Ramp(start=-0.1, end=0.1, steps=3)), ValueError, r"^rho must be >= 0 at every step.*spans \[-0.1, 0.1\]"),
        (lambda: sam(rho=Constant(value=0.0)), ValueError, "^rho must be >= 0 at every step, and not 0 at all of them"),
        (lambda: sam(0.05), TypeError, r"^sam takes its symbols by name; got 1 without. Write sam\(rho=..., steps=...\)"),
        (lambda: sam(ro=0.05), ValueError, "^unknown key of sam: 'ro'. Did you mean 'rho'"),
        (lambda: gnp(alpha=0.8), TypeError, r"^gnp needs r; got only alpha=0.8. Write r=..., alpha=..."),
        (gnp, TypeError, "^gnp needs r and alpha; got only nothing"),
        (lambda: gnp(r=0.1, alpha=-1), ValueError, f"^alpha must be finite and >= 0; got -1. {REMEDY}"),
        (lambda: gnp(r=0.1, alpha=0.8, mixing="units"), ValueError, "^unknown mixing 'units'. Did you mean 'unit'"),
        (lambda: fgr(gamma=-1, epsilon=0.1), ValueError, "^gamma must be finite and >= 0; got -1"),
        (lambda: fgr(gamma=0.1, epsilon=-0.1), ValueError, "^epsilon must be finite and > 0; got -0.1"),
        (lambda: fgr(gamma=0.1), TypeError, "^fgr needs epsilon; got only gamma=0.1"),
        (lambda: bgr(gamma=0.1, epsilon=math.nan), ValueError, "^epsilon must be a number > 0 and finite; got nan"),
        (lambda: le_sam(sigma=-1), ValueError, f"^sigma must be finite and > 0; got -1. {REMEDY}"),
        (lambda: le_sam(sigma=0.3, rho_max=0), ValueError, "^rho_max must be finite and > 0; got 0. Use a large number for no cap"),
        (lambda: unified_sam(rho=0.1, lam=1.5), ValueError, r"^lam must be in \[0, 1\]; got 1.5"),
        (lambda: unified_sam(rho=0.1, lam="1-t"), ValueError, "^unknown lam '1-t'. Did you mean '1-1/t'"),
        (lambda: mup2_sam(rho=0.1, layout="in_out"), ValueError, "^unknown layout 'in_out'. Did you mean 'in-out'"),
        (
            lambda: GradientPenalty(power=1, strength=0.1, radius=0.1, direction=LossEquated()),
            ValueError,
            r"^direction=loss-equated\(rho_max 0.3\) must go with power 2, because it sets its own length; got power 1. Use le_sam\(",
        ),
        (lambda: exact(gamma=0.1, power=3), ValueError, r"^power must be 1 \(penalise the norm\) or 2"),
        (lambda: exact(gamma=0.1).warmup("radius", steps=3), ValueError, "^warm-up 'radius' needs a finite-difference radius"),
        (lambda: sam().warmup("sero", steps=3), ValueError, "^unknown warm-up 'sero'. Did you mean 'zero'"),
        (lambda: sam().warmup("zero", steps=0), ValueError, "^steps must be >= 1; got 0"),
        (
            lambda: GradientPenalty(power=1, strength=0.1, radius=None),
            ValueError,
            "^radius must be a number > 0 for difference='forward'; got None",
        ),
        (
            lambda: GradientPenalty(power=1, strength=0.1, radius=0.1, difference="exact"),
            ValueError,
            "^radius must be None for difference='exact'.*got 0.1",
        ),
        (
            lambda: GradientPenalty(power=1, strength=0.1, radius=0.1, difference="foward"),
            ValueError,
            "^unknown difference 'foward'. Did you mean 'forward'",
        ),
        (
            lambda: GradientPenalty(power=2, strength=0.1, radius=0.1, mixing="unit"),
            ValueError,
            r"^mixing='unit' must go with power 1, the forward difference and the gradient itself.*got power 2.*Use gnp\(",
        ),
        (lambda: GradientPenalty(power=True, strength=0.1, radius=0.1), ValueError, r"^power must be 1 .* got True \(bool\)"),
    ],
)
def test_construction(build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"name": "ASAM", "rho": 0.1}, ValueError, "^unknown penalty 'ASAM'. Did you mean 'asam'"),
        ({"name": "samm", "rho": 0.1}, ValueError, "^unknown penalty 'samm'. Did you mean 'sam'. Known: sam, gnp, fgr, bgr, cgr, exact"),
        ({"name": "sam", "rhoo": 0.1}, ValueError, "^unknown key of penalty 'sam': 'rhoo'. Did you mean 'rho'"),
        ({"name": "gnp", "alpha": 0.8}, TypeError, "^penalty 'gnp' needs r; got only alpha=0.8"),
        ({"name": "sam", "rho": -1}, ValueError, "^rho must be finite and > 0; got -1"),
        ({"name": "sam", "rho": [0.1]}, TypeError, r"^rho must be a number > 0; got \[0.1\] \(list\)"),
        ({"name": "sam", "rho": {"schedule": "rampp", "steps": 3}}, ValueError, "^unknown schedule 'rampp'. Did you mean 'ramp'"),
        ({"name": "sam", "warmup": {"knd": "zero", "steps": 3}}, ValueError, "^unknown key of warmup: 'knd'. Did you mean 'kind'"),
        ({"name": "sam", "warmup": {"kind": "zero"}}, TypeError, "^warmup needs steps; got only kind='zero'"),
        ({"name": "sam", "warmup": 3}, TypeError, "^warmup must be a mapping with the keys kind and steps; got 3"),
        ({"name": ["sam"]}, ValueError, "^unknown penalty"),
        ({"strenght": 0.1, "power": 1, "radius": 0.1}, ValueError, "'strenght'. Did you mean 'strength'"),
        ({}, TypeError, "^a penalty without a name needs power and strength and radius; got only nothing"),
        ("sam", TypeError, r"^a penalty must be a mapping such as {name: sam, rho: 0.05}; got 'sam' \(str\)"),
        (None, TypeError, "^a penalty must be a mapping"),
    ],
)
def test_dictionaries(data, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GradientPenalty.from_dict(data)


def test_a_radius_of_zero_is_refused_where_the_strength_is_not() -> None:
    penalty = fgr(gamma=0.1, epsilon=Ramp(steps=5))
    with pytest.raises(ValueError, match=r"radius must be > 0 wherever the strength is; got radius 0 and strength 0.1 at step 0"):
        penalty.coefficient_at(0)
    assert penalty.coefficient_at(5) == pytest.approx(0.1)
