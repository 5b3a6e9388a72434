"""Runs as jobs of a real Slurm of one node (``.ci/slurm``), which ``.ci/run`` starts and requires; elsewhere skipped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradreg import cli
from tests.study.untimed import histories, results


def answers() -> bool:
    return shutil.which("squeue") is not None and subprocess.run(["squeue"], capture_output=True, timeout=30, check=False).returncode == 0


NEEDS_SLURM = pytest.mark.skipif(
    not os.environ.get("GRADREG_REQUIRE_SLURM") and not answers(), reason="no Slurm answers; .ci/slurm start FOLDER starts one"
)


def words(mine: Path, out: str, *more: str) -> list[str]:
    usual = ["--penalties", "sam:rho=0.1", "--rivals", "epochs", "--seeds", "10", "--out", str(mine.parent / out)]
    return ["compare", str(mine), *usual, *more]


def slurm(mine: Path, *more: str) -> list[str]:
    return words(mine, "slurm", "--executor", "slurm", "--slurm-time", "5", *more)


def local(mine: Path, *more: str) -> Path:
    assert cli.main(words(mine, "local", "--workers", "0", *more)) == 0
    return mine.parent / "local"


def queue(*options: str) -> list[str]:
    said = subprocess.run(["squeue", "--noheader", "--array", *options], capture_output=True, text=True, check=True)
    return said.stdout.split()


def wait_for(found, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not found():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it did not happen in two minutes"
        time.sleep(0.1)


@NEEDS_SLURM
def test_an_array_one_of_whose_jobs_is_cancelled_and_whose_driver_dies_gives_what_one_process_gives(mine):
    begin = [sys.executable, "-m", "gradreg", *slurm(mine, "--wait", "0.2")]
    driver = subprocess.Popen(begin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    complete = mine.parent / "slurm" / "runs"
    running = ["--format=%i", "--states=RUNNING"]
    wait_for(lambda: queue(*running) and list(complete.rglob("result.json")), driver)
    cancelled = queue(*running)[-1]
    subprocess.run(["scancel", cancelled], check=True)
    before = len(list(complete.rglob("result.json")))
    wait_for(lambda: len(list(complete.rglob("result.json"))) > before + 2, driver)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    there = {file: file.stat().st_mtime_ns for file in complete.rglob("result.json")}
    assert queue("--format=%i", "--states=RUNNING,PENDING")  # Slurm's jobs outlive the driver, and are taken over
    again = subprocess.run(begin, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {file: file.stat().st_mtime_ns for file in there} == there
    assert not queue("--format=%i", "--states=RUNNING,PENDING")
    whole = local(mine, "--wait", "0.2")
    assert results(mine.parent / "slurm") == results(whole)
    assert histories(mine.parent / "slurm") == histories(whole)
    begun = [line.split()[:2] for line in (mine.parent / "runs.txt").read_text().splitlines()]
    assert 20 <= len(begun) - 20 <= 21  # 20 in this process, and 20 as jobs, of which the one that was cancelled may have begun twice


@NEEDS_SLURM
def test_a_run_that_dies_three_times_has_failed_and_says_its_last_lines(mine, capsys):
    assert cli.main(slurm(mine, "--seeds", "2", "--die", "sam-1")) == 1
    (failed,) = [run for run in results(mine.parent / "slurm")["runs"] if "error" in run]
    assert (failed["variant"], failed["seed"]) == ("sam:rho=0.1", 1)
    assert "its process died 3 times, the last time: Slurm's job" in failed["error"]
    assert "the last words of this run" in failed["error"]
    assert (mine.parent / "runs.txt").read_text().count("sam-rho-0.1 1") == 3
    assert "1 of 2 runs failed" in capsys.readouterr().out


@NEEDS_SLURM
def test_what_slurm_refuses_is_said_in_its_words(mine, capsys):
    begun = time.monotonic()
    assert cli.main(slurm(mine, "--slurm-partition", "nowhere")) == 2
    assert "Slurm must take the jobs of the study; got: " in (said := capsys.readouterr().err)
    assert "invalid partition specified: nowhere" in said
    assert time.monotonic() - begun < 10


def test_the_logging_of_the_process_is_left_as_it_is(mine):
    script = """
import logging
from pathlib import Path
from gradreg import study
from gradreg.study.executors.executor import Site

ended = []
class Handler(logging.StreamHandler):
    def close(self):
        ended.append(self)

logging.getLogger().addHandler(Handler())
try:
    with study.SlurmExecutor().session(Site(Path.cwd()), lambda key, share: None):
        pass
except study.ExecutorError as error:
    print(error)
import sys
print("submitit" in sys.modules, ended)
"""
    environment = {**os.environ, "PATH": str(mine.parent)}
    done = subprocess.run([sys.executable, "-c", script], cwd=mine.parent, env=environment, capture_output=True, text=True, check=True)
    said, seen = done.stdout.splitlines()
    assert said.startswith("--executor slurm must be given on a machine of a Slurm cluster")
    assert seen == "True []"


def test_without_slurm_it_is_said_at_once(mine, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(mine.parent))
    assert cli.main(slurm(mine)) == 2
    assert "must be given on a machine of a Slurm cluster; got one without sbatch and squeue" in capsys.readouterr().err


@NEEDS_SLURM
def test_the_probe_of_l2_is_a_job_too(tmp_path, capsys):
    words = [
        "l2",
        "probe",
        "l2-fc-digits",
        "--budget-epochs",
        "20",
        "--data.train_size",
        "300",
        "--batch_size",
        "20",
        "--measure-every",
        "2",
    ]
    assert cli.main([*words, "--out", str(tmp_path / "here")]) in (0, 1)
    assert cli.main([*words, "--out", str(tmp_path / "there"), "--executor", "slurm", "--slurm-time", "5"]) in (0, 1)
    here, there = ((tmp_path / place / "probe.json").read_text() for place in ("here", "there"))
    assert here == there
