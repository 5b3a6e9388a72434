"""Other projects' own tests with gradreg in every trainer and no penalty: what fails that does not fail without it?

    python tests/peers/suites.py lightning PATH
    python tests/peers/suites.py transformers PATH
    python tests/peers/suites.py trl PATH

``PATH`` is a checkout of Lightning-AI/pytorch-lightning, huggingface/transformers or huggingface/trl, at the tag of the installed version.
Nothing is fetched, and without a path nothing is run: what TRL's tests download is made on the spot (``hub_stand_in.py``), and tests of
transformers that need the hub fail both ways. Each suite runs once without gradreg and once with it; tests that fail with it only are run
again both ways, alone. The exit status is 1 if any of them is new and not in ``documented``. Tests named after the path are run instead of
all. ``--out benchmarks/results/peer_suites.json`` stores the counts, of which docs/integrations.md has a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
SECONDS = 120
"""Limit for each test."""


@dataclass(frozen=True)
class Suite:
    """Which tests of a project are run.

    Args:
        root: the folder of the checkout to run them in.
        tests: files and folders in ``root``.
        ignored: those left out, with the reason.
        documented: tests that fail with gradreg only, with the reason.
        hub: whether they download models and data sets, for which ``hub_stand_in.py`` stands in.
    """

    root: str
    tests: Sequence[str]
    ignored: Mapping[str, str] = field(default_factory=dict)
    documented: Mapping[str, str] = field(default_factory=dict)
    hub: bool = False


SUITES = {
    "lightning": Suite(
        root="tests",
        tests=(
            "tests_pytorch/loops",
            "tests_pytorch/plugins/precision",
            "tests_pytorch/checkpointing",
            "tests_pytorch/callbacks/test_stochastic_weight_avg.py",
        ),
        ignored={"tests_pytorch/checkpointing/test_legacy_checkpoints.py": "needs checkpoints that are downloaded"},
    ),
    "transformers": Suite(
        root=".",
        tests=("tests/trainer",),
        ignored={"tests/trainer/distributed": "needs several devices"},
    ),
    "trl": Suite(
        root=".",
        tests=tuple(f"tests/test_{name}_trainer.py" for name in ("sft", "dpo", "kto", "reward", "rloo", "grpo")),
        hub=True,
    ),
}


def outcomes(suite: Suite, checkout: Path, inject: str, tests: Sequence[str], hub: Path | None = None) -> dict[str, str]:
    """Run ``tests`` with gradreg injected into the framework ``inject``, or nowhere: the outcome of each.

    Args:
        suite: the suite that they belong to.
        checkout: the project.
        inject: the framework, or "".
        tests: files, folders and tests in the suite's root.
        hub: what ``hub_stand_in.py`` made, if the suite needs it.
    """
    root = checkout / suite.root
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "outcomes.json"
        environment = _environment(root, checkout, hub) | {"GRADREG_INJECT": inject, "GRADREG_OUTCOMES": str(record)}
        command = [sys.executable, "-m", "pytest", "-q", "--color=no", "--tb=no", "-p", "no:cacheprovider", "-p", "inject_gradreg"]
        command += [*(("-p", "hub_stand_in") if hub else ()), f"--timeout={SECONDS}", f"--basetemp={folder}/tmp"]
        command += [*(f"--ignore={path}" for path in suite.ignored), *tests]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        if not record.is_file() or done.returncode not in (0, 1):
            raise RuntimeError(f"pytest must run the suite; got status {done.returncode} and\n{(done.stdout + done.stderr)[-3000:]}")
        return json.loads(record.read_text())


def _environment(root: Path, checkout: Path, hub: Path | None) -> dict[str, str]:
    """The environment of a process without a network."""
    paths = [str(HERE), str(HERE.parents[1] / "src"), str(root), str(checkout), os.environ.get("PYTHONPATH", "")]
    made = {} if hub is None else {"GRADREG_HUB": str(hub), "HF_HUB_CACHE": f"{hub}/hub", "HF_DATASETS_CACHE": f"{hub}/cache"}
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        **made,
    }


def make_hub(suite: Suite, checkout: Path, folder: Path) -> Path | None:
    """Make what the suite downloads, if it does; a process of its own, because the scripts of the checkout run in it."""
    if not suite.hub:
        return None
    command = [sys.executable, str(HERE / "hub_stand_in.py"), str(checkout), str(folder)]
    environment = _environment(checkout / suite.root, checkout, folder)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the checkout's scripts must make its models and data sets; got\n{done.stderr[-3000:]}")
    print(done.stdout, end="", flush=True)
    return folder


def failures(found: Mapping[str, str]) -> set[str]:
    """The tests that failed."""
    return {test for test, outcome in found.items() if outcome == "failed"}


@dataclass(frozen=True)
class Found:
    """What a suite gave.

    Args:
        without: how many tests passed, failed and were skipped without gradreg.
        within: with it.
        new: the tests that fail with it and not without it, also alone.
    """

    without: Mapping[str, int]
    within: Mapping[str, int]
    new: set[str]


def compared(name: str, suite: Suite, checkout: Path, tests: Sequence[str] = ()) -> Found:
    """Run the suite without gradreg and with it, and what fails with it only again both ways, alone."""
    present = [test for test in tests or suite.tests if (checkout / suite.root / test.partition("::")[0]).exists()]
    if not present:
        raise SystemExit(f"the path must be a checkout of {name}; got {checkout}, without {', '.join(tests or suite.tests)}.")
    with tempfile.TemporaryDirectory() as folder:
        hub = make_hub(suite, checkout, Path(folder))
        without, within = (outcomes(suite, checkout, inject, present, hub) for inject in ("", name))
        counts = [{o: list(found.values()).count(o) for o in ("passed", "failed", "skipped")} for found in (without, within)]
        for what, count in zip(("without gradreg", "with gradreg"), counts, strict=True):
            print(f"{what}: " + ", ".join(f"{n} {o}" for o, n in count.items()), flush=True)
        new = sorted(failures(within) - failures(without))
        if new:
            without, within = (outcomes(suite, checkout, inject, new, hub) for inject in ("", name))
        return Found(*counts, failures(within) - failures(without) if new else set())


def store(file: Path, name: str, tests: Sequence[str], found: Found) -> None:
    """Put the counts of a suite, or of some of its tests, into the file of all."""
    held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    held[" ".join([name, *tests])] = {
        "installed": version(name),
        "without": found.without,
        "with": found.within,
        "new": sorted(found.new),
    }
    file.write_text(json.dumps(dict(sorted(held.items())), indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None, suites: Mapping[str, Suite] = SUITES) -> int:
    """Run one suite and print its new failures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=suites)
    parser.add_argument("path", nargs="?", type=Path, help="a checkout of the project; without it nothing is run")
    parser.add_argument("tests", nargs="*", help="files or tests of the suite's root, instead of the whole suite")
    parser.add_argument("--out", type=Path, help="file of the counts of all suites, in which this one's are replaced")
    chosen = parser.parse_args(argv)
    if chosen.path is None:
        print(f"skipped: no checkout of {chosen.suite} is given")
        return 0
    suite = suites[chosen.suite]
    found = compared(chosen.suite, suite, chosen.path.resolve(), chosen.tests)
    new = found.new
    if chosen.out is not None:
        store(chosen.out, chosen.suite, chosen.tests, found)
    for test in sorted(new):
        print(f"new: {test}" + (f" (documented: {suite.documented[test]})" if test in suite.documented else ""))
    print(f"{len(new)} new failures, {len(new & set(suite.documented))} of them documented")
    return int(bool(new - set(suite.documented)))


if __name__ == "__main__":
    sys.exit(main())
