"""gradreg lab: files whole and the same for one seed, tables, and errors in words."""

import csv
import os

import pytest

from gradreg import cli
from gradreg.theory.command import EXPERIMENTS
from gradreg.theory.lab import report

SMALL = {
    "diagonal-network": ["--features", "12", "--samples", "6", "--seeds", "2", "--loss-target", "1e-4", "--learning-rates", "4e-3", "2e-3"],
    "kernel-decay": ["--widths", "16", "32", "--deep-widths", "8", "16", "--end-time", "3", "--seeds", "2"],
    "flooding": ["--pairs", "30", "--width", "8"],
    "stability": [],
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_writes_tables_and_figures_the_same_for_one_seed(experiment, tmp_path, capsys):
    contents = []
    for run in ("one", "two"):
        assert cli.main(["lab", experiment, "--out", str(tmp_path / run), "--seed", "3", *SMALL[experiment]]) == 0
        contents.append({p.name: p.read_bytes() for p in (tmp_path / run).iterdir()})
    assert contents[0] == contents[1]
    suffixes = {suffix: {n for n in contents[0] if n.endswith(suffix)} for suffix in (".csv", ".png", ".svg")}
    assert len(suffixes[".png"]) == len(suffixes[".svg"]) > 0
    assert suffixes[".csv"]
    for name in suffixes[".csv"]:
        rows = list(csv.reader((tmp_path / "one" / name).read_text().splitlines()))
        assert len(rows) > 1
        assert {len(row) for row in rows} == {len(rows[0])}
    shown = capsys.readouterr().out
    assert "━" in shown
    if experiment == "diagonal-network":
        assert "only when" in shown  # the caveat stands beside the numbers


@pytest.mark.parametrize("experiment", [None, *EXPERIMENTS])
def test_help_explains_every_option_with_its_default(experiment, capsys):
    assert cli.main(["lab", *([experiment] if experiment else []), "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    if experiment is None:
        assert all(name in shown for name in EXPERIMENTS)
    else:
        assert "--out DIR" in shown
        assert "default 0" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["floding"], "Did you mean 'flooding'?"),
        (["flooding", "--sed", "1"], "unrecognized arguments: --sed 1. gradreg lab flooding --help"),
        (["flooding", "--pairs", "many"], "invalid int value: 'many'"),
        (["flooding", "--seed", "-1"], "--seed must be >= 0; got -1"),
        (["kernel-decay", "--seeds", "1"], "--seeds must be >= 2; got 1"),
        (["stability", "--learning-rate", "0"], "--learning-rate must be finite and > 0"),
    ],
)
def test_bad_input_is_refused_in_words(arguments, message, tmp_path, capsys):
    out = [] if len(arguments) == 1 else ["--out", str(tmp_path / "out")]
    assert cli.main(["lab", *arguments, *out]) == 2
    assert message in capsys.readouterr().err


def test_an_unwritable_folder_is_refused_before_anything_is_computed(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["lab", "stability", "--out", str(tmp_path / "file" / "inside")]) == 2
    assert "--out must be a folder that can be made and written to" in capsys.readouterr().err


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    table = report.Table(("x",), [(1.5,)])
    report.write(report.LabReport({"numbers": table}, {}), tmp_path)
    before = (tmp_path / "numbers.csv").read_bytes()
    assert before == b"x\n1.5\n"

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write(report.LabReport({"numbers": report.Table(("x",), [(2.5,)])}, {}), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["numbers.csv"]
    assert (tmp_path / "numbers.csv").read_bytes() == before
