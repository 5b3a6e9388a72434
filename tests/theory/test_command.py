"""gradreg lab: files whole and the same for one seed, tables, and errors in words."""

import csv
import json
import os

import pytest

import gradreg
from gradreg import cli
from gradreg.theory.command import EXPERIMENTS
from gradreg.theory.lab import report

SMALL = {
    "diagonal-network": ["--features", "12", "--samples", "6", "--seeds", "2", "--loss-target", "1e-4", "--learning-rates", "4e-3", "2e-3"],
    "kernel-decay": ["--widths", "16", "32", "--deep-widths", "8", "16", "--end-time", "3", "--seeds", "2"],
    "flooding": ["--pairs", "30", "--width", "8"],
    "stability": [],
    "edge": ["--samples", "40", "--hidden", "6", "--steps", "20", "--every", "10", "--learning-rates", "0.2", "--rhos", "0", "0.1"],
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
        (["flooding", "--sed", "1"], "unrecognized arguments: --sed 1 (gradreg lab flooding --help"),
        (["flooding", "--pairs", "many"], "invalid int value: 'many'"),
        (["flooding", "--seed", "-1"], "--seed must be >= 0; got -1"),
        (["kernel-decay", "--seeds", "1"], "--seeds must be >= 2; got 1"),
        (["stability", "--learning-rate", "0"], "--learning-rate must be finite and > 0"),
        (["stability", "--measured", "nowhere.json"], "--measured must be a file with measured curvatures; got 'nowhere.json'"),
        (["edge", "--rhos", "-1"], "--rhos must be finite and >= 0; got -1"),
        (["edge", "--learning-rates", "0"], "--learning-rates must be finite and > 0"),
        (["edge", "--data", "mnist", "--root", "nowhere"], "root must hold MNIST's files as torchvision lays them out"),
        (["edge", "--data", "cifar"], "invalid choice: 'cifar'"),
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


def test_advice_on_measured_runs_takes_what_was_measured(tmp_path, capsys):
    """A file as ``gradreg sharpness --out`` writes it; tests/train/test_sharpness_command.py has one of a run."""
    common = {"learning_rate": 0.05, "momentum": 0.0, "gradient_norm": 0.33, "penalty_step": 7}
    plain = {
        **common,
        "run": "plain",
        "optimizer": "adamw",
        "largest_eigenvalue": 90.0,
        "smallest_eigenvalue": -0.2,
        "penalty": None,
        "penalized": [],
    }
    penalty = gradreg.gnp(r=0.5, alpha=0.8).to_dict()
    seen = [{"curvature": 2.02, "penalized": 90.0, "error": 0.1}]
    gnp = {
        **plain,
        "run": "gnp",
        "optimizer": "sgd",
        "largest_eigenvalue": 2.02,
        "smallest_eigenvalue": -0.25,
        "penalty": penalty,
        "penalized": seen,
    }
    file = tmp_path / "sharpness.json"
    file.write_text(json.dumps({"runs": [plain, gnp]}))
    assert cli.main(["lab", "stability", "--measured", str(file), "--momentum", "0.9", "--out", str(tmp_path / "out")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "plain: the theory is that of gradient descent with momentum; adamw scales each coordinate" in shown
    assert "gnp: the theory" not in shown
    assert (
        "plain, SAM(rho 0.1): theory and measurement part: On a quadratic learning rate 0.05 diverges at the measured curvature 90, "
        "above 76" in shown  # an option goes before the file
    )
    assert "gnp, GNP(r 0.5, alpha 0.8): nothing too large." in shown
    assert "only one below -0.825 is" in shown
    assert "a step of this learning rate overshoots there" in shown
    rows = list(csv.DictReader((tmp_path / "out" / "advice.csv").read_text().splitlines()))
    assert [row["penalty"].split(",")[0] for row in rows] == ["plain", "plain", "gnp"]
    assert {row["problems"] for row in rows} == {"0"}
    file.write_text("{}")
    assert cli.main(["lab", "stability", "--measured", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "--measured must be a file that gradreg sharpness wrote" in capsys.readouterr().err
