"""The weights of the finite differences: what every one of them must sum to."""

import pytest

from gradreg.stencils import stencil


@pytest.mark.parametrize("difference", ["forward", "backward", "central"])
@pytest.mark.parametrize("c", [0.25, 1.0, 1.5])
def test_weights_sum_to_one_and_first_moments_to_c(difference, c: float) -> None:
    """A constant gradient comes back unchanged, and the slope along d enters c times."""
    points = stencil(difference, c)
    assert points.at_theta + sum(weight for _, weight in points.moved) == pytest.approx(1.0)
    assert sum(place * weight for place, weight in points.moved) == pytest.approx(c)


def test_central_has_no_second_moment() -> None:
    assert sum(place**2 * weight for place, weight in stencil("central", 0.8).moved) == 0.0


def test_exact_is_no_finite_difference() -> None:
    with pytest.raises(ValueError, match=r"difference must be 'forward', 'backward' or 'central'; got 'exact'"):
        stencil("exact", 1.0)
