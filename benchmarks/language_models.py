"""What a penalty does in fine-tuning real language models: the studies behind docs/language-models.md, run where they stopped.

    python benchmarks/language_models.py minilm     # classification: tuning, then the verdict on other seeds; about 40 minutes of one core
    python benchmarks/language_models.py smollm     # LoRA: loss, forgetting, loss in 4 bits; about 15 minutes
    python benchmarks/language_models.py grpo       # a reward that can be hacked; about 10 minutes
    python benchmarks/language_models.py --tables   # only the tables and the figure, from what is stored

Complete runs under ``--runs`` are not repeated. What is stored are the results of ``gradreg compare``, without the configurations.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gradreg
from gradreg import GradientPenalty, files
from gradreg.study.comparison import Comparison, resolve_task, run_study
from gradreg.study.executors.local import LocalExecutor
from gradreg.study.history import read_history
from gradreg.study.logged import cell, heading
from gradreg.study.plan import make_plan
from gradreg.study.verdicts import decimals, interval_text
from reporting import command, environment, signature
from tables import markdown

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "examples" / "studies"
RESULTS = Path(__file__).parent / "results" / "language-models"
FIGURE = ROOT / "docs" / "figures" / "language-models-grpo.png"
PACKAGES = ("torch", "transformers")

WRONG = (0.3, 0.0)
RATES = (1e-4, 3e-4, 1e-3)
RADII = {"sam": (0.02, 0.05, 0.1), "fgr": (0.01, 0.05, 0.2)}
TUNING_SEEDS = (100,)
WARMUP = 20
"""Steps without a penalty, of 100."""


def compared(name: str, penalties: Mapping[str, Any], seeds: Sequence[int], out: Path, **options: Any) -> Comparison:
    """The study ``name`` of examples/studies over the given seeds, one run after the other in one process."""
    task = resolve_task(str(STUDIES / f"{name}.py")).configured(options)
    plan = replace(make_plan(task, penalties, seeds=len(seeds), rivals=["epochs"]), seeds=list(seeds))

    def said(record: Any, planned: int) -> None:
        print(f"{out.name} {record.variant} seed {record.seed}: {record.test} {record.logged} {record.seconds:.1f} s", flush=True)

    return run_study(plan, out, executor=LocalExecutor(workers=0), on_record=said)


def validation(found: Comparison) -> dict[str, float]:
    """The mean of the validation metric of each variant; NaN if a run of it diverged."""
    values: dict[str, list[float]] = {}
    for record in found.records:
        values.setdefault(record.variant, []).append(np.nan if record.validation is None else record.validation)
    return {name: float(np.mean(own)) for name, own in values.items()}


def stored(found: Comparison) -> dict[str, Any]:
    """What is kept of a comparison."""
    return {key: value for key, value in found.to_dict().items() if key in ("seeds", "metric", "runs", "table", "logged")}


def built(name: str, radius: float) -> GradientPenalty:
    return gradreg.sam(rho=radius) if name == "sam" else gradreg.fgr(gamma=radius, epsilon=radius)


def minilm(seeds: int, runs: Path) -> dict[str, Any]:
    """Learning rate of plain training, then the radius at that rate, by validation on seeds of their own; then the verdict on others."""
    found: dict[str, Any] = {}
    for wrong in WRONG:
        folder = runs / f"minilm-{wrong:g}"
        rates = {f"{rate:g}": {"penalty": None, "lr": rate} for rate in RATES[1:]}
        by_rate = validation(
            compared("minilm_testament", {"none": None, **rates}, TUNING_SEEDS, folder / "rates", wrong=wrong, lr=RATES[0])
        )
        by_rate = {(f"{RATES[0]:g}" if name == "none" else name): value for name, value in by_rate.items()}
        rate = float(max(by_rate, key=lambda name: np.nan_to_num(by_rate[name])))
        tried = {f"{name}-{radius:g}": built(name, radius) for name, radii in RADII.items() for radius in radii}
        by_radius = validation(compared("minilm_testament", {"none": None, **tried}, TUNING_SEEDS, folder / "radii", wrong=wrong, lr=rate))
        best = {name: max(radii, key=lambda r: np.nan_to_num(by_radius[f"{name}-{r:g}"])) for name, radii in RADII.items()}
        chosen = {**{name: built(name, radius) for name, radius in best.items()}, "auto": gradreg.auto()}
        late = {f"{name}-zero": penalty.warmup("zero", steps=WARMUP) for name, penalty in chosen.items()}
        verdict = compared("minilm_testament", {"none": None, **chosen, **late}, range(seeds), folder / "verdict", wrong=wrong, lr=rate)
        found[f"{wrong:g}"] = {"rate": rate, "rates": by_rate, "radii": by_radius, "best": best, **stored(verdict)}
        files.write_json(runs / "minilm.json", found)
    return {"wrong": found, "tuning_seeds": list(TUNING_SEEDS), "warmup": WARMUP}


def smollm(seeds: int, runs: Path) -> dict[str, Any]:
    """Not tuned: the rate is LoRA's usual one, the radius sets itself or is the reference's."""
    penalties = {"none": None, "fgr": gradreg.fgr(gamma=0.1, epsilon=0.1), "auto": gradreg.auto()}
    return stored(compared("smollm_lora", penalties, range(seeds), runs / "smollm"))


def grpo(seeds: int, runs: Path) -> dict[str, Any]:
    """Penalty off, on as in arXiv 2602.18037, stronger, and the KL penalty; with the way of each run."""
    penalties = {
        "none": None,
        "fgr": gradreg.fgr(gamma=0.01, epsilon=0.001),
        "fgr-10": gradreg.fgr(gamma=0.1, epsilon=0.01),
        "fgr-100": gradreg.fgr(gamma=1.0, epsilon=0.1),
        "kl": {"penalty": None, "beta": 0.04},
    }
    found = compared("grpo_hacked_reward", penalties, range(seeds), runs / "grpo")
    ways = [
        {
            "variant": record.variant,
            "seed": record.seed,
            **{key: [one[key] for one in read_history(found.folder / record.folder)] for key in ("step", "reward", "test_true_score")},
        }
        for record in found.records
    ]
    return {**stored(found), "ways": ways}


def rows_of(results: Mapping[str, Any], scale: float = 1.0) -> list[tuple[str, ...]]:
    """A line for each variant: test, difference, verdict, and what was logged beside it."""
    names = (results.get("logged") or {"names": []})["names"]
    beside = {line["label"]: line for line in (results.get("logged") or {"table": []})["table"]}
    rows: list[tuple[str, ...]] = []
    for row in results["table"]:
        places = decimals(row["deviation"])
        value = "diverged" if row["mean"] is None else f"{row['mean']:.{places}f}"
        value += "" if row["deviation"] is None else f" ± {row['deviation']:.{places}f}"
        verdict = row["difference"] or {}
        told = "" if verdict.get("difference") is None else interval_text(verdict["difference"], verdict["low"], verdict["high"])
        cells = [" ".join(filter(None, cell(beside[row["label"]][name]))) if row["label"] in beside else "" for name in names]
        label = f"{row['label']}, {row['method']}" if row["method"] not in ("no penalty", "plain") else row["label"]
        rows.append((label, value, told, verdict.get("decision", ""), *cells))
    return rows


def header_of(results: Mapping[str, Any], metric: str) -> tuple[str, ...]:
    names = (results.get("logged") or {"names": []})["names"]
    return ("variant", f"test {metric}", "over plain", "verdict", *(heading(name) for name in names))


def table(kind: str, results: Mapping[str, Any]) -> str:
    """The table of ``kind``, from what is stored."""
    end = f"\n\n{signature(dict(results), *PACKAGES)}\n"
    if kind != "minilm":
        found = results["found"]
        return markdown(header_of(found, found["metric"]["name"].replace("_", " ")), rows_of(found)) + end
    rows: list[tuple[str, ...]] = []
    header: tuple[str, ...] = ()
    for wrong, found in results["found"]["wrong"].items():
        share = f"{100 * float(wrong):g} %, rate {found['rate']:g}"
        header = ("wrong labels", *header_of(found, "accuracy, %"))
        rows += [(share, *row) for row in rows_of(found)]
    return markdown(header, rows) + end


def draw(results: Mapping[str, Any]) -> None:
    """Reward and true score over the steps: thin lines the seeds, thick ones their means."""
    from matplotlib.figure import Figure

    ways = results["found"]["ways"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    for color, name in enumerate(dict.fromkeys(way["variant"] for way in ways)):
        own = [way for way in ways if way["variant"] == name]
        for axis, key, title in zip(axes, ("reward", "test_true_score"), ("reward: words of praise", "true score"), strict=True):
            for way in own:
                axis.plot(way["step"], way[key], color=f"C{color}", alpha=0.25, linewidth=0.8)
            axis.plot(own[0]["step"], np.mean([way[key] for way in own], axis=0), color=f"C{color}", label=name)
            axis.set_title(title)
            axis.set_xlabel("step")
    axes[0].legend(frameon=False)
    files.make_directory(FIGURE.parent, purpose="figures")
    figure.savefig(FIGURE, dpi=90)


KINDS = {"minilm": (minilm, 5), "smollm": (smollm, 3), "grpo": (grpo, 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=KINDS, help="which study; all of them, one after the other, if left out")
    parser.add_argument("--seeds", type=int, help="of the verdict (5 for minilm, 3 for the others)")
    parser.add_argument("--runs", type=Path, default=Path("runs/language-models"), help="folder of the runs (runs/language-models)")
    parser.add_argument("--tables", action="store_true", help="only write the tables and the figure of what is stored")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files.make_directory(RESULTS, purpose="results")
    for kind in KINDS if options.kind is None else (options.kind,):
        measure, seeds = KINDS[kind]
        file = RESULTS / f"{kind}.json"
        if not options.tables:
            found = measure(options.seeds or seeds, options.runs.resolve())
            files.write_json(file, {"command": command(), "environment": environment(PACKAGES), "found": found})
        if file.exists():
            results = json.loads(file.read_text(encoding="utf-8"))
            text = table(kind, results)
            print(text)
            files.write_text(RESULTS / f"{kind}.md", text)
            if kind == "grpo":
                draw(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
