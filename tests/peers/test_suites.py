"""The suites of Lightning and transformers, where their checkouts are given, and what the comparison makes of small ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from .suites import SUITES, Suite, failures, main, outcomes

pytestmark = pytest.mark.slow

LIGHTNING = """
import pytest
import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringModel

def trainer(folder):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(default_root_dir=folder, max_steps=1, accelerator="cpu", **quiet)

def test_trains(tmp_path):
    t = trainer(tmp_path)
    t.fit(BoringModel())
    assert t.global_step == 1

def test_counts(tmp_path):
    assert not [c for c in trainer(tmp_path).callbacks if c.__module__.startswith("gradreg")]

def test_fails_anyway():
    assert False

@pytest.mark.flaky
def test_skips():
    pytest.skip("here")
"""
TRANSFORMERS = """
import pytest
import torch
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))
    def forward(self, x, labels=None):
        return {"loss": (self.w * x - 1).square().mean()}

def test_trains(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
    t = Trainer(Model(), args, train_dataset=[{"x": torch.tensor([float(i)])} for i in range(16)])
    t.train()
    assert t.state.global_step == 2
    assert issubclass(Seq2SeqTrainer, Trainer)

def test_counts():
    assert not [c for c in Seq2SeqTrainer.__mro__ if c.__module__.startswith("gradreg")]

def test_fails_anyway():
    assert False

@pytest.mark.flaky
def test_skips():
    pytest.skip("here")
"""


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", SUITES)
def test_no_test_of_another_project_fails_with_gradreg_only(name: str):
    path = os.environ.get(f"GRADREG_{name.upper()}_CHECKOUT")
    if not path:
        pytest.skip(f"needs a checkout of {name}; set GRADREG_{name.upper()}_CHECKOUT to its path")
    assert main([name, path]) == 0


@pytest.mark.parametrize(("name", "file"), [("lightning", LIGHTNING), ("transformers", TRANSFORMERS)])
def test_every_trainer_of_the_project_is_injected_into(name: str, file: str, tmp_path: Path):
    """Without it ``test_counts`` passes."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\naddopts = ['--strict-markers']\n")
    (tmp_path / "theirs" / "test_it.py").write_text(file)
    (tmp_path / "theirs" / "test_left_out.py").write_text("raise ImportError\n")
    suite = Suite(root=".", tests=("theirs",), ignored={"theirs/test_left_out.py": "it cannot be imported"})
    expected = {"test_trains": "passed", "test_counts": "failed", "test_fails_anyway": "failed", "test_skips": "skipped"}
    found = outcomes(suite, tmp_path, name, suite.tests)
    assert {test.removeprefix("theirs/test_it.py::"): outcome for test, outcome in found.items()} == expected
    assert failures(found) == {"theirs/test_it.py::test_counts", "theirs/test_it.py::test_fails_anyway"}


@pytest.mark.parametrize(("documented", "status"), [({}, 1), ({"b": "a reason"}, 0), ({"a": "not new"}, 1)])
def test_a_failure_is_new_if_it_fails_again_and_not_without_gradreg(
    documented: dict[str, str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked: list[tuple[str, tuple[str, ...]]] = []
    runs = [{"a": "failed", "b": "passed", "c": "passed", "d": "skipped"}, {"a": "failed", "b": "failed", "c": "failed", "d": "skipped"}]
    runs += [{"b": "passed", "c": "passed"}, {"b": "failed", "c": "passed"}]

    def run(suite: Suite, checkout: Path, inject: str, tests: Sequence[str]) -> dict[str, str]:
        asked.append((inject, tuple(tests)))
        return runs.pop(0)

    monkeypatch.setattr("tests.peers.suites.outcomes", run)
    (tmp_path / "theirs").mkdir()
    suite = Suite(root=".", tests=("theirs", "not there"), documented=documented)
    assert main(["it", str(tmp_path)], {"it": suite}) == status
    assert asked == [("", ("theirs",)), ("it", ("theirs",)), ("", ("b", "c")), ("it", ("b", "c"))]
    first, second, new, last = capsys.readouterr().out.splitlines()
    assert first == "without gradreg: 2 passed, 1 failed, 1 skipped"
    assert second == "with gradreg: 0 passed, 3 failed, 1 skipped"
    assert new == "new: b" + (" (documented: a reason)" if "b" in documented else "")
    assert last == f"1 new failures, {int('b' in documented)} of them documented"


def test_without_a_checkout_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["lightning"]) == 0
    assert capsys.readouterr().out == "skipped: no checkout of lightning is given\n"
    with pytest.raises(SystemExit, match=r"the path must be a checkout of lightning; got .*, without tests_pytorch/loops"):
        main(["lightning", str(tmp_path)])
