"""``gradreg lab kernel-decay``: the kernel of a wide ReLU network under L2, over widths, against the infinite-width theorem."""

from __future__ import annotations

import argparse

import numpy as np

from gradreg import checks
from gradreg.theory.kernel_decay import KernelDecay, simulate
from gradreg.theory.lab import drawing
from gradreg.theory.lab.report import LabReport, Table

HELP = "decay of the tangent kernel of a wide ReLU network under L2, against the infinite-width theorem"

DEEP_END = 3.96
"""At depth 3, λ = 0.1 the kernel has then decayed to e^(−1.584), a fifth."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("--l2", type=float, default=0.1, help="lambda of lambda/2 |theta|^2, > 0 (default 0.1)")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 512, 4096], help="hidden widths at depth 2 (default 64 512 4096)")
    parser.add_argument(
        "--deep-widths", type=int, nargs="+", default=[64, 256, 1024], help="hidden widths at depth 3 (default 64 256 1024)"
    )
    parser.add_argument("--end-time", type=float, default=15.0, help="flow time at depth 2: learning rate x steps (default 15)")
    parser.add_argument("--seeds", type=int, default=5, help="networks and data sets to average over, from --seed upwards (default 5)")


def run(options: argparse.Namespace) -> LabReport:
    """Follow the networks over widths and seeds, tabulate and draw them."""
    count = checks.whole("--seeds", options.seeds, minimum=2, remedy="A standard deviation needs two.")
    l2 = checks.positive("--l2", options.l2, remedy="Without L2 the theorem says that the kernel stays as it is.")
    end = checks.positive("--end-time", options.end_time)
    seeds = range(options.seed, options.seed + count)
    shallow = {w: [simulate(2, w, l2, end_time=end, points=31, seed=s) for s in seeds] for w in sorted(set(options.widths))}
    deep_end = DEEP_END * 0.1 / l2
    deep = {w: [simulate(3, w, l2, end_time=deep_end, points=13, seed=s) for s in seeds] for w in sorted(set(options.deep_widths))}
    columns = ("depth", "width", "t", "ratio", "s.d.", "predicted", "mean |deviation|", "loss", "loss of ODE", "rotation, deg")
    middle, last = 15, 30
    rows = [_row(2, w, runs, i) for w, runs in shallow.items() for i in (middle, last)]
    rows += [_row(3, w, runs, -1) for w, runs in deep.items()]
    curves = [
        (depth, width, seed, *(float(value) for value in line))
        for depth, group in ((2, shallow), (3, deep))
        for width, runs in group.items()
        for seed, run in zip(seeds, runs, strict=True)
        for line in zip(run.time, run.ratio, run.predicted, run.rotation.mean(axis=1), run.loss, run.loss_predicted, strict=True)
    ]
    tables = {
        "reference": Table(columns, rows, f"Kernel decay, lambda = {l2:g}, 8 points in 10 dimensions, mean over networks and data"),
        "curves": Table(("depth", "width", "seed", "t", "ratio", "predicted", "rotation, deg", "loss", "loss of ODE"), curves),
    }
    remark = "ratio is |Theta_t| / |Theta_0|; rotation is the mean angle between the eigenvectors of Theta_0 and of Theta_t."
    return LabReport(tables, {"decay": _draw_decay(shallow, deep, last), "network": _draw_network(shallow)}, (remark,))


def _row(depth: int, width: int, runs: list[KernelDecay], i: int) -> tuple[int | float, ...]:
    ratios = np.array([run.ratio[i] for run in runs])
    return (
        depth,
        width,
        float(runs[0].time[i]),
        float(ratios.mean()),
        float(ratios.std(ddof=1)),
        float(runs[0].predicted[i]),
        float(np.mean([run.deviation[i] for run in runs])),
        float(np.mean([run.loss[i] for run in runs])),
        float(np.mean([run.loss_predicted[i] for run in runs])),
        float(np.mean([run.rotation[i] for run in runs])),
    )


def _draw_decay(shallow: dict[int, list[KernelDecay]], deep: dict[int, list[KernelDecay]], last: int):
    figure, axes = drawing.panels(3, width=4.6)
    for axis, depth, group in ((axes[0], 2, shallow), (axes[1], 3, deep)):
        for colour, (width, runs) in zip(drawing.shades(len(group)), group.items(), strict=True):
            ratios = np.array([run.ratio for run in runs])
            axis.plot(runs[0].time, ratios.mean(axis=0), color=colour, label=f"width {width}")
            axis.fill_between(runs[0].time, ratios.min(axis=0), ratios.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        first = next(iter(group.values()))[0]
        axis.plot(first.time, first.predicted, color="black", linestyle="--", linewidth=1.3, label=f"theorem, e^(−{2 * (depth - 1)}λt)")
        axis.set_yscale("log")
        axis.set_yticks([1.0, 0.5, 0.2, 0.1, 0.05], ["1", "0.5", "0.2", "0.1", "0.05"])
        axis.minorticks_off()
        axis.set_ylim(0.9 * float(first.predicted[-1]), 1.1)
        drawing.label(axis, f"{depth} layers", "flow time (learning rate × steps)", "‖Θₜ‖ / ‖Θ₀‖ (mean and range)")
        drawing.legend(axis, loc="lower left")
    for depth, group, colour in ((2, shallow, drawing.SEQUENCE[0]), (3, deep, drawing.SEQUENCE[4])):
        widths = np.array(list(group))
        deviation = np.array([np.mean([run.deviation[-1 if depth == 3 else last // 2] for run in runs]) for runs in group.values()])
        axes[2].loglog(
            widths,
            deviation * 100,
            marker="o",
            color=colour,
            label=f"{depth} layers, t = {next(iter(group.values()))[0].time[-1 if depth == 3 else last // 2]:g}",
        )
    widths = np.array([min(shallow), max(shallow)])
    start = np.mean([run.deviation[last // 2] for run in shallow[int(widths[0])]])
    axes[2].loglog(widths, 50 * start * (widths / widths[0]) ** -1.0, color="#999999", linestyle=":", label="slope −1")
    drawing.label(axes[2], "Deviation from the theorem", "width", "mean deviation (%)")
    drawing.legend(axes[2], loc="upper right")
    return figure


def _draw_network(shallow: dict[int, list[KernelDecay]]):
    figure, axes = drawing.panels(2)
    for colour, (width, runs) in zip(drawing.shades(len(shallow)), shallow.items(), strict=True):
        rotation = np.array([run.rotation.mean(axis=1) for run in runs])
        axes[0].plot(runs[0].time, rotation.mean(axis=0), color=colour, label=f"width {width}")
        axes[0].fill_between(runs[0].time, rotation.min(axis=0), rotation.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        axes[1].plot(runs[0].time, runs[0].loss, color=colour, label=f"network, width {width}")
        axes[1].plot(runs[0].time, runs[0].loss_predicted, color=colour, linestyle="--", linewidth=1.3)
    axes[1].plot([], [], color="black", linestyle="--", linewidth=1.3, label="linear equation from the same start")
    drawing.label(axes[0], "Eigenvectors of the kernel", "flow time (learning rate × steps)", "mean rotation (degrees)")
    drawing.label(axes[1], "Training loss, first seed", "flow time (learning rate × steps)", "½ Σ (f − y)²")
    axes[1].set_yscale("log")
    drawing.legend(axes[0], loc="upper left")
    drawing.legend(axes[1], loc="upper right")
    return figure
