"""The code of docs/extending.md runs: a direction from a user's own file, in each engine."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gradreg
from gradreg import Direction, GradientPenalty
from gradreg.registry import CONSTRUCTORS

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
ENGINES = {"JAX": "jax", "PyTorch": "torch"}
"""Sections of the page, and the framework that their code needs."""


def blocks(section: str) -> list[str]:
    """The Python code of one section."""
    found = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert found is not None
    return re.findall(r"^```python\n(.*?)^```", found[1], flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def page() -> Iterator[dict[str, Any]]:
    """The names that the page has defined once its specification has run; what it registers is forgotten afterwards."""
    names: dict[str, Any] = {"__name__": "extending"}
    for code in blocks("The specification"):
        exec(code, names)
    yield names
    del Direction.kinds["sign"], CONSTRUCTORS["sign_sam"]


def test_the_specification(page: dict[str, Any]) -> None:
    penalty = page["sign_sam"](rho=0.1)
    assert penalty == GradientPenalty.from_dict({"name": "sign_sam", "rho": 0.1}) == GradientPenalty.from_dict(penalty.to_dict())
    assert str(penalty) == "SAM(rho 0.1), direction sign of the gradient"
    assert penalty.evaluations_at(0) == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine(engine: str, page: dict[str, Any]) -> None:
    """The page's own assertion holds."""
    pytest.importorskip(ENGINES[engine])
    code = blocks(engine)
    assert "assert" in code[-1]
    for block in code:
        exec(block, page)


def test_parts_that_are_not_known(page: dict[str, Any]) -> None:
    pytest.importorskip("jax")
    from gradreg.jax import value_and_grad

    for block in blocks("Parts that an engine does not know"):
        exec(block, page)
    penalty = GradientPenalty(power=1, strength=0.1, radius=0.1, direction=page["Steeper"]())
    with pytest.raises(TypeError, match=r"^direction must be one that the JAX engine knows; got Steeper\("):
        value_and_grad(lambda p: p, penalty)
    assert isinstance(penalty.direction, gradreg.Adaptive)
