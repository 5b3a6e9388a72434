"""A folder has one writer, whatever happens to it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gradreg import folders
from gradreg.folders import FolderInUse, locked, new_folder

HOLD = (
    "import os, signal, sys, time; from pathlib import Path; from gradreg.folders import locked\n"
    "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # ignored, as by nohup, it would be ignored here too
    "with locked(Path(sys.argv[1]), purpose='--out'):\n"
    "    child = os.fork() if sys.argv[2] else 1\n"
    "    if not child or not sys.argv[2]: os.write(1, b'%d\\n' % os.getpid())\n"
    "    time.sleep(60 if child or sys.argv[2] != 'leave' else 0)\n"
    "os.write(1, b'left\\n'); time.sleep(60)\n"
)


def hold(folder: Path, fork: str = "") -> tuple[subprocess.Popen[str], int]:
    """A process that has locked ``folder``, and its number, or that of its child that ``fork`` asks for."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), fork], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_a_second_writer_is_told_who_writes_and_since_when(tmp_path):
    folder = tmp_path / "new" / "run"
    process, _ = hold(folder)
    try:
        holder = rf"process {process.pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{{4}}"
        with (
            pytest.raises(FolderInUse, match=rf"^--out must name .* no other process writes; got '.*/new/run', written by {holder}\. Wait"),
            locked(folder, purpose="--out"),
        ):
            pass
    finally:
        process.kill()
        process.communicate()


def test_the_same_process_cannot_lock_it_twice_and_can_again_afterwards(tmp_path):
    folder = tmp_path / "run"
    with locked(folder, purpose="--out"):
        (folder / "kept").touch()
        with pytest.raises(FolderInUse, match=f"written by process {os.getpid()} on "), locked(folder, purpose="--out"):
            pass
        with pytest.raises(FolderInUse, match="written by process"), locked(folder, purpose="--out"):
            pass  # being refused has not released it
    assert [path.name for path in folder.iterdir()] == ["kept"]
    with locked(folder, purpose="--out"):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("fork", ["", "fork"])
def test_death_releases_it_even_where_a_child_lives_on(tmp_path, number, fork):
    process, child = hold(tmp_path / "run", fork)
    try:
        process.send_signal(number)
        process.wait()
        with locked(tmp_path / "run", purpose="--out"):
            assert json.loads((tmp_path / "run" / folders.LOCK).read_text())["pid"] == os.getpid()
    finally:
        if fork:
            os.kill(child, signal.SIGKILL)
        process.communicate()


def test_a_child_that_leaves_the_context_does_not_release_it(tmp_path):
    process, child = hold(tmp_path / "run", "leave")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "left\n"
        assert (tmp_path / "run" / folders.LOCK).is_file()
        with pytest.raises(FolderInUse, match=f"process {process.pid} "), locked(tmp_path / "run", purpose="--out"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        process.kill()
        process.communicate()


def test_a_stopped_writer_keeps_it(tmp_path):
    process, _ = hold(tmp_path / "run")
    try:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(FolderInUse, match=f"process {process.pid} "), locked(tmp_path / "run", purpose="--out"):
            pass
    finally:
        process.kill()
        process.communicate()


def test_a_lock_file_that_nobody_holds_does_not_lock(tmp_path):
    (tmp_path / folders.LOCK).write_text(json.dumps({"pid": 1, "host": "gone" * 100, "since": "then"}))
    with locked(tmp_path, purpose="--out"):
        assert json.loads((tmp_path / folders.LOCK).read_text())["host"] == socket.gethostname()  # and nothing of the longer text


def test_a_lock_file_that_is_removed_before_it_is_locked_is_not_taken(tmp_path, monkeypatch):
    """As by the last writer, which leaves between another one's opening and locking: that one must not lock a file that nobody can find."""
    lock, taken = fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not taken:
            (tmp_path / folders.LOCK).unlink()
        taken.append(descriptor)
        lock(descriptor, how)

    monkeypatch.setattr(folders.fcntl, "flock", late)
    with locked(tmp_path, purpose="--out"):
        assert len(taken) == 2
        with pytest.raises(FolderInUse, match="written by process"), locked(tmp_path, purpose="--out"):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    def without_locks(descriptor: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folders.fcntl, "flock", without_locks)
    words = rf"--out must be on a file system with locks, .* got '{re.escape(str(tmp_path))}': {os.strerror(number)}\. Choose a folder on"
    with pytest.raises(OSError, match=words), locked(tmp_path, purpose="--out"):
        pass


def test_a_full_disk_keeps_the_lock_from_being_described_and_no_more(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folders.os, "pwrite", full)
    with (
        locked(tmp_path, purpose="--out"),
        pytest.raises(FolderInUse, match="written by a process that has just started"),
        locked(tmp_path, purpose="--out"),
    ):
        pass


def test_what_a_writer_left_half_written_is_no_error_in_the_message(tmp_path):
    with locked(tmp_path, purpose="--out"):
        (tmp_path / folders.LOCK).write_text("{")
        with pytest.raises(FolderInUse, match="written by a process that has just started"), locked(tmp_path, purpose="--out"):
            pass


def test_an_empty_folder_is_removed_and_a_file_in_its_place_is_an_error(tmp_path):
    with locked(tmp_path / "run", purpose="--out"):
        pass
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").touch()
    with (
        pytest.raises(OSError, match=r"--out must name a folder that can be written to; got '.*run': File exists\."),
        locked(tmp_path / "run", purpose="--out"),
    ):
        pass


def test_a_fifo_or_a_link_in_the_place_of_the_lock_is_an_error_at_once(tmp_path):
    os.mkfifo(tmp_path / folders.LOCK)
    with pytest.raises(OSError, match="must be a plain file, which locks the folder"), locked(tmp_path, purpose="--out"):
        pass
    (tmp_path / folders.LOCK).unlink()
    (tmp_path / folders.LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"), locked(tmp_path, purpose="--out"):
        pass
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="without /proc")
def test_a_folder_that_cannot_be_made_is_an_error_at_once():
    with (
        pytest.raises(OSError, match=r"--out must name a folder .* got '/proc/run': No such file"),
        locked(Path("/proc/run"), purpose="--out"),
    ):
        pass


def test_many_writers_take_turns_while_the_folder_comes_and_goes(tmp_path):
    inside: list[int] = []
    most: list[int] = []

    def writer(number: int) -> int:
        times, until = 0, time.monotonic() + 20
        while times < 30 and time.monotonic() < until:
            try:
                with locked(tmp_path / "run", purpose="--out"):
                    inside.append(number)
                    most.append(len(inside))
                    inside.remove(number)
                    times += 1
            except FolderInUse:
                pass
        return times

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(writer, range(4))) == [30] * 4
    assert max(most) == 1


def test_new_folders_are_never_shared(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: new_folder(tmp_path / "runs" / "one"), range(40)))
    assert {path.name for path in made} == {"one", *(f"one-{i}" for i in range(2, 41))}
    assert len(set(made)) == 40
