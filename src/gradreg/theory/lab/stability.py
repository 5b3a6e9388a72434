"""``gradreg lab stability``: the map of curvatures and strengths, where SAM and GNP settle, and advice on one's own numbers."""

from __future__ import annotations

import argparse

import numpy as np

from gradreg import checks
from gradreg.constructors import exact, fgr, sam
from gradreg.penalties import GradientPenalty
from gradreg.theory.lab import drawing
from gradreg.theory.lab.report import LabReport, Table
from gradreg.theory.stability import Fate, Settling, advise, fate, settle, simulated_fate

HELP = "which curvatures GR keeps stable or traps at saddles, how far from a minimum SAM and GNP settle, and both for your numbers"

CURVATURES = (1.0, 0.6, 0.3, 0.1)
"""The quadratic on which power 1 is followed; the sharpest first."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("--learning-rate", type=float, default=0.4, help="eta, > 0 (default 0.4)")
    parser.add_argument("--momentum", type=float, default=0.0, help="heavy-ball momentum, 0 <= mu < 1 (default 0)")
    parser.add_argument("--largest-curvature", type=float, default=1.0, help="for the advice: largest Hessian eigenvalue, > 0 (default 1)")
    parser.add_argument("--smallest-curvature", type=float, default=-1.0, help="for the advice: smallest eigenvalue (default -1)")
    parser.add_argument("--gamma", type=float, default=0.5, help="for the advice: strength of power 2, >= 0 (default 0.5)")
    parser.add_argument("--epsilon", type=float, default=0.5, help="for the advice: radius of power 2; 0 is DB (default 0.5)")
    parser.add_argument("--rho", type=float, default=0.1, help="for the advice: SAM's radius, > 0 (default 0.1)")
    parser.add_argument("--tolerated-distance", type=float, help="for the advice: how far SAM may settle from a minimum, > 0 (any)")


def run(options: argparse.Namespace) -> LabReport:
    """Draw the map by theory and by simulation, follow power 1, and advise on the options' numbers."""
    rate, momentum = checks.positive("--learning-rate", options.learning_rate), options.momentum
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
    asked: tuple[GradientPenalty, ...] = (_power_two(options), sam(rho=options.rho))
    advice, remarks = [], []
    for penalty in asked:
        found = advise(
            penalty,
            learning_rate=rate,
            largest_curvature=options.largest_curvature,
            smallest_curvature=options.smallest_curvature,
            momentum=momentum,
            tolerated_distance=options.tolerated_distance,
        )
        advice.append((str(penalty), penalty.strength_at(0), found.stable_curvature, found.settling_distance, len(found.problems)))
        remarks += [f"{penalty}: {remark}" for remark in (*(found.problems or ["nothing too large."]), *found.notes)]
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
