"""Sentences of docs/theory.md, weight-decay.md and statistics.md whose numbers are measured, made again from the stored results.

``quoted.py`` says what is done with them.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from typing import Any

from from_results import ROOT, stored

from gradreg.study.statistics import paired_difference


def flooding() -> str:
    """How nearly two steps of flooding are one of F-GR or B-GR."""
    rows = stored("papers/flooding.json")["seeds"]
    seeds = {5: "five"}[len(rows)]
    error = max(row["relative error"] for row in rows)
    return f"for {seeds} seeds and two learning rates: the largest difference of any weight is {error:.1e} of the length of the step"


def minimizer() -> str:
    """How near the flow of a diagonal network ends to the minimizer that the theorem names."""
    distance = max(row["distance"] for row in stored("papers/diagonal-network.json")["seeds"])
    shown = f"{distance:.1e}".replace("e-0", "e-")
    return f"β^∞ is at most {shown} from the minimizer of the theorem."


def above_the_edge() -> str:
    """By how much the curvature lies above the edge of stability, and what a radius makes of it."""
    with (ROOT / "docs" / "results" / "edge" / "edge.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    def range_of(method: str) -> str:
        above = [100 * (float(row["curvature/edge"]) - 1) for row in rows if row["method"] == method]
        return f"{min(above):.0f} to {max(above):.0f} %"

    plain, small, large = (float(row["curvature"]) for row in rows if row["eta"] == "0.1")
    return (
        f"In the median gradient descent is {range_of('gradient descent')} above 2/η, SAM {range_of('SAM')} above its edge: an iterate "
        f"that oscillates has a longer gradient on one side. At η = 0.1 training ends at {small / plain:.2f} times the curvature of "
        f"gradient descent with a radius of 0.02, at {large / plain:.2f} times with 0.1."
    )


def predicted() -> str:
    """The predicted weight decay on MNIST."""
    found = stored("weight-decay/budget.json")["mnist"]
    own, best = found["rows"]["predicted"], found["rows"][found["best constant"]]
    reached, grid = (f"{one['accuracy']:.2f} ± {one['sd']:.2f}" for one in (own, best))
    return f"{reached} %, against {grid} for the best of seven values (3 seeds)"


def longer_and_smaller() -> str:
    """Law 2."""
    found = stored("weight-decay/law-l2.json")
    at: dict[float, dict[int, float]] = {}
    for run in found["runs"]:
        reached = [i for i, step in enumerate(found["steps"]) if run["lr"] * run["l2"] * step <= 1.02 * 4]
        at.setdefault(run["l2"], {})[run["seed"]] = 100 * run["accuracies"][reached[-1]]
    gains = [paired_difference(at[small], at[large]) for large, small in ((0.05, 0.025), (0.025, 0.0125))]
    first, second = (f"{gain.mean:.1f}" for gain in gains if gain is not None)
    return f"{first} points from λ = 0.05 to 0.025, and {second} from 0.025 to 0.0125"


def clock() -> str:
    """The constant of law 1."""
    return f"c = ηλt* is {stored('weight-decay/law.json')['l2, best']['clock (mean)']:.2f} on average"


def after_the_peak() -> str:
    """What the accuracy loses between its best step and the end of the run, for small λ."""
    falls: dict[float, list[float]] = {}
    for run in stored("weight-decay/law-l2.json")["runs"]:
        falls.setdefault(run["l2"], []).append(100 * (max(run["accuracies"]) - run["accuracies"][-1]))
    first, second, third = (sum(falls[l2]) / len(falls[l2]) for l2 in (0.05, 0.025, 0.0125))
    crosses = stored("weight-decay/law.json")["l2, best"]["left out"]
    return (
        f"At λ = 0.05 accuracy falls by {first:.1f} points after it, at 0.025 by {second:.1f}, at 0.0125 by {third:.1f} within the run "
        f"({crosses} crosses, excluded from the fit of t*)."
    )


def probe() -> str:
    """What the probe of the first seed on MNIST prints."""
    found = next(one for one in stored("weight-decay/budget-mnist.json")["probes"] if one["seed"] == 0)
    best = max(found["accuracies"])
    step = found["steps"][found["accuracies"].index(best)]
    constant = found["learning_rate"] * found["l2"] * step
    return (
        f"best validation accuracy {100 * best:.2f} % at step t* = {step} of {found['steps'][-1]} c = lr * L2 * t* = {constant:.2g} "
        "picture: runs/l2-fc-mnist-l2-probe/probe.png "
        f"predicted weight decay for 40 epochs (4000 steps): {constant / (found['learning_rate'] * 4000):.3g}"
    )


def predictions() -> str:
    """The predicted weight decay of every seed."""
    found = stored("weight-decay/budget.json")
    mnist, digits = ([f"{one['predicted_l2']:.3g}" for one in found[task]["probes"]] for task in ("mnist", "digits"))
    rows = found["digits"]["rows"]
    assert found["mnist"]["best constant"] == "l2-3e-3"
    assert rows["l2-3e-3"]["accuracy"] == rows["l2-1e-2"]["accuracy"] == max(row["accuracy"] for name, row in rows.items() if "l2" in name)
    return (
        f"The predictions were {in_words(mnist)} on MNIST, where the best of the grid is 0.003, and {in_words(digits)} on digits, where "
        "0.003 and 0.01 tie."
    )


def in_words(parts: list[str]) -> str:
    """``a, b and c``."""
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def three_times_off() -> str:
    """What a weight decay beside the best one costs on MNIST."""
    rows = mnist_rows()
    large, small = (-rows[name]["over the best constant"][0] for name in ("l2-1e-2", "l2-1e-3"))
    return f"a λ three times too large costs {large:.1f} points on MNIST, three times too small {small:.1f}"


def auto_over_none() -> str:
    """What AutoL2 and its η-aware form add to no weight decay on MNIST."""
    rows = mnist_rows()
    plain, clock = (rows[name]["accuracy"] - rows["l2-0"]["accuracy"] for name in ("auto", "auto-on-the-clock"))
    return f"on average {plain:.1f} and {clock:.1f} points above λ = 0"


def mnist_rows() -> Mapping[str, Any]:
    """The variants on MNIST at one budget."""
    return stored("weight-decay/budget.json")["mnist"]["rows"]


def auto_as_a_timer() -> str:
    """The epochs in which AutoL2's λ fell on MNIST."""
    runs = [run["weight decay"] for run in stored("weight-decay/budget-mnist.json")["runs"] if run["variant"] == "auto"]
    epochs = {tuple(decays.index(l2) + 1 for l2 in (1e-3, 1e-4, 1e-5)) for decays in runs}
    assert len(runs) == 3
    ((first, second, third),) = epochs  # the same in all of them
    return f"it reached 10⁻³ in epoch {first}, 10⁻⁴ in epoch {second} and 10⁻⁵ in epoch {third} in all three seeds of MNIST"


