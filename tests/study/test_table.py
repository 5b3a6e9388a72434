"""One record for each column: every value of a row is shown by one, and each formats it for every medium."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

import pytest

from gradreg.study.table import COLUMNS, Row, comma_separated, json_row, latex, markdown, shown_columns, terminal_table
from gradreg.study.tasks import Metric
from gradreg.study.verdicts import compare_paired

ACCURACY = Metric("accuracy", "max", percent=True)


def verdict(*differences):
    """The verdict on these differences."""
    return compare_paired(dict.fromkeys(range(len(differences)), 0.0), {"x": dict(enumerate(differences))}, mode="max")["x"]


BETTER, WORSE = verdict(2.0, 2.1, 2.14), verdict(-8.0, -8.2, -8.28)

ROW = Row(
    label="plain, 2 x epochs",
    variant="plain",
    budget="epochs",
    method="SAM(rho 0.1)",
    runs=3,
    diverged=1,
    failed=0,
    mean=95.614,
    deviation=0.784,
    best_mean=96.123,
    difference=BETTER,
    matched_difference=WORSE,
    seconds_difference=None,
    early_difference=None,
    gradient_evaluations=1200,
    seconds=3.456,
    cost=2.0,
)


def test_every_field_of_a_row_belongs_to_one_column_and_to_results_json():
    shown = [field for column in COLUMNS for field in column.fields]
    assert sorted(shown) == sorted(field.name for field in fields(Row))
    written = json_row(ROW)
    assert json.loads(json.dumps(written)) == {**json.loads(json.dumps(asdict(ROW))), "verdict": ROW.verdict()}
    assert json_row(replace(ROW, difference=None, matched_difference=None))["verdict"] is None


def test_the_cells_of_a_row():
    assert [column.text(ROW) for column in COLUMNS] == [
        "plain, 2 x epochs",
        "95.61 ± 0.78 (1 of 3 diverged)",
        "96.12",
        "+2.08 [+1.90, +2.26]",
        "-8.16 [-8.52, -7.80]",
        "",
        "",
        "",
        "1200 (2 x)",
        "3.46",
    ]
    assert [column.sign(ROW) for column in COLUMNS] == [0, 0, 0, 1, -1, 0, 0, 0, 0, 0]
    unclear = replace(ROW, difference=verdict(0.1, -0.2, 0.4), matched_difference=None, mean=None, deviation=None, diverged=3)
    assert [column.text(unclear) for column in COLUMNS][1:5] == ["diverged (3 of 3)", "96.12", "+0.10 [-0.65, +0.85]", ""]
    assert not any(column.sign(unclear) for column in COLUMNS)
    failed = replace(ROW, mean=None, deviation=None, diverged=1, failed=2)
    assert COLUMNS[1].text(failed) == "no result (1 of 3 diverged, 2 of 3 failed)"


def test_small_numbers_keep_their_digits():
    row = replace(ROW, mean=0.0123456, deviation=0.00031, diverged=0, difference=verdict(0.0011, 0.0012, 0.0013))
    assert COLUMNS[1].text(row) == "0.01235 ± 0.00031"
    assert COLUMNS[3].text(row) == "+0.00120 [+0.00095, +0.00145]"


def test_columns_without_anything_to_show_are_left_out():
    assert [c.fields[0] for c in shown_columns([replace(ROW, best_mean=None)])] == [
        "label", "runs", "difference", "matched_difference", "gradient_evaluations", "seconds",
    ]  # fmt: skip


def test_exports_hold_every_number():
    lines = markdown([ROW], ACCURACY).splitlines()
    assert lines[0].startswith("| variant | test accuracy, % |")
    assert "| +2.08 [+1.90, +2.26] |" in lines[2]
    import csv

    (row,) = csv.DictReader(comma_separated([ROW], ACCURACY).splitlines())
    assert (row["metric"], row["mean"], float(row["difference"]), row["matched_difference_decision"]) == (
        "accuracy", "95.614", pytest.approx(2.08), "harms",
    )  # fmt: skip
    assert r"95.61 $\pm$ 0.78 (1 of 3 diverged)" in latex([ROW], ACCURACY)
    assert r"test accuracy, \%" in latex([ROW], ACCURACY)


def test_on_forty_columns_each_number_has_a_line():
    from rich.console import Console

    console = Console(width=40, record=True, color_system=None)
    with console.capture() as capture:
        console.print(terminal_table([replace(ROW, diverged=0, best_mean=None)], ACCURACY, title="digits, 2 seeds", width=40))
    lines = [" ".join(line.split()) for line in capture.get().splitlines()]
    assert max(map(len, capture.get().splitlines())) <= 40
    assert "…" not in capture.get()
    for line in ("test accuracy % 95.61", "± 0.78", "over plain, equal epochs +2.08", "[+1.90,", "+2.26]"):
        assert line in lines


@pytest.mark.parametrize("width", [80, 110])
def test_the_terminals_table_fits_its_width(width):
    from rich.console import Console

    console = Console(width=width, record=True, color_system=None)
    with console.capture() as capture:
        console.print(terminal_table([replace(ROW, diverged=0, best_mean=None)], ACCURACY, title="digits, 2 seeds", width=width))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in capture.get()
    text = " ".join(capture.get().split())
    assert all(
        part in text
        for part in ("over plain,", "2 x epochs" if width < 110 else "plain, 2 x epochs", "95.61 ± 0.78", "[+1.90, +2.26]", "(2 x)")
    )
    assert any("+2.08 [+1.90, +2.26]" in line for line in lines) == (width >= 110)
