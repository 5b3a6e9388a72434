"""What is searched, as it is written: ranges, choices, and what is neither."""

from __future__ import annotations

import pytest

from gradreg.study.search_space import as_range, describe, parse_search


@pytest.mark.parametrize(
    ("text", "kind", "low", "high", "log"),
    [
        ("log:1e-3:1", "Float", 1e-3, 1.0, True),
        ("0:0.5", "Float", 0.0, 0.5, False),
        ("16:256", "Int", 16, 256, False),
        ("log:8:512", "Int", 8, 512, True),
        ("-1.5:2", "Float", -1.5, 2.0, False),
    ],
)
def test_ranges_as_they_are_written(text: str, kind: str, low: float, high: float, log: bool) -> None:
    one = as_range("lr", text)
    assert type(one).__name__ == f"{kind}Distribution"
    assert (one.low, one.high, one.log) == (low, high, log)
    assert as_range("lr", describe(one)) == one


def test_choices_keep_their_kinds() -> None:
    assert as_range("x", "sgd|adamw|1|0.5|true").choices == ("sgd", "adamw", 1, 0.5, True)
    assert as_range("x", [None, "a"]).choices == (None, "a")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("1", "range or choices; got '1'"),
        ("1:2:3", "range or choices"),
        ("log:1", "range or choices"),
        ("a:b", "range or choices"),
        ("0:inf", "range or choices"),
        ("2:1", "must rise"),
        ("1:1", "must rise"),
        ("log:0:1", "above 0"),
        (3, "a range or a list of choices; got 3"),
        ([], "a range or a list of choices"),
    ],
)
def test_what_is_no_range(value: object, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        as_range("lr", value)


@pytest.mark.parametrize(
    ("texts", "told"), [(["lr"], "NAME=RANGE; got 'lr'"), (["lr=1:2", "lr=1:3"], "once; got 'lr'"), (["=1:2"], "NAME=RANGE")]
)
def test_a_search_that_cannot_be_read(texts: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_search(texts)