def looks_without_a_correction() -> str:
    """What stopping at the first p ≤ 0.05 makes of the error."""
    return f"of 5 % it makes {100 * simulated('race without a correction, no effect')['false']:.0f} % in the table below"


def pocock() -> str:
    """The error of races with Pocock's spending."""
    row = simulated("race, no effect (pocock)")
    return f'any false verdict {100 * row["false"]:.1f} %, a false "helps" {100 * row["false helps"]:.1f} %.'


def simulated(kind: str) -> Mapping[str, Any]:
    """A kind of made-up studies."""
    return next(row for row in stored("study_statistics.json")["rows"] if row["kind"] == kind)


QUOTED: tuple[tuple[str, Callable[[], str]], ...] = (
    ("theory.md", minimizer),
    ("theory.md", flooding),
    ("theory.md", above_the_edge),
    ("quick-start.md", predicted),
    ("weight-decay.md", longer_and_smaller),
    ("weight-decay.md", clock),
    ("weight-decay.md", after_the_peak),
    ("weight-decay.md", probe),
    ("weight-decay.md", predictions),
    ("weight-decay.md", three_times_off),
    ("weight-decay.md", auto_over_none),
    ("weight-decay.md", auto_as_a_timer),
    ("statistics.md", looks_without_a_correction),
    ("statistics.md", pocock),
)
"""Page -> the sentence that it must have."""
