"""``gradreg lab stability``: the map of curvatures and strengths, where SAM and GNP settle, and advice on one's own numbers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradreg import checks, files
from gradreg.constructors import exact, fgr, sam
from gradreg.penalties import GradientPenalty
from gradreg.theory.advice import MeasuredCurvature, advise
from gradreg.theory.lab import drawing
from gradreg.theory.lab.report import LabReport, Table
from gradreg.theory.stability import Fate, Settling, fate, settle, simulated_fate

HELP = "which curvatures GR keeps stable or traps at saddles, how far from a minimum SAM and GNP settle, and both for your numbers"

CURVATURES = (1.0, 0.6, 0.3, 0.1)
"""The quadratic on which power 1 is followed; the sharpest first."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("--learning-rate", type=float, help="eta, > 0 (default 0.4)")
    parser.add_argument("--momentum", type=float, help="heavy-ball momentum, 0 <= mu < 1 (default 0)")
    parser.add_argument("--largest-curvature", type=float, help="for the advice: largest Hessian eigenvalue, > 0 (default 1)")
    parser.add_argument("--smallest-curvature", type=float, help="for the advice: smallest eigenvalue (default -1)")
    parser.add_argument("--gradient-norm", type=float, help="for the advice: |g| where training is, >= 0 (default: that of a quadratic)")
    parser.add_argument("--gamma", type=float, default=0.5, help="for the advice: strength of power 2, >= 0 (default 0.5)")
    parser.add_argument("--epsilon", type=float, default=0.5, help="for the advice: radius of power 2; 0 is DB (default 0.5)")
    parser.add_argument("--rho", type=float, default=0.1, help="for the advice: SAM's radius, > 0 (default 0.1)")
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="for the advice: sharpness.json of gradreg sharpness RUN --out DIR: curvatures, |g|, learning rate, momentum and penalty of "
        "each run in it, in place of the options that are left out",
    )
    parser.add_argument("--tolerated-distance", type=float, help="for the advice: how far SAM may settle from a minimum, > 0 (any)")


def run(options: argparse.Namespace) -> LabReport:
    """Draw the map by theory and by simulation, follow power 1, and advise on the options' numbers."""
    runs = [] if options.measured is None else _measured(options.measured)
    rate = checks.positive("--learning-rate", _first(options.learning_rate, *(run["learning_rate"] for run in runs[:1]), 0.4))
    momentum = _first(options.momentum, *(run["momentum"] for run in runs[:1]), 0.0)
    span = 2.4 * (1 + momentum) / rate
    h = np.linspace(-span, span, 242)  # an even number, so that it does not include 0, where nothing moves
    gamma = np.linspace(0.0, 8 / span, 121)
    maps = {
        mu: (
            fate(h, gamma[:, None], learning_rate=rate, momentum=mu),
            simulated_fate(h, gamma[:, None], learning_rate=rate, momentum=mu),
        )
        for mu in sorted({momentum, 0.0, 0.9})
    }
    agreement = [
        (mu, Fate(value).name.lower(), int(np.sum(theory == value)), int(np.sum((theory == value) & (simulated == value))))
        for mu, (theory, simulated) in maps.items()
        for value in Fate
    ]
    strengths = (0.05, 0.2, 0.8)
    sharpest = CURVATURES[0]
    scaled = tuple(c / sharpest * min(1.0, 1.5 * (1 + momentum) / rate) for c in CURVATURES)
    ends = {s: settle(scaled, s, learning_rate=rate, momentum=momentum, seed=options.seed) for s in strengths}
    settled = [
        (s, scaled[0], rate, momentum, float(e.distance[-1]), e.predicted, float(e.distance[-1]) / e.predicted - 1, float(e.alignment[-1]))
        for s, e in ends.items()
    ]
    advice, remarks = [], []
    for label, penalty, settings in _asked(options, runs, rate, momentum):
        found = advise(penalty, tolerated_distance=options.tolerated_distance, **settings)
        advice.append((label, penalty.strength_at(settings["step"]), found.stable_curvature, found.settling_distance, len(found.problems)))
        told = (*(found.problems or ["nothing too large."]), *found.notes, *(f"theory and measurement part: {p}" for p in found.partings))
        remarks += [f"{label}: {remark}" for remark in told]
    remarks += [f"{run['run']}: {_ADAPTIVE.format(optimizer=run['optimizer'])}" for run in runs if run["optimizer"] != "sgd"]
    theory, simulated = maps[momentum]
    pairs = [
        (float(g), float(c), Fate(theory[i, j]).name.lower(), Fate(simulated[i, j]).name.lower())
        for i, g in enumerate(gamma)
        for j, c in enumerate(h)
    ]
    tables = {
        "agreement": Table(("momentum", "fate", "points of the map", "same by simulation"), agreement, "Theory against 2000 real steps"),
        "settling": Table(
            ("strength", "curvature", "learning rate", "momentum", "distance", "predicted", "relative error", "alignment"),
            settled,
            "Where SAM and GNP settle on a quadratic",
        ),
        "advice": Table(("penalty", "strength", "stable up to curvature", "settles at", "problems"), advice, "Your numbers"),
        "map": Table(("gamma", "curvature", "theory", "simulation"), pairs),
    }
    figures = {"map": _draw_map(h, gamma, {mu: maps[mu] for mu in sorted({momentum, 0.9})}, rate), "settling": _draw_settling(ends)}
    return LabReport(tables, figures, remarks)


