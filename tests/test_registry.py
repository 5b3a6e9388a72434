"""The names that recipes use are in the table of docs/recipes.md, with the symbols and defaults of their constructors."""

import inspect
import re
from pathlib import Path

import pytest

import gradreg
from gradreg.registry import CONSTRUCTORS

RECIPES = Path(__file__).parents[1] / "docs" / "recipes.md"


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_name_is_documented_and_public(name: str) -> None:
    row = re.search(rf"^\| `{name}` \| (.*?) \|", RECIPES.read_text(), flags=re.MULTILINE)
    assert row is not None
    symbols = inspect.signature(CONSTRUCTORS[name]).parameters.values()
    assert row[1] == ", ".join(f"`{s.name}`" if s.default is s.empty else f"`{s.name}: {str(s.default).lower()}`" for s in symbols)
    assert getattr(gradreg, name) is CONSTRUCTORS[name]
    assert name in gradreg.__all__
