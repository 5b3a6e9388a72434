"""A part that the engine does not know is an error when the function is built, never plain SAM."""

import pytest

import gradreg
from gradreg import GradientPenalty
from gradreg.jax import value_and_grad
from tests.unknown_parts import UNKNOWN


@pytest.mark.parametrize(("kind", "penalty"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_part_that_nobody_registered(kind: str, penalty: GradientPenalty) -> None:
    name = type(getattr(penalty, kind)).__name__
    with pytest.raises(TypeError, match=rf"(?i){kind}.*{name}"):
        value_and_grad(lambda params: (params**2).sum(), penalty)


def test_a_direction_for_frozen_weights_says_what_to_do_here() -> None:
    with pytest.raises(TypeError, match=r"direction must perturb parameters in JAX; got merged noise\(seed 0\), which perturbs the frozen"):
        value_and_grad(lambda params: (params**2).sum(), gradreg.flat_lora(sigma=0.1))
