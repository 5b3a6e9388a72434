"""The tables of docs/results.md: the claims of benchmarks/paper_registry.py, judged from the results that are stored."""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from table import markdown

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # last, so that no file there hides one of docs/ with the same name

from paper_claims import ROOT as REPOSITORY  # noqa: E402  # after the path is known
from paper_claims import STORED, Claim, Measured, values, verdict  # noqa: E402
from paper_experiments import FRAMEWORKS  # noqa: E402
from paper_registry import CLAIMS  # noqa: E402

ORDER = ("reproduced", "within noise", "not reproduced", "not run")


def papers() -> str:
    """A row for each claim: what is published, what was measured here, and the verdict."""
    rows: list[tuple[str, ...]] = []
    for number, claim in enumerate(CLAIMS, 1):
        found = claim.found()
        rows.append((str(number), linked(claim.source), claim.says, claim.published, ours(claim, found), verdict(found, claim.bounds)))
    return markdown(("", "source", "claim", "published", "ours", "verdict"), rows)


def paper_runs() -> str:
    """The same rows: the paper's setting and ours, what is judged, seeds, command, hardware and hours."""
    rows: list[tuple[str, ...]] = []
    for number, claim in enumerate(CLAIMS, 1):
        found = claim.found()
        if found is None:
            rows.append((str(number), claim.setting, f"not run: needs {needs(claim)}", "", "", "", ""))
            continue
        content = claim.stored()
        stored: dict[str, Any] = content if isinstance(content, dict) else {}
        setting = claim.ours or stored["shortened"]
        made = f"`{claim.command or stored['command']}`"
        rows.append((str(number), claim.setting, setting, claim.meaning, found.seeds, made, f"{machine(stored)}{hours(claim, stored)}"))
    return markdown(("", "setting of the paper", "ours", "judged by", "over", "command", "hardware, hours"), rows)


def paper_count() -> str:
    """How many claims have which verdict."""
    count = Counter(verdict(claim.found(), claim.bounds) for claim in CLAIMS)
    said = ", ".join(f"{count[name]} {name}" for name in ORDER)
    return f"Of {len(CLAIMS)} claims: {said}.\n"


def ours(claim: Claim, found: Measured | None) -> str:
    """The number, or why there is none."""
    return f"not run: needs {needs(claim)}" if found is None else found.text


def needs(claim: Claim) -> str:
    """What is lacking."""
    return claim.lacking or "the time on two cores: `python benchmarks/papers.py --root DATA`"


def linked(source: str) -> str:
    """The arXiv numbers of a source as links."""
    words = [f"[{w}](https://arxiv.org/abs/{w})" if w[:4].isdecimal() and "." in w else w for w in source.replace(",", " ,").split()]
    return " ".join(words).replace(" ,", ",")


def machine(stored: dict[str, Any]) -> str:
    """The processor, and its threads."""
    made = stored.get("environment", {})
    name = made.get("device") or made.get("processor")
    threads = made.get("threads") or made.get("torch_threads")
    return f"{name}, {threads} thread" if name and threads == 1 else str(name or "two cores")


def hours(claim: Claim, stored: dict[str, Any]) -> str:
    """Hours of the processor."""
    if isinstance(stored.get("hours"), dict):
        return f", {stored['hours']['processor']:.2f} h"
    return f", {claim.hours} h" if claim.hours else ""


def frameworks() -> str:
    """The same task in JAX and in PyTorch: test accuracies of each framework's runs."""
    rows: list[tuple[str, ...]] = []
    for one in FRAMEWORKS:
        path = REPOSITORY / STORED / f"{one.name}.json"
        if not path.is_file():
            rows.append((one.shortened, "not run", "", f"`{one.command()}`"))
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        accuracies = [list(values(found, variant).values()) for variant in one.penalties]
        shown = [f"{statistics.mean(own):.2f} ± {statistics.stdev(own):.2f}" for own in accuracies]
        rows.append((f"{one.shortened}, {len(accuracies[0])} seeds", *shown, f"`{found['command']}`"))
    return markdown(("task", "plain, %", "with GNP, %", "command"), rows)
