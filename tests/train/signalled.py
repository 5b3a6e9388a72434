"""A run that gets signals at random moments and is begun again each time; started by test_signals.py in a process of its own, for it forks.

Usage: python signalled.py FOLDER COUNT WORD... trains WORD... in FOLDER/whole undisturbed, and in FOLDER/signalled with COUNT signals, to
the process or to its group; then 2 * COUNT / 5 times two writers at once in FOLDER/pair-N. Prints one line of JSON: each signal and exit.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torchvision  # noqa: F401  # children inherit what is imported here

from gradreg import cli
from gradreg.train import command, run_to_folder, trackers  # noqa: F401  # likewise

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGINT, signal.SIGSTOP)
EXITS = {signal.SIGTERM: {143, -15}, signal.SIGHUP: {129, -1}, signal.SIGINT: {130}, signal.SIGKILL: {-9}, signal.SIGSTOP: set()}
"""What a signal may end a run with, beside 0: saved, or ended before there was anything to save."""


def child(words: list[str], said: Path) -> int:
    process = os.fork()
    if process == 0:
        os.setsid()
        with said.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(number, "wb", 0), write_through=True) for number in (1, 2))
        status = cli.main(words)
        atexit._run_exitfuncs()  # as at the end of a command: what its workers shared is given back
        os._exit(status)
    return process


def wait(process: int, seconds: float = 60) -> int:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(process, signal.SIGKILL)
    raise SystemExit(f"process {process} did not end within {seconds} s")


def nobody_left(group: int) -> None:
    """Until no process of the group runs, for 5 seconds at most. One that has ended may wait longer for process 1 to notice."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        found = members(group)
        if found and all(words.startswith("Z") for _, words in found):
            return
        time.sleep(0.01)
    left = [words for process, words in members(group)]
    os.killpg(group, signal.SIGKILL)
    raise SystemExit(f"processes of group {group} are left: {left}")


def members(group: int) -> list[tuple[int, str]]:
    """The processes of a group, with their command lines, where there is /proc."""
    found: list[tuple[int, str]] = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(path.name)) == group:
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
                found.append((int(path.name), f"{state} {(path / 'cmdline').read_text().replace(chr(0), ' ')}"))
    return found


def wait_for_begin(run: Path, process: int) -> None:
    """Until the run has rewritten its metrics, which it does before its first step, or has ended."""
    file, started = run / "timings.jsonl", time.time_ns()
    while not (file.exists() and file.stat().st_mtime_ns > started):
        time.sleep(0.002)
        if time.time_ns() - started > 60e9 or os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return


def disturb(folder: Path, words: list[str], number: signal.Signals, randomness: random.Random) -> str:
    run = folder / "signalled"
    begin = ["train", "--resume", str(run)] if (run / "config.yaml").exists() else ["train", *words, "--out", str(run)]
    process = child(begin, folder / "said.txt")
    if randomness.random() < 0.8:  # else it may be struck before it has begun
        wait_for_begin(run, process)
    time.sleep(randomness.uniform(0.0, 0.5))
    group = randomness.random() < 0.5
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(process, number)
        if number == signal.SIGSTOP:
            time.sleep(0.1)
            (os.killpg if group else os.kill)(process, signal.SIGCONT)
    status = wait(process)
    nobody_left(process)
    if status != 0 and status not in EXITS[number]:
        raise SystemExit(f"{number.name} to the {'group' if group else 'process'} ended the run with {status}")
    return f"{number.name} {'group' if group else 'process'} {status}"


def pair(folder: Path, words: list[str], number: int) -> None:
    run, said = folder / f"pair-{number}", folder / f"pair-{number}.txt"
    both = [child(["train", *words, "--out", str(run)], said) for _ in range(2)]
    exits = sorted(wait(process) for process in both)
    text = said.read_text()
    if (
        exits not in ([0, 0], [0, 2])
        or ("is complete" if exits == [0, 0] else "must name a folder that no other process writes") not in text
    ):
        raise SystemExit(f"two writers ended with {exits}: {text}")


def main() -> None:
    folder, count, words = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if wait(child(["train", *words, "--out", str(folder / "whole")], folder / "said.txt")):
        raise SystemExit((folder / "said.txt").read_text())
    randomness = random.Random(count)
    struck: list[str] = []
    while len(struck) < count:
        if (folder / "signalled" / "result.json").exists():  # it has come to its end: the next one begins anew
            (folder / "signalled").rename(folder / f"ended-{len(struck)}")
        struck.append(disturb(folder, words, SIGNALS[len(struck) % len(SIGNALS)], randomness))
    if not (folder / "signalled" / "result.json").exists() and wait(
        child(["train", "--resume", str(folder / "signalled")], folder / "said.txt")
    ):
        raise SystemExit((folder / "said.txt").read_text())
    for number in range(2 * count // 5):
        pair(folder, words, number)
    print(json.dumps(struck))


if __name__ == "__main__":
    main()
