"""What is searched, as it is written: ranges, choices, and what is neither; of each side, the strengths of penalties."""

from __future__ import annotations

from pathlib import Path

import pytest

import gradreg
from gradreg.registry import CONSTRUCTORS
from gradreg.study.functions import load_task
from gradreg.study.search_space import STRENGTHS, arms, as_range, describe, parse_search
from gradreg.study.tasks import Task
from tests.study.task_texts import LOOP, task_text


@pytest.fixture
def mine(tmp_path: Path) -> Task:
    file = tmp_path / "mine.py"
    file.write_text(task_text(LOOP, signature="run, *, lr: float = 0.05, width: int = 4"))
    return load_task(str(file))


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


# ---- of each side


def test_every_penalty_has_strengths_and_both_ends_build(mine: Task) -> None:
    assert set(STRENGTHS) == set(CONSTRUCTORS) - {"auto"}  # whose radius sets itself
    found = arms(mine, list(STRENGTHS), {})
    assert [arm.name for arm in found] == ["none", *STRENGTHS]
    assert not found[0].space
    assert all(arm.space for arm in found[1:])


def test_gamma_follows_epsilon_unless_it_is_given_or_searched(mine: Task) -> None:
    _, both, given, searched = arms(mine, ["fgr", "fgr:gamma=0.1", "fgr:epsilon=0.3"], {})
    assert both.variant(mine, {"penalty.epsilon": 0.2}).penalty == gradreg.fgr(gamma=0.2, epsilon=0.2)
    assert given.variant(mine, {"penalty.epsilon": 0.2}).penalty == gradreg.fgr(gamma=0.1, epsilon=0.2)
    assert not searched.space  # γ follows the given ε
    assert searched.variant(mine, {}).penalty == gradreg.fgr(gamma=0.3, epsilon=0.3)
    _, arm = arms(mine, ["fgr"], {"gamma": "log:0.01:1"})
    assert set(arm.space) == {"penalty.gamma", "penalty.epsilon"}
    assert arm.variant(mine, {"penalty.epsilon": 0.2, "penalty.gamma": 0.4}).penalty == gradreg.fgr(gamma=0.4, epsilon=0.2)


def test_options_are_searched_on_both_sides_and_modifiers_kept(mine: Task) -> None:
    plain, arm = arms(mine, ["sam:every=2@width=8"], {"lr": "log:0.01:1", "rho": "0.1:0.2"})
    assert set(plain.space) == {"lr"}
    assert set(arm.space) == {"lr", "penalty.rho"}
    variant = arm.variant(mine, {"lr": 0.3, "penalty.rho": 0.15})
    assert (variant.penalty, variant.options["lr"], variant.options["width"]) == (gradreg.sam(rho=0.15).every(2), 0.3, 8)
    assert plain.variant(mine, {"lr": 0.3}).options["width"] == 4


@pytest.mark.parametrize(
    ("penalties", "search", "told"),
    [
        (["sma"], {}, "unknown penalty 'sma'"),
        (["none"], {}, "one that is tuned; got 'none'"),
        ([], {}, "at least one"),
        (["sam"], {"momentum": "0:1"}, "unknown option of task 'mine': 'momentum'"),
        (["sam"], {"width": "0.5:2.5"}, "none, searched at width=0.5.*width"),
        (["sam"], {"rho": "-1:1"}, "sam, searched at penalty.rho=-1: .*rho"),
    ],
)
def test_what_cannot_be_searched_is_said_before_anything_is_trained(mine: Task, penalties, search, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        arms(mine, penalties, search)
