"""Break the PyTorch engine in one place at a time, and see which tests notice.

    python tests/mutations.py            # every mutant, with the tests that fail
    python tests/mutations.py sign norm  # those whose name contains one of the words
    python tests/mutations.py --first    # stop each at the first test that fails: quicker, and enough to see that it does not survive

Each mutant is one replaced text in a temporary copy of ``src``; the tests of ``tests/torch`` that need one process run against that copy. The status is 1 if a
mutant survives, or if its text is no longer in the source.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# ruff: noqa: E501

ROOT = Path(__file__).resolve().parents[1]
SEVERAL_PROCESSES = ("test_data_parallel.py", "test_fsdp.py")


@dataclass(frozen=True)
class Mutant:
    """``old`` becomes ``new`` in ``src/gradreg/torch/<file>``."""

    name: str
    file: str
    old: str
    new: str


MUTANTS = (
    Mutant("sign of the perturbation reversed", "step.py", "self.perturbation.move(moved, gradients, distance)", "self.perturbation.move(moved, gradients, -distance)"),
    Mutant("perturbation removed", "step.py", "self.perturbation.move(moved, gradients, distance)", "self.perturbation.move(moved, gradients, distance * 0)"),
    Mutant("normalization dropped", "step.py", "safe_ratio(place * (radius if first.weight > 0 else -radius), norm)", "place * (radius if first.weight > 0 else -radius)"),
    Mutant("sign of a negative weight forgotten", "step.py", "radius if first.weight > 0 else -radius", "radius"),
    Mutant("weight of the first pass forgotten in the step", "step.py", "distance = place * radius / first.weight", "distance = place * radius"),
    Mutant("(1 - c) forgotten", "../stencils.py", "at_theta=1.0 - c", "at_theta=1.0"),
    Mutant("backward difference with the forward's weight", "../stencils.py", "at_theta=1.0 + c, moved=((-1, -c),)", "at_theta=1.0 - c, moved=((-1, c),)"),
    Mutant("central difference not halved", "../stencils.py", "((+1, c / 2), (-1, -c / 2))", "((+1, c), (-1, -c))"),
    Mutant("mirror at the wrong place", "perturbation.py", "self._moved_copies, 2.0)", "self._moved_copies, 1.0)"),
    Mutant(
        "restore by subtraction",
        "perturbation.py",
        "torch._foreach_copy_(self._moved, self._moved_copies)",
        "torch._foreach_sub_(self._moved, [p - c for p, c in zip(self._moved, self._moved_copies, strict=True)])",
    ),
    Mutant("no restore after an exception", "step.py", "        finally:\n            self.perturbation.restore()\n", "        else:\n            self.perturbation.restore()\n        finally:\n"),
    Mutant("gradients not put back after an exception", "step.py", "                p.grad = gradient\n            raise", "                pass\n            raise"),
    Mutant("RNG not replayed", "step.py", "self.random_numbers.restore(drawn[i])", "pass"),
    Mutant("RNG captured once for all micro-batches", "step.py", "self.random_numbers.restore(drawn[i])", "self.random_numbers.restore(drawn[0])"),
    Mutant("BatchNorm not frozen", "step.py", "            if self.buffers is not None:\n                self.buffers.restore()\n        return loss", "        return loss"),
    Mutant("buffers told by the version counter alone", "replay.py", "buffer.dim() == 1 and buffer.is_floating_point()", "False"),
    Mutant("replaced buffers missed", "replay.py", "before[0] is not buffer or ", ""),
    Mutant("earlier gradients enter the norm", "step.py", "        for p in self.trainable:\n            p.grad = None\n        try:", "        try:"),
    Mutant("earlier gradients lost", "step.py", "                    self._add_to_gradients(earlier)", "                    pass"),
    Mutant("zero gradient divided by", "perturbation.py", "numerator / norm.clamp_min(_SMALLEST_NORM)", "numerator / norm"),
    Mutant("selection ignored", "regularizer.py", "perturbed=[p for p in self._perturbed if p.requires_grad]", "perturbed=trainable"),
    Mutant("unit mixing not normalised", "step.py", "ratio_or_zero(1.0 - coefficient, norm)", "torch.tensor(1.0 - coefficient)"),
    Mutant("no warm-up clock", "regularizer.py", "        self._step += 1\n", ""),
    Mutant("two passes at strength 0", "regularizer.py", "if self.penalty is None or strength == 0.0:", "if self.penalty is None:"),
    Mutant("loss of the last pass returned", "step.py", "                if this.place == 0:\n                    loss = evaluated", "                loss = evaluated"),
    Mutant("first gradient held beside the second", "step.py", "            del gradients ", "            pass "),
    Mutant("norm waited for", "perturbation.py", "    return norms[0] if len(norms) == 1 else _norm_of(norms)", "    return norms[0] if float(norms[0]) and len(norms) == 1 else _norm_of(norms)"),
    Mutant("exact strength not divided by the norm", "step.py", "factor = (strength if penalty.power == 2 else safe_ratio(strength, norm))", "factor = strength"),
    Mutant("exact direction of each micro-batch alone", "step.py", "held = direction if direction is not None else", "held ="),
)  # fmt: skip


def failures(mutant: Mutant, *, first: bool) -> list[str]:
    """The tests that fail with ``mutant`` in place, or the first of them."""
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
            "tests/torch",
            *(f"--ignore=tests/torch/{name}" for name in SEVERAL_PROCESSES),
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
    return re.findall(r"^(?:FAILED|ERROR) tests/torch/(\S+)", result.stdout, flags=re.MULTILINE)


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
