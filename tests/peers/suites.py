"""Other projects' own tests with gradreg in every trainer and no penalty: what fails that does not fail without it?

    python tests/peers/suites.py lightning PATH
    python tests/peers/suites.py transformers PATH

``PATH`` is a checkout of Lightning-AI/pytorch-lightning or huggingface/transformers, at the tag of the installed version. Nothing is
fetched, and without a path nothing is run. Each suite runs once without gradreg and once with it; tests that fail with it only are run
again both ways, alone. The exit status is 1 if any of them is new and not in ``documented``.
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
    """

    root: str
    tests: Sequence[str]
    ignored: Mapping[str, str] = field(default_factory=dict)
    documented: Mapping[str, str] = field(default_factory=dict)


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
}


def outcomes(suite: Suite, checkout: Path, inject: str, tests: Sequence[str]) -> dict[str, str]:
    """Run ``tests`` with gradreg injected into the framework ``inject``, or nowhere: the outcome of each."""
    root = checkout / suite.root
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "outcomes.json"
        paths = [str(HERE), str(HERE.parents[1] / "src"), str(root), str(checkout), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
            "PYTHONDONTWRITEBYTECODE": "1",
            "GRADREG_INJECT": inject,
            "GRADREG_OUTCOMES": str(record),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "--color=no", "--tb=no", "-p", "no:cacheprovider", "-p", "inject_gradreg"]
        command += [f"--timeout={SECONDS}", f"--basetemp={folder}/tmp", *(f"--ignore={path}" for path in suite.ignored), *tests]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        if not record.is_file() or done.returncode not in (0, 1):
            raise RuntimeError(f"pytest must run the suite; got status {done.returncode} and\n{(done.stdout + done.stderr)[-3000:]}")
        return json.loads(record.read_text())


def failures(found: Mapping[str, str]) -> set[str]:
    """The tests that failed."""
    return {test for test, outcome in found.items() if outcome == "failed"}


def new_failures(name: str, suite: Suite, checkout: Path) -> set[str]:
    """The tests that fail with gradreg and not without it, also alone."""
    present = [test for test in suite.tests if (checkout / suite.root / test).exists()]
    if not present:
        raise SystemExit(f"the path must be a checkout of {name}; got {checkout}, without {', '.join(suite.tests)}.")
    without, within = (outcomes(suite, checkout, inject, present) for inject in ("", name))
    for what, found in (("without gradreg", without), ("with gradreg", within)):
        count = {o: list(found.values()).count(o) for o in ("passed", "failed", "skipped")}
        print(f"{what}: " + ", ".join(f"{n} {o}" for o, n in count.items()), flush=True)
    new = sorted(failures(within) - failures(without))
    if not new:
        return set()
    without, within = (outcomes(suite, checkout, inject, new) for inject in ("", name))
    return failures(within) - failures(without)


def main(argv: Sequence[str] | None = None, suites: Mapping[str, Suite] = SUITES) -> int:
    """Run one suite and print its new failures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=suites)
    parser.add_argument("path", nargs="?", type=Path, help="a checkout of the project; without it nothing is run")
    chosen = parser.parse_args(argv)
    if chosen.path is None:
        print(f"skipped: no checkout of {chosen.suite} is given")
        return 0
    suite = suites[chosen.suite]
    new = new_failures(chosen.suite, suite, chosen.path.resolve())
    for test in sorted(new):
        print(f"new: {test}" + (f" (documented: {suite.documented[test]})" if test in suite.documented else ""))
    print(f"{len(new)} new failures, {len(new & set(suite.documented))} of them documented")
    return int(bool(new - set(suite.documented)))


if __name__ == "__main__":
    sys.exit(main())