def _asked(
    options: argparse.Namespace, runs: Sequence[dict[str, Any]], rate: float, momentum: float
) -> list[tuple[str, GradientPenalty, dict[str, Any]]]:
    """What advice is given on: each measured run with its own penalty, or the options' penalties where it has none."""
    given = {
        "learning_rate": options.learning_rate,
        "momentum": options.momentum,
        "largest_curvature": options.largest_curvature,
        "smallest_curvature": options.smallest_curvature,
        "gradient_norm": options.gradient_norm,
    }
    usual = {"learning_rate": rate, "momentum": momentum, "largest_curvature": 1.0, "smallest_curvature": -1.0, "gradient_norm": None}
    mine: list[GradientPenalty] = [_power_two(options), sam(rho=options.rho)]
    if not runs:
        settings = {name: _first(value, usual[name]) for name, value in given.items()}
        return [(str(penalty), penalty, {**settings, "step": 0}) for penalty in mine]
    asked: list[tuple[str, GradientPenalty, dict[str, Any]]] = []
    for run in runs:
        seen = {
            "learning_rate": run["learning_rate"],
            "momentum": run["momentum"],
            "largest_curvature": run["largest_eigenvalue"],
            "smallest_curvature": run["smallest_eigenvalue"],
            "gradient_norm": run["gradient_norm"],
        }
        settings = {name: _first(value, seen[name]) for name, value in given.items()}
        if run["penalty"] is None:  # plain training: what would the options' penalties do there?
            asked += [(f"{run['run']}, {penalty}", penalty, {**settings, "step": 0}) for penalty in mine]
            continue
        penalty = GradientPenalty.from_dict(run["penalty"])
        measured = [MeasuredCurvature(**one) for one in run["penalized"]]
        asked.append((f"{run['run']}, {penalty}", penalty, {**settings, "step": run["penalty_step"], "measured": measured}))
    return asked


_ADAPTIVE = (
    "the theory is that of gradient descent with momentum; {optimizer} scales each coordinate, so that its learning rate is another "
    "number, and this advice does not hold for it."
)


