"""The tables of docs/choosing.md and of the quick start that say which penalty, how strong, and at what cost: from the stored runs."""

from __future__ import annotations

import json
import math

from from_results import ROOT, STORED, stored_rows
from table import markdown

from gradreg.study.statistics import mean, paired_difference
from gradreg.study.verdicts import interval_text


def choosing_seconds() -> str:
    """What a step of every variant costs in processor time on the two perceptrons, from the stored results."""
    results = ROOT / "benchmarks" / "results" / "choosing"
    costs = json.loads((results / "cost-digits-cost.json").read_text(encoding="utf-8"))["variants"]
    found = [
        json.loads((results / f"seconds-{task}.json").read_text(encoding="utf-8"))["variants"] for task in ("digits-cost", "mnist-cost")
    ]
    header = (
        "variant",
        "evaluations a step",
        *(f"{n}, plain {one['none']['milliseconds']:.1f} ms" for n, one in zip(("digits", "MNIST"), found, strict=True)),
    )
    names = sorted((name for name in found[0] if name in found[1]), key=lambda name: (costs[name]["cost"], found[0][name]["ratio"]))
    rows = [
        (name, f"{costs[name]['cost']:.2f}", *("{ratio:.2f} [{low:.2f}, {high:.2f}]".format(**one[name]) for one in found))
        for name in names
    ]
    return markdown(header, rows)


def choosing_shares() -> str:
    """The share of F-GR's gain that cheaper variants keep on the three tasks, from the stored tables."""
    tasks = {"digits": "digits-cost", "MNIST": "mnist-cost", "CIFAR-10": "cifar10-cost"}
    found = [stored_rows(f"{STORED}choosing/cost-{task}") for task in tasks.values()]
    shown = ("every-2", "half", "quarter", "every-5", "tenth", "tenth-every-5", "remembered-0.1")
    rows = [(f"`{name}`", found[0][name][1], *(one[name][-1] for one in found)) for name in shown]
    return markdown(("variant", "evaluations a step", *(f"{task}, %" for task in tasks)), rows)


def shares_in_short() -> str:
    """Of ``choosing_shares``, what the quick start shows: the two perceptrons, three cheaper variants."""
    digits, mnist = (stored_rows(f"{STORED}choosing/cost-{task}") for task in ("digits-cost", "mnist-cost"))
    names = {
        "quarter": "from a quarter of it",
        "tenth-every-5": "from a tenth of it, at every fifth step",
        "remembered-0.2": "from an EMA of earlier results (`remembered`, ε = 0.2)",
    }
    rows = [("from the whole batch", digits["fgr"][1], "100", "100")]
    rows += [(told, digits[name][1], digits[name][-1], mnist[name][-1]) for name, told in names.items()]
    return markdown(("F-GR, γ = ε = 0.5, with the direction", "evaluations", "digits, 10 seeds", "MNIST, 5 seeds"), rows)


AUTO = {
    "digits, 30 % wrong": "digits-cost",
    "digits, right": "digits-cost-clean",
    "MNIST, 30 % wrong": "mnist-cost",
    "MNIST, right": "mnist-cost-clean",
    "CIFAR-10, 30 % wrong": "cifar10-cost",
    "CIFAR-10, right": "cifar10-cost-clean",
}
AUTO_ELSEWHERE = {
    "digits, AdamW": "digits-cost-adamw",
    "digits, width 64": "digits-cost-width-64",
    "digits, width 512": "digits-cost-width-512",
    "digits, width 1024": "digits-cost-width-1024",
    "digits, width 2048": "digits-cost-width-2048",
    "`cifar10-underfit`": "cifar10-underfit-held-out",
}
"""What docs/choosing.md calls a task and its labels -> the stored results of benchmarks/auto_radius.py; the mean is over the first list."""


HELD_OUT = {
    "digits, 30 % wrong, 5 % held out": "digits-cost",
    "MNIST, 30 % wrong, 5 %": "mnist-cost",
    "CIFAR-10, 30 % wrong, 1 %": "cifar10-cost",
    "CIFAR-10, right, 1 %": "cifar10-cost-clean",
    "`cifar10-underfit`, 1 %": "cifar10-underfit",
}
"""What docs/choosing.md calls a task and what is held out of it -> the stored results of ``benchmarks/auto_radius.py --held-out``."""


def choosing_held_out() -> str:
    """What held-out images save where a penalty hurts, and cost where it helps: a row for each task, from the stored runs."""
    rows: list[tuple[str, ...]] = []
    for title, name in HELD_OUT.items():
        found = accuracies(f"auto-{name}-held-out")
        plain, auto, held = found["none"], found["fgr auto 0.95"], found["fgr auto 0.95 held out"]
        rows.append((title, str(len(plain)), f"{mean(list(plain.values())):.2f}", over(auto, plain), over(held, plain)))
    return markdown(("task, labels", "seeds", "plain, %", "`auto()` over plain", "with held-out images"), rows)


