"""``gradreg lab flooding``: two steps of flooding equal one of F-GR or B-GR, and a run near the level shows the consequence."""

from __future__ import annotations

import argparse

import numpy as np

from gradreg.theory.flooding import FloodingRun, simulate, two_steps
from gradreg.theory.lab import drawing
from gradreg.theory.lab.report import LabReport, Table

HELP = "flooding near its level against explicit F-GR with epsilon = learning rate, on a small network"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("--level", type=float, default=0.2, help="flooding level b, mean squared error, > 0 (default 0.2)")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="eta, > 0 (default 0.1)")
    parser.add_argument("--pairs", type=int, default=2000, help="pairs of steps to compare, >= 1 (default 2000)")
    parser.add_argument("--width", type=int, default=32, help="hidden units, >= 1 (default 32)")


def run(options: argparse.Namespace) -> LabReport:
    """Check the identity over learning rates and seeds, follow the run, tabulate and draw them."""
    identity = [
        (rate, seed, found.moved, found.forward_error, found.backward_error)
        for rate in (options.learning_rate, options.learning_rate / 4, options.learning_rate / 16)
        for seed in range(options.seed, options.seed + 3)
        for found in (two_steps(learning_rate=rate, width=options.width, seed=seed),)
    ]
    path = simulate(level=options.level, learning_rate=options.learning_rate, pairs=options.pairs, width=options.width, seed=options.seed)
    first = int(np.argmax(path.slips)) if path.slips.any() else options.pairs
    shown = sorted({0, min(first, options.pairs), options.pairs // 4, options.pairs // 2, options.pairs})
    columns = ("pairs", "slips so far", "loss", "loss, F-GR", "|g|", "|g|, F-GR", "moved", "distance", "distance, held")
    curves = [_row(path, i) for i in range(options.pairs + 1)]
    tables = {
        "identity": Table(
            ("learning rate", "seed", "|two steps|", "F-GR: largest error", "B-GR: largest error"),
            identity,
            "Two steps of flooding against one step of the engine's F-GR and B-GR, float64",
        ),
        "run": Table(columns, [curves[i] for i in shown], f"After {path.approach} plain steps down to level {options.level:g}"),
        "curves": Table(columns, curves),
    }
    remark = (
        f"The paths agree to rounding until flooding first takes two steps the same way (pair {first}); {int(path.slips.sum())} of "
        f"{options.pairs} pairs do. 'held' is F-GR with those plain steps added."
    )
    return LabReport(tables, {"flooding": _draw(path, options.level)}, (remark,))


def _row(path: FloodingRun, i: int) -> tuple[int | float, ...]:
    values = (path.loss, path.loss_explicit, path.gradient_norm, path.gradient_norm_explicit, path.moved, path.distance, path.distance_held)
    return i, int(path.slips[:i].sum()), *(float(value[i]) for value in values)


def _draw(path: FloodingRun, level: float):
    figure, axes = drawing.panels(3, width=4.6)
    pairs = np.arange(path.loss.size)
    slips = np.flatnonzero(path.slips)
    flooding, explicit, held = drawing.SEQUENCE[4], drawing.COLOURS["F-GR"], drawing.SEQUENCE[2]
    axes[0].plot(pairs, path.loss, color=flooding, label="flooding")
    axes[0].plot(pairs, path.loss_explicit, color=explicit, label="explicit F-GR, ε = η")
    axes[0].axhline(level, color="black", linestyle=":", linewidth=1.2, label="level b")
    drawing.label(axes[0], "Loss", "pairs of steps", "mean squared error")
    axes[1].plot(pairs, path.gradient_norm, color=flooding, label="flooding")
    axes[1].plot(pairs, path.gradient_norm_explicit, color=explicit, label="explicit F-GR, ε = η")
    axes[1].set_ylim(bottom=0)
    drawing.label(axes[1], "Gradient norm: falling on both paths", "pairs of steps", "‖g‖")
    axes[2].semilogy(pairs[1:], path.moved[1:], color="#999999", label="right: moved by flooding")
    axes[2].semilogy(pairs[1:], np.maximum(path.distance[1:], 1e-17), color=explicit, label="right: flooding to explicit F-GR")
    axes[2].semilogy(
        pairs[1:], np.maximum(path.distance_held[1:], 1e-17), color=held, label="right: flooding to F-GR with the slips' plain steps"
    )
    for slip in slips.tolist():
        axes[2].axvline(slip + 1, color="#dddddd", linewidth=0.8, zorder=0)
    axes[2].plot([], [], color="#cccccc", linewidth=0.8, label="slip: two steps the same way")
    axes[2].set_xscale("log")
    drawing.label(axes[2], "Distance between paths", "pairs of steps", "distance in weights")
    drawing.legend(axes[0], loc="lower left")
    drawing.legend(axes[1], loc="lower left")
    drawing.legend_below(figure, axes[2])
    return figure
