"""Every mutant can still be made: its text stands once in the source, and the tests that should notice exist."""

from __future__ import annotations

from pathlib import Path

import pytest

import gradreg

from .mutants import MUTANTS, Mutant

HERE = Path(__file__).parent
ENGINE = Path(gradreg.__file__).parent / "torch"


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_its_text_stands_once_and_its_tests_exist(mutant: Mutant) -> None:
    assert (ENGINE / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert mutant.new != mutant.old
    named = [HERE / word.split("::")[0] for word in mutant.tests if ".py" in word and not word.startswith("-")]
    assert all(file.exists() for file in named)


def test_no_two_have_a_name_in_common() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