LEARNED = {"digits, 30 % wrong": "digits-cost", "digits, right": "digits-cost-clean", "MNIST, 30 % wrong": "mnist-cost"}
"""What docs/choosing.md calls a task and its labels -> the stored results of ``benchmarks/auto_radius.py --lets``."""


def choosing_lets() -> str:
    """SAM with a radius that is learned from held-out images, beside the radius from which it starts: a row for each task."""
    rows: list[tuple[str, ...]] = []
    for title, name in LEARNED.items():
        found = accuracies(f"auto-{name}-lets")
        plain, fixed, learned, auto = (found[one] for one in ("none", "sam 0.05", "sam lets", "sam auto 0.95"))
        seeds, accuracy = str(len(plain)), f"{mean(list(plain.values())):.2f}"
        rows.append((title, seeds, accuracy, over(fixed, plain), over(learned, plain), over(learned, fixed), over(auto, plain)))
    header = (
        "task, labels",
        "seeds",
        "plain, %",
        "SAM 0.05 over plain",
        "`LETS()` over plain",
        "over SAM 0.05",
        "`AutoRadius()` over plain",
    )
    return markdown(header, rows)


def choosing_auto() -> str:
    """Whether ``gradreg.auto()`` is as good as the best fixed radius of F-GR: a row for each task, from the stored runs."""
    rows: list[tuple[str, ...]] = []
    averaged: list[float] = []
    for title, name in {**AUTO, **AUTO_ELSEWHERE}.items():
        found = accuracies(f"auto-{name}")
        plain, auto = found["none"], found["fgr auto 0.95"]
        fixed = {one.removeprefix("fgr "): values for one, values in found.items() if one.startswith("fgr ") and one[4].isdigit()}
        best = max(fixed, key=lambda radius: mean(list(fixed[radius].values())) or 0.0, default=None)
        chosen = {} if best is None else fixed[best]
        if title in AUTO and (difference := paired_difference(auto, chosen)) is not None:
            averaged.append(difference.mean)
        gain = "" if best is None else f"{over(chosen, plain)} at {best}"
        rows.append((title, str(len(plain)), f"{mean(list(plain.values())):.2f}", gain, over(auto, plain), over(auto, chosen)))
    rows.insert(len(AUTO), ("mean", "", "", "", "", f"{sum(averaged) / len(averaged):+.2f}"))
    header = ("task, labels", "seeds", "plain, %", "best fixed ε over plain", "`auto()` over plain", "`auto()` over the best fixed")
    return markdown(header, rows)


def accuracies(name: str) -> dict[str, dict[int, float]]:
    """Of the stored result ``choosing/NAME.json``: variant -> seed -> test accuracy in percent, without runs that diverged."""
    found = json.loads((ROOT / "benchmarks" / "results" / "choosing" / f"{name}.json").read_text(encoding="utf-8"))["variants"]
    return {variant: {seed: 100 * one for seed, one in enumerate(row) if one is not None} for variant, row in found.items()}


def over(values: dict[int, float], reference: dict[int, float]) -> str:
    """The paired difference in points with its interval."""
    found = paired_difference(values, reference)
    return "" if found is None else interval_text(found.mean, found.low, found.high)


def choosing_signs() -> str:
    """What the first epochs show of a small radius, the best one, and two that are too large, for each method, from the stored run."""
    stored_runs = json.loads((ROOT / "benchmarks" / "results" / "choosing" / "signs.json").read_text(encoding="utf-8"))["runs"]
    found = {(run["method"], run["radius"]): run for run in stored_runs}
    shown = {"sam": (0.1, 0.3, 0.5, 0.7), "gnp": (0.1, 0.3, 0.7, 2.0), "fgr": (0.1, 1.0, 2.0, 8.0), "asam": (0.1, 1.0, 2.0, 5.0)}
    names = {"sam": "SAM", "gnp": "GNP", "fgr": "F-GR", "asam": "ASAM"}
    rows: list[tuple[str, ...]] = []
    for method, radii in shown.items():
        runs = [found[method, radius] for radius in radii]
        early = [sum(run["cosine"][:5]) / 5 for run in runs]
        below = [next((str(k + 1) for k, one in enumerate(run["train_loss"]) if one < 0.9 * math.log(10)), "never") for run in runs]
        cells = (
            [f"{one:.2f}" for one in early],
            [f"{min(run['cosine']):.2f}" for run in runs],
            below,
            [f"{run['gradient_norm'][4]:.2f}" for run in runs],
            [f"{100 * run['test_accuracy']:.1f}" for run in runs],
        )
        rows.append((f"{names[method]} {' / '.join(f'{radius:g}' for radius in radii)}", *(" / ".join(each) for each in cells)))
    header = (
        "radius",
        "cosine: mean of the first five epochs",
        "smallest of any epoch",
        "epochs until the loss is 10 % below guessing",
        "gradient norm, epoch 5",
        "test accuracy, %",
    )
    return markdown(header, rows)