def _measured(file: Path) -> list[dict[str, Any]]:
    """The runs in a file of ``gradreg sharpness``.

    Raises:
        ValueError: no such file, or not one of those.
    """
    needed = (
        "run",
        "optimizer",
        "learning_rate",
        "momentum",
        "largest_eigenvalue",
        "smallest_eigenvalue",
        "gradient_norm",
        "penalty",
        "penalized",
    )
    remedy = "Write it by gradreg sharpness RUN --out DIR, and name DIR/sharpness.json."
    if not file.is_file():
        raise ValueError(f"--measured must be a file with measured curvatures; got {str(file)!r}, which is none. {remedy}")
    found = files.read_json(file, holds="what gradreg sharpness measured", remedy=remedy)
    runs = found.get("runs")
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) and all(key in run for key in needed) for run in runs):
        raise ValueError(
            f"--measured must be a file that gradreg sharpness wrote; got {str(file)!r}, which lacks what it has of a run. {remedy}"
        )
    return runs


def _first(*values: Any) -> Any:
    """The first that is given."""
    return next((value for value in values if value is not None), None)


def _power_two(options: argparse.Namespace) -> GradientPenalty:
    if options.epsilon == 0:
        return exact(gamma=options.gamma)
    return fgr(gamma=options.gamma, epsilon=options.epsilon)


def _draw_map(h: np.ndarray, gamma: np.ndarray, maps: dict, rate: float):
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colours = {Fate.SETTLES: "#9ecae1", Fate.DIVERGES: "#f4a582", Fate.ESCAPES: "#f7f7f7", Fate.TRAPPED: "#8c6bb1"}
    words = {
        Fate.SETTLES: "minimum, settles",
        Fate.DIVERGES: "minimum, diverges: step or γ too large",
        Fate.ESCAPES: "saddle, escapes",
        Fate.TRAPPED: "saddle, trapped: γ|h| > 1",
    }
    figure, axes = drawing.panels(len(maps), width=5.6, height=4.2)
    for axis, (momentum, (_, simulated)) in zip(axes, maps.items(), strict=True):
        axis.pcolormesh(
            h, gamma, simulated, cmap=ListedColormap([colours[f] for f in Fate]), vmin=-0.5, vmax=3.5, rasterized=True, shading="nearest"
        )
        positive, negative = h[h > 0], h[h < 0]
        limit = 2 * (1 + momentum) / rate
        with np.errstate(divide="ignore"):
            axis.plot(positive, (limit / positive - 1) / positive, color="black", linewidth=1.5)
            axis.plot(negative, -1 / negative, color="black", linewidth=1.5, linestyle="--")
            axis.plot(negative, (limit / negative - 1) / negative, color="black", linewidth=1.5)
        axis.set_ylim(gamma[0], gamma[-1])
        axis.set_xlim(h[0], h[-1])
        axis.grid(False)
        drawing.label(
            axis,
            f"2000 steps at each point, η = {rate:g}, momentum {momentum:g}",
            "curvature h (eigenvalue of the Hessian)",
            "strength γ",
        )
    handles = [Patch(facecolor=colours[f], edgecolor="#888888", label=words[f]) for f in Fate]
    handles += [axes[0].plot([], [], color="black", linewidth=1.5, label="theory: ηh(1 + γh) = 2(1 + μ)")[0]]
    handles += [axes[0].plot([], [], color="black", linewidth=1.5, linestyle="--", label="theory: γ|h| = 1")[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    return figure


def _draw_settling(ends: dict[float, Settling]):
    figure, (axis,) = drawing.panels(1, width=6.2)
    for colour, (strength, end) in zip(drawing.SEQUENCE, ends.items(), strict=False):
        shown = end.distance[:301]
        axis.semilogy(np.arange(shown.size), shown, color=colour, label=f"strength {strength:g}")
        axis.axhline(end.predicted, color=colour, linestyle="--", linewidth=1.2)
    axis.plot([], [], color="black", linestyle="--", linewidth=1.2, label="δ = ηhλ / (2(1 + μ) − ηh)")
    drawing.label(axis, "SAM and GNP stay away from the minimum", "steps", "distance ‖θ‖ from the minimum")
    drawing.legend(axis, loc="upper right")
    return figure
