"""A part that the engine does not know is an error when the function is built, never plain SAM."""

import pytest

from gradreg import GradientPenalty
from gradreg.jax import value_and_grad
from tests.unknown_parts import UNKNOWN


@pytest.mark.parametrize(("kind", "penalty"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_part_that_nobody_registered(kind: str, penalty: GradientPenalty) -> None:
    name = type(getattr(penalty, kind)).__name__
    with pytest.raises(TypeError, match=rf"(?i){kind}.*{name}"):
        value_and_grad(lambda params: (params**2).sum(), penalty)
