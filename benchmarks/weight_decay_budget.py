"""At one budget: a grid of constant L2, the L2 that a probe of 5 % of the budget predicts, and AutoL2. On MNIST and on digits.

    python benchmarks/weight_decay_budget.py --task digits
    python benchmarks/weight_decay_budget.py --task mnist --root DATA     # about 10 minutes of one core; finished runs are kept
    python benchmarks/weight_decay_budget.py --figures                    # the table and the picture of stored results

The runs are variants of the recipes l2-fc-digits and l2-fc-mnist. ``DATA`` holds MNIST/raw (torchvision's layout).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from gradreg import files
from gradreg.study.statistics import paired_difference

RESULTS = Path(__file__).parent / "results" / "weight-decay"
FIGURES = Path(__file__).parents[1] / "docs" / "figures" / "weight-decay"
SEEDS = (0, 1, 2)
GRID = ("l2-1e-4", "l2-3e-4", "l2-1e-3", "l2-3e-3", "l2-1e-2", "l2-3e-2", "l2-1e-1")
OTHERS = ("l2-0", "auto", "auto-on-the-clock")
PROBES: dict[str, dict[str, Any]] = {
    "mnist": {"probe_epochs": 2, "probe_l2": 0.2, "measure_every": 5},
    "digits": {"probe_epochs": 5, "probe_l2": 0.4, "measure_every": 2},
}


def run(task: str, root: str | None) -> None:
    """Run what is missing of a task's variants and seeds."""
    from gradreg.study import l2_probe
    from gradreg.train import recipe as recipes
    from gradreg.train.loop import train
    from gradreg.train.recipe import configuration

    path = RESULTS / f"budget-{task}.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"runs": [], "probes": []}
    recipe = recipes.load(f"l2-fc-{task}")
    base = recipes.merge(recipe.base, {"data": {"root": root or "data"}, "device": "cpu"})
    for seed in SEEDS:
        probed = next((p for p in stored["probes"] if p["seed"] == seed), None)
        if probed is None:
            plan = l2_probe.make_plan(configuration({**base, "seed": seed}), budget_epochs=base["epochs"], **PROBES[task])
            found = l2_probe.run_probe(plan)
            probed = {"seed": seed, "share of the budget": plan.share, **found.result()}
            stored["probes"].append(probed)
            files.write_text(path, json.dumps(stored) + "\n")
            print(
                task,
                seed,
                "probe: t*",
                found.best_step,
                "of",
                found.probe_steps,
                "c",
                found.constant,
                "L2",
                probed["predicted_l2"],
                flush=True,
            )
        for variant in ("predicted", *OTHERS, *GRID):
            if any(r["variant"] == variant and r["seed"] == seed for r in stored["runs"]):
                continue
            settings = {**recipe.settings("l2-0" if variant == "predicted" else variant, base=base), "seed": seed}
            if variant == "predicted":
                if probed["predicted_l2"] is None:
                    continue
                settings = recipes.merge(settings, {"optimizer": {"weight_decay": probed["predicted_l2"]}})
            history = train(configuration(settings)).history
            stored["runs"].append(
                {
                    "variant": variant,
                    "seed": seed,
                    "test": [round(float(e.test_accuracy), 6) for e in history],
                    "validation": [round(e.validation_accuracy or 0.0, 6) for e in history],
                    "weight decay": [e.weight_decay for e in history],
                }
            )
            files.write_text(path, json.dumps(stored) + "\n")
            print(task, seed, variant, history[-1].test_accuracy, flush=True)


def epochs_to(run: dict[str, Any], accuracy: float) -> int | None:
    """The first epoch after which the run has ``accuracy``; None if it never has."""
    return next((i + 1 for i, value in enumerate(run["test"]) if value >= accuracy), None)


