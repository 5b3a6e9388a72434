"""Runs as tasks of a real Ray: a head without cores and two nodes, all on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradreg import cli, study
from gradreg.study.executors.ray import RayExecutor
from tests.study.untimed import histories, results

ray = pytest.importorskip("ray")
TASK = Path(__file__).parent / "short_task.py"

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # of ray's own


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    place = tmp_path_factory.mktemp("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(place / "runs.txt"))
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        found.nodes = [found.add_node(num_cpus=2), found.add_node(num_cpus=2)]
        found.runs = place / "runs.txt"
        found.runs.touch()
        yield found
        found.shutdown()


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "code" / "mine.py"
    path.parent.mkdir()
    shutil.copy(TASK, path)
    monkeypatch.delenv("RUNS", raising=False)
    return path


def words(mine: Path, out: str, *more: str) -> list[str]:
    usual = ["--penalties", "sam:rho=0.1", "--rivals", "epochs", "--seeds", "30", "--out", str(mine.parents[1] / out)]
    return ["compare", str(mine), *usual, *more]


def complete(folder: Path) -> dict[Path, int]:
    # rglob raises where a folder vanishes meanwhile, as that of a run which another worker takes over.
    files = [Path(place) / "result.json" for place, _, names in os.walk(folder / "runs") if "result.json" in names]
    return {file: file.stat().st_mtime_ns for file in files}


def wait_for(found, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not found():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it did not happen in two minutes"
        time.sleep(0.05)


def test_a_node_and_then_the_driver_die_in_the_middle_and_the_results_are_those_of_one_process(cluster, mine):
    out = mine.parents[1] / "ray"
    begin = [sys.executable, "-m", "gradreg", *words(mine, "ray", "--executor", "ray", "--ray-address", cluster.address, "--wait", "0.1")]
    driver = subprocess.Popen(begin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: len(complete(out)) > 8, driver)
    cluster.remove_node(cluster.nodes.pop(), allow_graceful=False)
    before = len(complete(out))
    wait_for(lambda: len(complete(out)) > before + 8, driver)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    there = complete(out)
    assert 17 < len(there) < 60
    again = subprocess.run(begin, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"60 runs, {len(there)} of them already there, on Ray at {cluster.address}" in again.stdout
    assert {file: at for file, at in complete(out).items() if file in there} == there  # nothing that was complete is run twice
    assert cli.main(words(mine, "local", "--workers", "0")) == 0
    alone = mine.parents[1] / "local"
    assert histories(out) == histories(alone)
    ours, theirs = results(out), results(alone)
    assert ours["runs"] == theirs["runs"]
    assert ours["table"] == theirs["table"]
    places = {line.split()[3] for line in cluster.runs.read_text().splitlines()}
    assert all("working_dir_files" in place for place in places), places  # to which the task's folder was sent


def test_a_run_that_dies_three_times_has_failed_and_says_its_last_lines(cluster, mine):
    begun = cluster.runs.read_text().count("sam-rho-0.1 1 ")
    found = study.compare(
        str(mine),
        penalties=["sam:rho=0.1"],
        rivals=["epochs"],
        seeds=2,
        options={"die": "sam-1"},
        out=mine.parents[1] / "ray",
        executor=RayExecutor(address=cluster.address),
    )
    (failed,) = [record for record in found.records if record.error is not None]
    assert (failed.variant, failed.seed) == ("sam:rho=0.1", 1)
    assert failed.error.startswith("its process died 3 times, the last time: its process died")
    assert "the last words of this run" in failed.error
    assert cluster.runs.read_text().count("sam-rho-0.1 1 ") == begun + 3


def test_a_search_runs_its_trials_on_ray(cluster, mine):
    found = study.tune(
        str(mine),
        penalty="sam",
        trials=2,
        seeds=2,
        confirm=2,
        out=mine.parents[1] / "search",
        executor=RayExecutor(address=cluster.address),
    )
    assert [one.state for one in found.findings if one.state not in ("complete", "dropped")] == []
    assert len(found.findings) == 2
    assert found.comparison is not None


def test_an_address_at_which_nobody_or_something_else_answers(mine, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        begun = time.monotonic()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        assert cli.main(words(mine, "ray", "--executor", "ray", "--ray-address", address)) == 2
        assert f"--ray-address must be of a running Ray; got '{address}', where nobody answers" in capsys.readouterr().err
        other.listen()
        assert cli.main(words(mine, "ray", "--executor", "ray", "--ray-address", address)) == 2
        assert f"got '{address}', where nobody answers: timed out" in capsys.readouterr().err
        assert time.monotonic() - begun < 10
    assert cli.main(words(mine, "ray", "--executor", "ray", "--ray-address", "somewhere")) == 2
    assert "--ray-address must be of a running Ray; got 'somewhere', which is no HOST:PORT" in capsys.readouterr().err
    assert not os.path.exists(mine.parents[1] / "ray" / ".lock")
