"""``gradreg recipes``: every shipped recipe, its first sentence and its command."""

from __future__ import annotations

import pytest

from gradreg import cli
from gradreg.train import recipe, recipe_listing


def test_every_shipped_recipe_is_listed_with_its_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["recipes"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert all(len(line.rstrip()) <= 80 for line in shown)
    assert [line.rstrip() for line in shown if not line.startswith(" ")] == recipe.shipped()
    assert "  gradreg compare digits-noisy-labels" in [line.rstrip() for line in shown]


def test_descriptions_are_cut_after_a_sentence_and_not_after_an_abbreviation():
    assert recipe_listing.first_sentence("SAM of Foret et al. 2021. Published:\n97 %.") == "SAM of Foret et al. 2021."
    assert recipe_listing.first_sentence("no full stop") == "no full stop"
    assert recipe_listing.first_sentence("") == ""


@pytest.mark.parametrize(("variants", "expected"), [({}, "gradreg train r"), ({"none": {}, "sam": {}}, "gradreg compare r")])
def test_a_recipe_without_variants_is_trained(variants, expected):
    assert recipe_listing.command(recipe.Recipe(name="r", description="", base={}, variants=variants)) == expected


def test_words_that_it_does_not_take_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["recipes", "digits"])
    assert "unrecognized arguments: digits" in capsys.readouterr().err
