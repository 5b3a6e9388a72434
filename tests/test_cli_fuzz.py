"""Whatever is typed, written or left in a folder: an answer in words within two seconds, and status 2 where the user can mend it.

``make test`` takes a sample, ``--soak`` all 5,000; both are functions of the number of the case.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from gradreg import cli
from gradreg.train.arguments import keys_of_configuration

pytestmark = pytest.mark.slow

CASES = [pytest.param(range(0, 5000, 100)), pytest.param(range(5000), marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
IDS = ["sample", "all"]
SECONDS = 2

FRAGMENTS = [
    *(
        "",
        "-",
        "-1",
        "0",
        "1e3",
        "1e999",
        ".nan",
        "-.inf",
        "null",
        "~",
        "no",
        "On",
        "1:30",
        "010",
        "2020-01-01",
        "2020-02-31",
        "true",
        "'",
        '"',
    ),
    *(
        "[",
        "]",
        "{",
        "}",
        "[]",
        "{}",
        "[[[[",
        "{a: {b: {c: ",
        "&a [*a]",
        "*a",
        "&a",
        "<<: *a",
        "? x",
        "? [x]",
        "|",
        ">",
        "%",
        "@",
        "`",
        "#",
        ":",
        ": :",
    ),
    *(
        "!!python/object:os.system x",
        "!!int ''",
        "!x",
        "${oc.env:HOME}",
        "{name: sam, rho: 0.1}",
        "{name: mlp, name: mlp}",
        "\x00",
        "\x1b[31m",
    ),
    *("\udcff", "é", "\u2028", "\u202e", "\t", "../..", "/", "/dev/null", "/proc/self/mem", "a" * 300, "9" * 400, "[" * 2000, "- " * 2000),
]
WORDS = ["sam", "fgr", "mlp", "digits", "folder", "sgd", "cosine", "name", "rho", "kind", "epochs", "variants", "auto"]


def shipped_texts() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(Path(str(resources.files("gradreg") / "recipes")).glob("*.yaml"))]


def spoiled(text: str, dice: random.Random) -> bytes:
    """``text`` with up to four changes of lines, values, characters or bytes."""
    content = text.encode("utf-8", "surrogateescape")
    for _ in range(dice.randint(1, 4)):
        lines = content.split(b"\n")
        at, other = dice.randrange(len(lines)), dice.randrange(len(lines))
        fragment = dice.choice([*FRAGMENTS, *WORDS]).encode("utf-8", "surrogatepass" if dice.random() < 0.5 else "replace")
        kind = dice.randrange(9)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(other, lines[at])
        elif kind == 2:
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 3:
            lines[at] = lines[at].partition(b":")[0] + b": " + fragment
        elif kind == 4:
            lines.insert(at, fragment + b": " + lines[other])
        elif kind == 5:
            lines[at] = b"  " * dice.randint(0, 40) + lines[at]
        content = b"\n".join(lines)
        place = dice.randrange(len(content) + 1)
        if kind == 6:
            content = content[:place]
        elif kind == 7:
            content = content[:place] + dice.choice([fragment, dice.randbytes(3).translate(None, b"0123456789")]) + content[place:]
        elif kind == 8:
            content = content[:place] + content[place + dice.randint(1, 20) :]
    return content


def recipe(dice: random.Random) -> bytes:
    if dice.random() < 0.15:
        return dice.randbytes(dice.randint(0, 400))
    if dice.random() < 0.1:
        return (dice.choice(FRAGMENTS) * dice.randint(1, 50)).encode("utf-8", "replace")
    return spoiled(dice.choice(shipped_texts()), dice)


KEYS = ["penalty.name", "penalty.rho", "model.name", "variant", "weights", "split", "json", "seed", "resume"]


def words(dice: random.Random, keys: Sequence[str] = ()) -> list[str]:
    """Options of a command line, most of them among ``keys``, or keys of the configuration; some with values of the right kind."""
    found: list[str] = []
    keys = keys or [*keys_of_configuration(), *KEYS]
    for _ in range(dice.randint(0, 3)):
        key = dice.choice(keys) if dice.random() < 0.9 else dice.choice(FRAGMENTS)
        value = dice.choice([*FRAGMENTS, *WORDS, str(dice.randint(-5, 5)), str(dice.random())])
        found += dice.choice([[f"--{key}", value], [f"--{key}={value}"], [value], [f"--{key}"]])
    return found


def answer(argv: list[str], capsys: pytest.CaptureFixture[str], statuses: tuple[int, ...] = (0, 2)) -> str:
    """The errors of a command; its status, its manners and its time are checked. Of status 1 what it says of failed runs."""
    capsys.readouterr()
    started = time.process_time()
    try:
        status = cli.main(argv)
    except SystemExit as end:  # --help
        status = end.code
    spent = time.process_time() - started
    shown = capsys.readouterr()
    about = f"{argv!r}: {status}, {spent:.1f} s\n{shown.out[-500:]}\n{shown.err[-2000:]}"
    assert status in statuses, about
    assert spent < SECONDS, about
    assert "Traceback" not in shown.out + shown.err, about
    assert "object at 0x" not in shown.err, about
    assert "\x1b" not in shown.err, about
    if status == 2:
        assert shown.err.startswith("gradreg: error: "), about
        assert len(shown.err.strip()) > len("gradreg: error: ..."), about
    return shown.err if status != 1 else "".join(line for line in shown.out.splitlines() if "runs failed, the first with" in line)


@pytest.fixture(scope="module")
def nowhere(tmp_path_factory) -> str:
    """A place where no folder can be made, so that a run that is accepted ends before it trains."""
    file = tmp_path_factory.mktemp("nowhere") / "file"
    file.touch()
    return str(file / "run")


@pytest.mark.parametrize("cases", CASES, ids=IDS)
def test_recipes_and_raw_bytes(cases, nowhere, tmp_path, capsys):
    cli.main(["train", "digits-noisy-labels", "--out", nowhere])  # imports what takes seconds
    path = tmp_path / "recipe.yaml"
    refused = 0
    for case in cases:
        path.write_bytes(recipe(random.Random(case)))
        refused += "must name a folder that can be written to" not in answer(["train", str(path), "--out", nowhere], capsys)
    assert refused > len(cases) / 2  # the changes are no trifles


@pytest.mark.parametrize("cases", CASES, ids=IDS)
def test_command_lines(cases, nowhere, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["train", "digits-noisy-labels", "--out", nowhere])
    for case in cases:
        dice = random.Random(case)
        begin = dice.choice(
            [
                ["train", "digits-noisy-labels"],
                ["train"],
                ["evaluate", str(tmp_path)],
                ["evaluate"],
                ["lab", "stability"],
                ["lab"],
                ["recipes"],
                [],
            ]
        )
        end = ["--out", nowhere] if begin and begin[0] in ("train", "lab") else []
        answer([*begin, *words(dice), *end], capsys)


STUDY_KEYS = [
    "lr",
    "wait",
    "die",
    "penalties",
    "penalty",
    "seeds",
    "rivals",
    "margin",
    "until",
    "max-seeds",
    "workers",
    "executor",
    "trials",
]
STUDY_KEYS += ["search", "confirm", "storage", "seed", "epochs", "data.root", "threads", "partial"]
STUDY_KEYS += ["weight-decay", "batch-size", "samples", "momentum", "to-lr", "to-batch-size", "to-samples"]


@pytest.mark.parametrize("cases", CASES, ids=IDS)
def test_command_lines_of_studies(cases, nowhere, tmp_path, capsys, monkeypatch):
    """``compare``, ``tune``, ``sharpness`` and ``l2``, of recipes and of a function; none can train, because nothing can be written."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text((Path(__file__).parent / "study" / "short_task.py").read_text())
    beginnings = [
        ["compare", "mine.py"],
        ["compare", "digits-noisy-labels"],
        ["compare"],
        ["tune", "mine.py", "--penalty", "sam"],
        ["tune", "digits-noisy-labels"],
        ["sharpness", str(tmp_path)],
        ["sharpness"],
        ["l2", "clock", "--lr", "0.1", "--weight-decay", "1e-3", "--batch-size", "100", "--samples", "1000"],
        ["l2"],
    ]
    for begin in beginnings[:2]:  # they import what takes seconds
        assert cli.main([*begin, "--penalties", "sam:rho=0.1", "--out", nowhere]) == 2
    for case in cases:
        dice = random.Random(case)
        begin = dice.choice(beginnings)
        end = ["--out", nowhere] if begin[0] in ("compare", "tune") else []
        answer([*begin, *words(dice, STUDY_KEYS), *end], capsys)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "run"
    keys = ["--epochs", "2", "--data.train_size", "200", "--data.validation", "50", "--model.hidden", "[8]", "--trackers", "[]"]
    assert cli.main(["train", "digits-noisy-labels", *keys, "--checkpoint.every_epochs", "1", "--out", str(path)]) == 0
    return path


