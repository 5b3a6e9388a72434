"""A part that the engine does not know is an error when the regularizer is built, never plain SAM."""

import pytest

from gradreg import GradientPenalty
from gradreg.torch import GradientRegularizer
from tests.unknown_parts import UNKNOWN

from .cases import tanh_problem


@pytest.mark.parametrize(("kind", "penalty"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_part_that_nobody_registered(kind: str, penalty: GradientPenalty) -> None:
    name = type(getattr(penalty, kind)).__name__
    with pytest.raises(TypeError, match=rf"(?i){kind}.*{name}"):
        GradientRegularizer(tanh_problem().model, penalty)
