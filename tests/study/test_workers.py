"""Worker processes of this machine: what they are forked from, their environment and memory, and what happens when that process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from gradreg.environment import usable_cores
from gradreg.study.executors.executor import Ended, Site, Work
from gradreg.study.executors.local import LocalExecutor

PRELOADED = "gradreg.train.preloaded"
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each worker begins from nothing")


def carried_out(works: list[Work], *, workers: int = 2, imports: str = PRELOADED) -> list[dict]:
    """The results, in order."""
    found: dict[str, Ended] = {}
    with LocalExecutor(workers).session(Site(Path(), imports=imports), lambda key, share: None) as session:
        session.submit(works)
        while len(found) < len(works):
            found |= {ended.key: ended for ended in session.wait(1.0)}
    assert all(ended.result is not None for ended in found.values()), found
    return [found[work.key].result or {} for work in works]


def about_itself(names: tuple[str, ...], on_share) -> dict:
    """What a worker is like before it has done anything."""
    imported = "torch" in sys.modules
    import torch

    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return {
        "parent": os.getppid(),
        "imported": imported,
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ.get(name) for name in names},
        "interrupts": (signal.getsignal(signal.SIGINT), signal.SIGINT in blocked),
    }


def faults(on_share) -> dict:
    """How many pages a worker gets while it uses the same 4 MB again and again, as a step of a small network does."""
    import resource

    begun = 0
    for turn in range(200):
        if turn == 20:
            begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [bytearray(2**20) for _ in range(4)]
        del blocks
    return {"faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun}


def until_told(folder: str, on_share) -> dict:
    """Say who forked it, and wait."""
    (Path(folder) / f"{os.getpid()}.txt").write_text(str(os.getppid()))
    while not (Path(folder) / "go.txt").exists():
        time.sleep(0.01)
    return {"parent": os.getppid()}


@on_linux
def test_what_every_run_imports_is_imported_once_for_all_workers():
    two = carried_out([Work(str(k), partial(about_itself, ())) for k in range(4)])
    assert all(one["imported"] for one in two)
    assert len({one["parent"] for one in two} - {os.getpid()}) == 1
    assert all(one["interrupts"] == (signal.SIG_IGN, False) for one in two)


def test_a_task_that_says_nothing_of_its_imports_has_workers_that_begin_from_nothing():
    (one,) = carried_out([Work("one", partial(about_itself, ()))], imports="")
    assert (one["imported"], one["parent"]) == (False, os.getpid())


@pytest.mark.parametrize("imports", ["", PRELOADED])
def test_workers_have_the_environment_of_the_moment(monkeypatch, imports):
    names = ("GRADREG_TEST_ONE", "GRADREG_TEST_TWO")
    about = Work("about", partial(about_itself, names))
    monkeypatch.setenv(names[0], "first")
    (one,) = carried_out([about], imports=imports)
    monkeypatch.delenv(names[0])
    monkeypatch.setenv(names[1], "second")
    (other,) = carried_out([about], imports=imports)
    assert one["environment"] == {names[0]: "first", names[1]: None}
    assert other["environment"] == {names[0]: None, names[1]: "second"}


@pytest.mark.parametrize(
    ("imports", "workers", "given", "threads"),
    [
        ("", 2, None, max(1, usable_cores() // 2)),
        (PRELOADED, 1, None, usable_cores()),
        (PRELOADED, 2, None, max(1, usable_cores() // 2)),
        (PRELOADED, 1, "1", 1),
        (PRELOADED, 1, "none", usable_cores()),
    ],
)
def test_workers_share_the_cores_unless_the_environment_says_otherwise(monkeypatch, imports, workers, given, threads):
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    (one,) = carried_out([Work("about", partial(about_itself, ()))], workers=workers, imports=imports)
    assert one["threads"] == threads
    assert os.environ.get("OMP_NUM_THREADS") == given


@on_linux
def test_a_step_gets_the_memory_of_the_last_one_back():
    (one,) = carried_out([Work("faults", faults)], workers=1)
    assert one["faults"] < 180  # one a turn; without it a thousand a turn


@on_linux
def test_where_the_process_that_forks_them_dies_the_runs_are_lost_and_not_to_blame(tmp_path):
    works = [Work(str(k), partial(until_told, str(tmp_path))) for k in range(2)]
    with LocalExecutor(2).session(Site(tmp_path, imports=PRELOADED), lambda key, share: None) as session:
        session.submit(works)
        while len(begun := list(tmp_path.glob("*.txt"))) < 2:
            session.wait(0.1)
        (parent,) = {int(file.read_text()) for file in begun}
        os.kill(parent, signal.SIGKILL)
        ended: list[Ended] = []
        while len(ended) < 2:
            ended += session.wait(1.0)
        assert all(one.result is None and one.died and not one.own for one in ended), ended
        (tmp_path / "go.txt").touch()
        session.submit(works)
        again: list[Ended] = []
        while len(again) < 2:
            again += session.wait(1.0)
    assert all(one.result is not None and one.result["parent"] != parent for one in again)


@on_linux
def test_where_a_killed_process_is_still_taken_for_alive_it_is_waited_for(monkeypatch):
    """As in the moment between the end of its sockets and that of the process, which cannot be met on purpose."""
    from multiprocessing import context

    start, refused = context.ForkServerProcess.start, list[str]()

    def refusing(process):
        if len(refused) < 3:
            refused.append(process.name)
            raise ConnectionRefusedError
        start(process)

    monkeypatch.setattr(context.ForkServerProcess, "start", refusing)
    (one,) = carried_out([Work("about", partial(about_itself, ()))], workers=1)
    assert one["imported"]
    assert len(refused) == 3


@on_linux
def test_a_process_that_dies_while_it_imports_is_told_in_words(tmp_path):
    (tmp_path / "fatal.py").write_text("import os\nos._exit(3)\n")
    script = (
        "from pathlib import Path\n"
        "from gradreg.study.executors.executor import Site\n"
        "from gradreg.study.executors.local import LocalExecutor\n"
        "try:\n"
        "    with LocalExecutor(1).session(Site(Path(), imports='fatal'), print): pass\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.startswith("the process that imports what all workers need died meanwhile"), done.stdout + done.stderr
    assert "--workers 0" in done.stdout
    assert not done.stderr


def test_what_cannot_be_imported_is_left_to_the_run_to_say():
    script = "import sys\nsys.modules['torch'] = None\nimport gradreg.train.preloaded\nprint('here')"
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=120)
    assert done.stdout == "here\n", done.stderr
