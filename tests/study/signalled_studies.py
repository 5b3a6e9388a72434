"""Studies that get signals at random moments and are begun again each time; started by test_study_signals.py in a process of its own.

Usage: python signalled_studies.py FOLDER COUNT PAIRS, where FOLDER/words.json maps names of studies to words of ``gradreg compare``. Each
study runs once undisturbed in FOLDER/NAME-whole and then again and again in FOLDER/NAME-signalled, with COUNT signals in all, to its
process, to one of its workers, or to its group; then PAIRS times two writers begin at once in FOLDER/NAME-pair-N. Prints one line of JSON:
each signal, whom it struck, and the exit.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from tests.train.signalled import EXITS, SIGNALS, child, members, nobody_left, wait

SECONDS = 300
"""How long a study may take."""
ENDED_BY_ITS_WORKER = 1
"""What a study may end with, one of whose workers died before any had begun a run; otherwise the run begins again in another."""


def start(words: list[str], out: Path, said: Path) -> int:
    return child(["compare", *words, "--out", str(out)], said)


def workers(group: int) -> list[int]:
    """The worker processes of a study, which lie in its group, and the one that they are forked from."""
    return [process for process, words in members(group) if "spawn_main" in words or "forkserver" in words]


def disturb(folder: Path, name: str, words: list[str], number: signal.Signals, lasts: float, randomness: random.Random) -> str:
    process = start(words, folder / f"{name}-signalled", folder / "said.txt")
    time.sleep(randomness.uniform(0.0, lasts))
    whom = randomness.choice(["process", "group", "worker"])
    own = workers(process)
    whom = whom if whom != "worker" or own else "process"
    target = randomness.choice(own) if whom == "worker" else process
    send = os.killpg if whom == "group" else os.kill
    ran = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    with contextlib.suppress(ProcessLookupError):
        send(target, number)
        if number == signal.SIGSTOP:
            time.sleep(0.1)
            send(target, signal.SIGCONT)
    status = wait(process, SECONDS)
    nobody_left(process)
    right = EXITS[number] if whom != "worker" else {ENDED_BY_ITS_WORKER}
    if status != 0 and status not in right:
        raise SystemExit(f"{number.name} to the {whom} of {name} ended it with {status}")
    return f"{number.name} {whom} {status}, {'while it ran' if ran else 'after its end'}"


def pair(folder: Path, name: str, words: list[str], number: int) -> None:
    said = folder / f"{name}-pair-{number}.txt"
    both = [start(words, folder / f"{name}-pair-{number}", said) for _ in range(2)]
    exits = sorted(wait(process, SECONDS) for process in both)
    for process in both:
        nobody_left(process)
    text = said.read_text()
    known = "already there" if exits == [0, 0] else "must name a folder that no other process writes"
    if exits not in ([0, 0], [0, 2]) or known not in text:
        raise SystemExit(f"two writers ended with {exits}: {text}")


def main() -> None:
    folder, count, pairs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    del sys.modules["__main__"].__file__  # workers need not import this file
    studies: dict[str, list[str]] = json.loads((folder / "words.json").read_text())
    lasts: dict[str, float] = {}
    for name, words in studies.items():
        begun = time.monotonic()
        if wait(start(words, folder / f"{name}-whole", folder / "said.txt"), SECONDS):
            raise SystemExit((folder / "said.txt").read_text())
        lasts[name] = time.monotonic() - begun
    randomness, struck = random.Random(count), list[str]()
    while len(struck) < count:
        name = list(studies)[len(struck) // len(SIGNALS) % len(studies)]
        signalled = folder / f"{name}-signalled"
        if (signalled / "results.json").exists():  # it has come to its end: the next one begins anew
            signalled.rename(folder / f"{name}-ended-{len(struck)}")
        struck.append(disturb(folder, name, studies[name], SIGNALS[len(struck) % len(SIGNALS)], lasts[name], randomness))
    for name, words in studies.items():
        if not (folder / f"{name}-signalled" / "results.json").exists() and wait(
            start(words, folder / f"{name}-signalled", folder / "said.txt"), SECONDS
        ):
            raise SystemExit((folder / "said.txt").read_text())
    for number in range(pairs):
        name = list(studies)[number % len(studies)]
        pair(folder, name, studies[name], number)
    print(json.dumps(struck))


if __name__ == "__main__":
    main()
