"""A run that is killed again and again; started by test_interruptions.py in a process of its own, for it forks.

Usage: python killed.py FOLDER KILLS WORD... trains WORD... in FOLDER/whole without interruption, and in FOLDER/killed killed KILLS times
at random moments and begun again, then prints one line of JSON: at what each kill struck.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from gradreg import cli
from gradreg.train import command, run_to_folder, trackers  # noqa: F401  # children inherit what is imported here


def child(words: list[str]) -> int:
    process = os.fork()
    if process == 0:
        sys.stdout = sys.stderr
        os._exit(cli.main(words))
    return process


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait_for_begin(folder: Path) -> None:
    """Until the run has rewritten its metrics, which it does before its first step."""
    file, started = folder / "timings.jsonl", time.time_ns()
    while not (file.exists() and file.stat().st_mtime_ns > started):
        time.sleep(0.002)
        if time.time_ns() - started > 60e9:
            raise SystemExit("the run did not begin within a minute")


WRITING, BETWEEN, BEFORE = "while a checkpoint was written", "between checkpoints", "before the first checkpoint"


def moment(folder: Path) -> str:
    """What a kill strikes, as far as the files tell."""
    checkpoints = folder / "checkpoints"
    if any(checkpoints.glob("*.unfinished")):
        return WRITING
    return BETWEEN if any(checkpoints.glob("step-*")) else BEFORE


def kill(process: int, folder: Path, wanted: str | None, randomness: random.Random) -> str:
    """Kill a run at ``wanted``, or anywhere, and say at what: it is stopped to see where it is, and let go until it is there."""
    for _ in range(2000):
        os.kill(process, signal.SIGSTOP)
        _, status = os.waitpid(process, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            raise SystemExit("the run ended before it was killed: make it longer")
        if wanted in (None, moment(folder)):
            break
        os.kill(process, signal.SIGCONT)
        time.sleep(randomness.uniform(0.0, 0.01))
    struck = moment(folder)
    os.kill(process, signal.SIGKILL)
    wait(process)
    return struck


def main() -> None:
    folder, kills, words = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    assert wait(child(["train", *words, "--out", str(folder / "whole")])) == 0
    randomness = random.Random(0)
    struck: list[str] = []
    killed = folder / "killed"
    while len(struck) < kills:
        begin = ["train", "--resume", str(killed)] if (killed / "config.yaml").exists() else ["train", *words, "--out", str(killed)]
        process = child(begin)
        if randomness.random() < 0.9:  # else it may be killed before it has begun
            wait_for_begin(killed)
        time.sleep(randomness.uniform(0.0, 0.4))
        struck.append(kill(process, killed, (WRITING, BETWEEN, None, None)[len(struck) % 4], randomness))
    assert wait(child(["train", "--resume", str(killed)])) == 0
    print(json.dumps(struck))


if __name__ == "__main__":
    main()
