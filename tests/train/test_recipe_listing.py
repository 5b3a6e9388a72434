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
    lines = [line.rstrip() for line in shown]
    assert "  gradreg compare digits-noisy-labels" in lines
    assert "  gradreg compare wideresnet-cifar --data.root DATA" in lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs: 3\nbatch_size: 300", "mlp on digits, 3 epochs of 4 steps"),
        (
            "data: {name: cifar10, validation: 5000}\nmodel: {name: wrn28_10}\nvariants: {none: {}, sam: {penalty: {name: sam}}}",
            "wrn28_10 on cifar10, 60 epochs of 450 steps; variants none, sam",
        ),
        (
            "data: {name: mnist}\nvariants: {a: {}, b: {}, c: {}, d: {}, e: {}, f: {}, g: {}, h: {}}",
            "mlp on mnist, 60 epochs of 600 steps; variants a, b, c, d, e, f and 2 more",
        ),
    ],
)
def test_the_outline_names_model_data_length_and_the_first_variants(text, expected):
    assert recipe_listing.outline(recipe.parse_recipe("r", text)) == expected


def test_descriptions_are_cut_after_a_sentence_and_not_after_an_abbreviation():
    assert recipe_listing.first_sentence("SAM of Foret et al. 2021. Published:\n97 %.") == "SAM of Foret et al. 2021."
    assert recipe_listing.first_sentence("no full stop") == "no full stop"
    assert recipe_listing.first_sentence("") == ""


@pytest.mark.parametrize(("variants", "expected"), [({}, "gradreg train r"), ({"none": {}, "sam": {}}, "gradreg compare r")])
def test_a_recipe_without_variants_is_trained(variants, expected):
    assert recipe_listing.command(recipe.Recipe(name="r", description="", base={}, variants=variants)) == expected


def test_words_that_it_does_not_take_are_refused(capsys):
    assert cli.main(["recipes", "digits"]) == 2
    assert "gradreg: error: unrecognized arguments: digits (gradreg recipes --help" in capsys.readouterr().err