def truncated(content: bytes, dice: random.Random) -> bytes:
    return content[: dice.randrange(len(content) + 1)]


def other_bytes(content: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(content) + 1)
    return content[:at] + dice.randbytes(4).translate(None, b"0123456789") + content[at + dice.choice([0, 4]) :]


def written_over(content: bytes, dice: random.Random) -> bytes:
    return dice.choice([b"", b"{}", b"[]", b"null", b"3", b"NaN", b"\xff\xfe", b"[" * 100_000, b'{"diverged": 1}', dice.randbytes(50)])


DAMAGE: list[Callable[[bytes, random.Random], bytes]] = [truncated, other_bytes, written_over]


def misplace(path: Path, targets: list[Path], dice: random.Random) -> None:
    """Put something else in the place of a file: nothing, a folder, a link, a FIFO, or another of the files."""
    kind = dice.randrange(7)
    other = dice.choice(targets)
    content = path.read_bytes()
    path.unlink()
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(path.name)  # a loop
    elif kind == 3:
        path.symlink_to(path.with_name("nowhere"))
    elif kind == 4:
        os.mkfifo(path)
    elif kind == 5 and other.is_file():
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == 6:
        moved = path.with_name(f"{path.name}.moved")
        moved.write_bytes(content)
        path.symlink_to(moved)


