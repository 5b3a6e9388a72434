"""What tests of studies share: one small comparison on the real digits, for those that look at what it leaves, and a task of a moment."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from gradreg import cli

WORDS = ["compare", "digits-noisy-labels", "--penalties", "none", "gnp", "fgr", "--seeds", "3", "--epochs", "8", "--workers", "2"]


@dataclass(frozen=True)
class Comparison:
    """The folder of a comparison, the words that made it, and what it printed."""

    folder: Path
    words: list[str]
    printed: str


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("comparison") / "out"
    words = [*WORDS, "--out", str(folder)]
    capture = pytest.MonkeyPatch()
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), capture.context() as patch:
        patch.setenv("COLUMNS", "120")
        assert cli.main(words) == 0
    return Comparison(folder, words, printed.getvalue())


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of short_task.py as mine.py; its runs note themselves in runs.txt beside it."""
    path = tmp_path / "mine.py"
    shutil.copy(Path(__file__).with_name("short_task.py"), path)
    monkeypatch.setenv("RUNS", str(tmp_path / "runs.txt"))
    return path