def table(task: str) -> dict[str, Any]:
    """Final accuracies and times, mean over the seeds, with differences to the best constant of the grid, paired by seed."""
    stored = json.loads((RESULTS / f"budget-{task}.json").read_text())
    runs = {(r["variant"], r["seed"]): r for r in stored["runs"]}
    names = [*OTHERS, *GRID, "predicted"]
    final = {name: {s: 100 * runs[name, s]["test"][-1] for s in SEEDS if (name, s) in runs} for name in names}
    best = max(GRID, key=lambda name: np.mean(list(final[name].values())))
    goal = {s: 0.99 * final[best][s] / 100 for s in SEEDS}
    rows: dict[str, Any] = {}
    for name in names:
        if not final[name]:
            continue
        own = [epochs_to(runs[name, s], 0.99 * final[name][s] / 100) for s in final[name]]
        bests = [epochs_to(runs[name, s], goal[s]) for s in final[name]]
        difference = paired_difference(final[name], final[best])
        rows[name] = {
            "accuracy": float(np.mean(list(final[name].values()))),
            "sd": float(np.std(list(final[name].values()), ddof=1)) if len(final[name]) > 1 else None,
            "over the best constant": None if difference is None or name == best else [difference.mean, difference.low, difference.high],
            "epochs to 99 % of its own": own,
            "epochs to 99 % of the best constant's": bests,
        }
    probes = [
        {k: p[k] for k in ("seed", "best_step", "probe_steps", "constant", "predicted_l2", "share of the budget")} for p in stored["probes"]
    ]
    return {"best constant": best, "rows": rows, "probes": probes}


def figure(tables: dict[str, Any]) -> None:
    """Accuracy at the budget against L2, with the predictions and AutoL2 beside it; and how AutoL2 moves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    for axis, (task, found) in zip(axes, tables.items(), strict=False):
        rows = found["rows"]
        values = [float(name.removeprefix("l2-")) for name in GRID]
        axis.errorbar(
            values, [rows[n]["accuracy"] for n in GRID], [rows[n]["sd"] for n in GRID], fmt="o-", color="#0072B2", label="constant L2"
        )
        for name, colour, style in (("l2-0", "#666666", "-"), ("auto", "#D55E00", "--"), ("auto-on-the-clock", "#CC79A7", "-.")):
            axis.axhline(rows[name]["accuracy"], color=colour, linestyle=style, label={"l2-0": "no L2"}.get(name, name))
        predicted = [p["predicted_l2"] for p in found["probes"] if p["predicted_l2"]]
        if "predicted" in rows:
            axis.plot(
                [float(np.exp(np.mean(np.log(predicted))))], [rows["predicted"]["accuracy"]], "*", ms=14, color="#009E73", label="predicted"
            )
        for value in predicted:
            axis.axvline(value, color="#009E73", alpha=0.4, linewidth=1)
        low = rows["l2-0"]["accuracy"] - 1.5
        axis.set(xscale="log", xlabel="L2", ylim=(low, low + 3.5), title=f"{task}, mean ± sd of {len(SEEDS)} seeds")
        below = [f"{name.removeprefix('l2-')}: {rows[name]['accuracy']:.1f} %" for name in GRID if rows[name]["accuracy"] < low]
        axis.text(0.01, 0.02, "below: " + ", ".join(below), transform=axis.transAxes, fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("test accuracy at the budget, %")
    picture.tight_layout()
    picture.savefig(FIGURES / "budget.png", dpi=90)

    picture, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    stored = json.loads((RESULTS / "budget-mnist.json").read_text())
    colours = {tables["mnist"]["best constant"]: "#0072B2", "l2-0": "#666666", "auto": "#D55E00", "auto-on-the-clock": "#CC79A7"}
    for name, colour in colours.items():
        runs = [r for r in stored["runs"] if r["variant"] == name]
        epochs = np.arange(1, len(runs[0]["test"]) + 1)
        left.plot(epochs, 100 * np.mean([r["test"] for r in runs], axis=0), color=colour, label="no L2" if name == "l2-0" else name)
        for k, r in enumerate(runs):
            if name != "l2-0":
                right.step(epochs, r["weight decay"], color=colour, alpha=0.6, where="mid", label=None if k else name)
    left.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(91, 96), title=f"mnist, mean of {len(SEEDS)} seeds")
    right.set(xlabel="epoch", ylabel="weight decay after the epoch", yscale="log", title="mnist, every seed")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    picture.tight_layout()
    picture.savefig(FIGURES / "auto.png", dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(PROBES), help="run this task")
    parser.add_argument("--root", help="folder that holds MNIST/raw")
    parser.add_argument("--figures", action="store_true", help="draw what is stored")
    options = parser.parse_args()
    if options.task:
        run(options.task, options.root)
    if options.figures:
        tables = {task: table(task) for task in PROBES}
        files.write_json(RESULTS / "budget.json", tables)
        print(json.dumps(tables, indent=1))
        FIGURES.mkdir(parents=True, exist_ok=True)
        figure(tables)


if __name__ == "__main__":
    main()
