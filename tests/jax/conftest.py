"""Double precision for the tests that ask for it, and for no others; and which penalties this engine has."""

from collections.abc import Iterator

import jax
import pytest

from gradreg import Gradient, GradientPenalty
from tests.penalties import PENALTIES


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def supported(penalty: GradientPenalty) -> bool:
    """Whether ``value_and_grad`` takes ``penalty``; it refuses the others in words."""
    return (penalty.direction, penalty.mask, penalty.ascent_steps) == (Gradient(), None, 1) and isinstance(penalty.mixing, str)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The lists of penalties are those of both engines: leave out what this one does not have."""

    def penalty_of(item: pytest.Item) -> GradientPenalty | None:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        return parameters.get("penalty") or PENALTIES.get(parameters.get("name", ""))

    items[:] = [item for item in items if (penalty := penalty_of(item)) is None or supported(penalty)]
