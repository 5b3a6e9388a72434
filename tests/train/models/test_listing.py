"""``gradreg models``: what it lists, within 80 columns, and its errors."""

from __future__ import annotations

import pytest
import timm

from gradreg import cli
from gradreg.train.models import OURS, listing


def lines(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_without_a_pattern_ours_are_listed_and_timms_counted(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["models"]) == 0
    shown = lines(capsys)
    assert [line.split()[0] for line in shown[2:-1]] == list(OURS)
    assert all(len(line) <= 80 for line in shown)
    assert f"timm has {len(set(timm.list_models()) - set(OURS))} more" in shown[-1]


def test_a_pattern_lists_ours_first_then_timms(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["models", "RESNET18*"]) == 0
    rows = [line.split() for line in lines(capsys)[2:]]
    assert rows[0] == ["resnet18_cifar", "11,173,962", "3", "x", "32", "x", "32"]
    assert ["resnet18", "11,689,512", "3", "x", "224", "x", "224"] in rows


@pytest.mark.slow
def test_our_parameters_are_those_that_are_counted():
    assert list(listing.PARAMETERS) == list(OURS)
    assert {name: listing.describe(name).parameters for name in OURS} == listing.PARAMETERS


def test_part_of_a_name_will_do():
    assert listing.matching("wrn") == ["wrn16_4", "wrn28_10", "wrn40_10"]
    assert listing.matching("vit_*_patch4_32") == [name for name in OURS if name.startswith("vit_")]
    assert listing.matching("wrn28_10") == ["wrn28_10"]


def test_the_longest_name_fits_80_columns():
    longest = max(timm.list_models(), key=len)
    assert sum(map(len, listing.Row(longest, 7_000_000_000, (3, 1024, 1024)).cells())) + 3 * 2 <= 80


def test_a_model_without_a_known_size_leaves_the_column_empty():
    assert listing.Row("x", 1, None).cells() == ("x", "1", "")


def test_a_pattern_that_matches_nothing_names_the_nearest(capsys):
    assert cli.main(["models", "wm28_10"]) == 2
    assert "unknown model or pattern 'wm28_10'. Did you mean 'wrn28_10'?" in capsys.readouterr().err
