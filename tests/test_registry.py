"""The names that recipes use are public names of gradreg."""

import pytest

import gradreg
from gradreg.registry import CONSTRUCTORS


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_name_is_public(name: str) -> None:
    assert getattr(gradreg, name) is CONSTRUCTORS[name]
    assert name in gradreg.__all__