def damage(folder: Path, dice: random.Random) -> None:
    """Damage one file of ``folder`` or two."""
    targets = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in dice.sample(targets, dice.randint(1, 2)):
        if not path.is_file():  # exchanged for another, or moved
            continue
        if dice.random() < 0.5:
            misplace(path, targets, dice)
        else:
            path.write_bytes(dice.choice(DAMAGE)(path.read_bytes(), dice))


FOLDERS = [pytest.param(range(0, 500, 25)), pytest.param(range(500), marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]


@pytest.mark.parametrize("cases", FOLDERS, ids=IDS)
def test_damaged_run_folders(cases, run, tmp_path, capsys):
    weights, configuration = ((run / name).read_bytes() for name in ("weights.safetensors", "config.yaml"))
    for case in cases:
        dice = random.Random(case)
        copy = tmp_path / str(case)
        shutil.copytree(run, copy)
        damage(copy, dice)
        resumes = dice.random() < 0.5
        if resumes and dice.random() < 0.7 and (copy / "result.json").is_file():
            (copy / "result.json").unlink()
        incomplete = not os.path.lexists(copy / "result.json")
        known = (copy / "config.yaml").is_file() and (copy / "config.yaml").read_bytes() == configuration
        said = answer(["train", "--resume", str(copy)] if resumes else ["evaluate", str(copy), "--json"], capsys)
        if resumes and incomplete and known and not said:
            assert (copy / "weights.safetensors").read_bytes() == weights, case
        shutil.rmtree(copy)


TASK = """
from gradreg import study

class Counted:
    def __init__(self): self.step, self.metrics, self.regularizer = 0, {"evaluations": 0}, None

@study.task(metric="error", mode="min")
def train(run: study.Run) -> None:
    made = Counted()
    made.regularizer = made
    run.count(made)
    for epoch in run.epochs(3):
        made.step += 1
        made.metrics["evaluations"] += 1 if run.penalty is None else 2
        run.log(test_error=1 / (run.seed + epoch + 1), validation_error=0.5, loss=0.1)
"""


@pytest.fixture(scope="module", params=["recipe", "function"])
def study(request, tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "mine.py").write_text(TASK)
    keys = ["--epochs", "1", "--data.train_size", "100", "--data.validation", "50", "--model.hidden", "[8]"]
    task = {"recipe": ["digits-noisy-labels", *keys], "function": [str(folder / "mine.py")]}[request.param]
    words = ["compare", *task, "--penalties", "none", "sam:rho=0.1", "--seeds", "2", "--workers", "0"]
    assert cli.main([*words, "--out", str(folder / "study")]) == 0
    return folder / "study", words


def numbers(folder: Path) -> Any:
    """What a study found, without times."""
    found = json.loads((folder / "results.json").read_text())
    return [{k: v for k, v in run.items() if k != "seconds"} for run in found["runs"]], [row["mean"] for row in found["table"]]


@pytest.mark.parametrize("cases", FOLDERS, ids=IDS)
def test_damaged_study_folders(cases, study, tmp_path, capsys):
    whole, words = study
    for case in cases:
        dice = random.Random(case)
        copy = tmp_path / str(case)
        shutil.copytree(whole, copy)
        for _ in range(dice.randint(1, 2)):
            damage(copy if dice.random() < 0.3 else dice.choice(sorted(copy.glob("runs/*/*"))), dice)
        said = answer([*words, "--out", str(copy)], capsys, (0, 1, 2))
        if not said:
            assert numbers(copy) == numbers(whole), case
        shutil.rmtree(copy)
