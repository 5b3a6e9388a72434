"""Break the PyTorch engine, or the training system, in one place at a time, and see which tests notice.

    python tests/mutations.py            # every mutant, with the tests that fail
    python tests/mutations.py sign norm  # those whose name contains one of the words
    python tests/mutations.py --first    # stop each at the first test that fails: quicker, and enough to see that it does not survive

Each mutant (``mutants.py``) is one replaced text in a temporary copy of ``src``; the tests of ``tests/torch`` that need one process run
against that copy, and against other mutants the tests that each names. The status is 1 if a mutant survives, or if its text is no longer in
the source.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from mutants import ENGINE, MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
LIKELY = {
    "../penalties.py": ("closures", "cost", "family"),
    "../plan.py": ("identities", "family"),
    "../registry.py": ("unknown_parts",),
    "../auto_radius.py": ("auto_radius",),
    "auto_radius.py": ("auto_radius",),
    "buffers.py": ("same_function", "forward_state", "batch_statistics"),
    "closures.py": ("same_function", "forward_state", "aux", "random_numbers", "where_things_are"),
    "decoupled.py": ("family",),
    "directions.py": ("identities", "family", "precision"),
    "draws.py": ("draws",),
    "exact.py": ("where_things_are", "quadratics", "closures"),
    "gradients.py": ("gradients", "restore"),
    "masks.py": ("masks", "family"),
    "mixing.py": ("identities", "family"),
    "norms.py": ("small_numbers", "gradients", "dispatch"),
    "parallel.py": ("same_function", "where_things_are"),
    "perturbation.py": ("quadratics", "restore", "interrupts", "identities", "small_numbers"),
    "regularizer.py": ("auto_radius", "aux", "bad_input", "gradients", "metrics", "family", "cost"),
    "rng.py": ("same_function", "random_numbers"),
    "state.py": ("remembering", "family", "precision", "resume"),
    "step.py": ("auto_radius", "identities", "family", "unreached", "metrics", "precision", "remembering", "gradients", "memory"),
    "watch.py": ("where_things_are",),
}
"""The tests of the engine that come first with ``--first``, by the file that is broken."""


def failures(mutant: Mutant, *, first: bool) -> list[str]:
    """The tests that fail with ``mutant`` in place, or the first of them."""
    likely = LIKELY.get(mutant.file, ()) if first and mutant.tests == ENGINE else ()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        file = source / "gradreg" / "torch" / mutant.file
        text = file.read_text()
        if text.count(mutant.old) != 1:
            raise SystemExit(f"{mutant.name}: its text must be once in {mutant.file}; it is there {text.count(mutant.old)} times.")
        file.write_text(text.replace(mutant.old, mutant.new))
        command = [
            sys.executable,
            "-m",
            "pytest",
            *(f"tests/torch/test_{name}.py" for name in likely),
            *(word if word.startswith("-") or word == "not slow" else f"tests/{word}" for word in mutant.tests),
            "-p",
            "no:cacheprovider",
            "--tb=no",
            "-rfE",
            *(["-x"] if first else []),
        ]
        environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode not in (0, 1):
        raise SystemExit(f"{mutant.name}: pytest ended with {result.returncode}\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", result.stdout, flags=re.MULTILINE)


def summary(failed: list[str]) -> str:
    """``test_file::test_name (count)`` of what failed, parametrized cases together."""
    counts = Counter(name.split("[")[0].replace(".py", "") for name in failed)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.most_common())


def main(words: list[str]) -> int:
    first, words = "--first" in words, [word for word in words if word != "--first"]
    survivors = []
    for mutant in MUTANTS:
        if words and not any(word in mutant.name for word in words):
            continue
        failed = failures(mutant, first=first)
        print(f"{mutant.name}: {len(failed)} failures: {summary(failed) or 'SURVIVES'}", flush=True)
        if not failed:
            survivors.append(mutant.name)
    print(f"survivors: {', '.join(survivors) or 'none'}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
