"""One record for each column: every value of a row is shown by one, and each formats it for every medium."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

import pytest

from gradreg.study.statistics import Difference
from gradreg.study.table import COLUMNS, Row, json_row, terminal_table

ROW = Row(
    label="plain, 2 x epochs",
    variant="plain",
    budget="epochs",
    method="SAM(rho 0.1)",
    runs=3,
    diverged=1,
    accuracy=95.614,
    deviation=0.784,
    difference=Difference(2.08, 1.2, 2.96, 2),
    matched_difference=Difference(-8.16, -10.29, -6.02, 2),
    gradient_evaluations=1200,
    seconds=3.456,
    cost=2.0,
)


def test_every_field_of_a_row_belongs_to_one_column_and_to_results_json():
    shown = [field for column in COLUMNS for field in column.fields]
    assert sorted(shown) == sorted(field.name for field in fields(Row))
    written = json_row(ROW)
    assert json.loads(json.dumps(written)) == {**json.loads(json.dumps(asdict(ROW))), "verdict": ROW.verdict()}
    assert json_row(replace(ROW, difference=None))["verdict"] is None


def test_the_cells_of_a_row():
    assert [column.text(ROW) for column in COLUMNS] == [
        "plain, 2 x epochs",
        "95.61 ± 0.78 (1 of 3 diverged)",
        "+2.08 [+1.20, +2.96]",
        "-8.16 [-10.29, -6.02]",
        "1200 (2 x)",
        "3.46",
    ]
    assert [column.sign(ROW) for column in COLUMNS] == [0, 0, 1, -1, 0, 0]
    unclear = replace(ROW, difference=Difference(0.1, -0.2, 0.4, 2), matched_difference=None, accuracy=None, deviation=None, diverged=3)
    assert [column.text(unclear) for column in COLUMNS][1:4] == ["diverged (3 of 3)", "+0.10 [-0.20, +0.40]", ""]
    assert not any(column.sign(unclear) for column in COLUMNS)


@pytest.mark.parametrize("width", [80, 110])
def test_the_terminals_table_fits_its_width(width):
    from rich.console import Console

    console = Console(width=width, record=True, color_system=None)
    with console.capture() as capture:
        console.print(terminal_table([replace(ROW, diverged=0)], title="digits, 2 seeds", width=width))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in capture.get()
    text = " ".join(capture.get().split())
    assert all(part in text for part in ("over plain,", "2 x epochs", "95.61 ± 0.78", "[+1.20, +2.96]", "(2 x)"))
    assert any("+2.08 [+1.20, +2.96]" in line for line in lines) == (width >= 110)
