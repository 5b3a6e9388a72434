"""``gradreg lab diagonal-network``: how gradient regularization shrinks α, and when that helps sparse recovery."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache

import numpy as np

from gradreg import checks
from gradreg.theory.diagonal_network import DiagonalNetworkFlow, implicit_bias, penalty_of, simulate, train
from gradreg.theory.lab import drawing
from gradreg.theory.lab.report import LabReport, Table
from gradreg.theory.sparse_regression import sparse_regression

HELP = "implicit bias of a diagonal linear network under B-GR, DB and F-GR: flow, theorem, and real training"

CAVEAT = (
    "alpha shrinks in the order B-GR, DB, F-GR, and more as epsilon grows, whatever the data. Sparse recovery improves with it only when "
    "the data are not centred (shift != 0); on centred data the same penalty makes it worse."
)


@dataclass(frozen=True)
class Setting:
    """One half of the reference experiment."""

    name: str
    shift: float
    initial_scale: float
    gamma: float
    epsilons: tuple[float, ...]
    tabulated: tuple[float, ...]


SETTINGS = (
    Setting("shifted", 2.0, 0.05, 0.06, (-0.05, -0.035, -0.02, 0.0, 0.02, 0.035, 0.05), (-0.02, 0.0, 0.02, 0.05)),
    Setting("centred", 0.0, 0.1, 1.0, (-0.6, -0.45, -0.3, 0.0, 0.3, 0.45, 0.6), (-0.3, 0.0, 0.3, 0.6)),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("--features", type=int, default=60, help="d, number of features (default 60)")
    parser.add_argument("--samples", type=int, default=30, help="n, number of samples (default 30)")
    parser.add_argument("--nonzeros", type=int, default=3, help="k, non-zero coordinates of the target (default 3)")
    parser.add_argument("--seeds", type=int, default=5, help="random problems to average over, from --seed upwards (default 5)")

    parser.add_argument("--loss-target", type=float, default=1e-14, help="loss at which a flow has arrived, > 0 (default 1e-14)")
    rates = [4e-4, 2e-4, 1e-4]
    text = "learning rates of the real training, at least two, > 0 (default 4e-4 2e-4 1e-4)"
    parser.add_argument("--learning-rates", type=float, nargs="+", default=rates, metavar="RATE", help=text)


def run(options: argparse.Namespace) -> LabReport:
    """Solve the flows of the reference experiment over the seeds, tabulate and draw them."""
    count = checks.whole("--seeds", options.seeds, minimum=2, remedy="A standard error needs two.")
    seeds = range(options.seed, options.seed + count)

    def problem(setting: Setting, seed: int):
        return sparse_regression(
            features=options.features, samples=options.samples, nonzeros=options.nonzeros, shift=setting.shift, seed=seed
        )

    def flow(setting: Setting, gamma: float, epsilon: float, seed: int) -> DiagonalNetworkFlow:
        data = problem(setting, seed)
        target = options.loss_target
        return simulate(data.X, data.y, initial_scale=setting.initial_scale, gamma=gamma, epsilon=epsilon, loss_target=target)

    @cache
    def measured(setting: Setting, gamma: float, epsilon: float) -> np.ndarray:
        """Recovery error, mean ln(α/α₀), distance from the theorem's minimizer; a row for each seed."""
        rows = []
        for seed in seeds:
            data, end = problem(setting, seed), flow(setting, gamma, epsilon, seed)
            distance = np.linalg.norm(end.beta - implicit_bias(data.X, data.y, end.alpha))
            rows.append((data.recovery_error(end.beta), round(float(end.log_shrinkage.mean()), 12), distance))
        return np.array(rows)

    def cells(setting: Setting, gamma: float, epsilon: float) -> tuple[float, ...]:
        values = measured(setting, gamma, epsilon)
        mean, error = values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(count)
        return float(mean[0]), float(error[0]), float(mean[1]), float(error[1]), float(values[:, 2].max())

    columns = ("data", "shift", "alpha0", "gamma", "epsilon", "difference", "|beta-beta*|^2", "s.e.", "ln(alpha/alpha0)", "s.e. ")
    columns = (*columns, "max |beta-argmin|")
    reference, sweep, recovery = [], [], []
    for setting in SETTINGS:
        head = (setting.name, setting.shift, setting.initial_scale)
        reference.append((*head, 0.0, 0.0, "none", *cells(setting, 0.0, 0.0)))
        for epsilon in setting.tabulated:
            reference.append((*head, setting.gamma, epsilon, _difference(epsilon), *cells(setting, setting.gamma, epsilon)))
        for epsilon in setting.epsilons:
            sweep.append((*head, setting.gamma, epsilon, _difference(epsilon), *cells(setting, setting.gamma, epsilon)))
        for epsilon in (setting.epsilons[0], 0.0, setting.epsilons[-1]):
            for gamma in np.linspace(0.0, setting.gamma, 5).tolist():
                shown = cells(setting, gamma, epsilon if gamma else 0.0)
                recovery.append((*head, gamma, epsilon, _difference(epsilon), *shown))
    steps = _steps(options.seed, sorted({checks.positive("--learning-rates", r) for r in options.learning_rates}, reverse=True))
    figures = {
        "alpha": _draw_alpha(sweep),
        "recovery": _draw_recovery(recovery),
        "trajectories": _draw_trajectories(lambda setting, gamma, epsilon: flow(setting, gamma, epsilon, options.seed), options.nonzeros),
        "steps": _draw_steps(steps),
    }
    tables = {
        "reference": Table(
            columns, reference, f"Diagonal linear network, gradient flow to loss {options.loss_target:g}, mean over {count} problems"
        ),
        "alpha": Table(columns, sweep),
        "recovery": Table(columns, recovery),
        "steps": Table(
            ("penalty", "learning rate", "steps", "|beta_train-beta_flow|", "error / learning rate"),
            steps,
            "The same network trained by gradreg.torch, against the flow at the same time",
        ),
    }
    return LabReport(tables, figures, (CAVEAT,))


def _difference(epsilon: float) -> str:
    return "DB" if epsilon == 0 else "F-GR" if epsilon > 0 else "B-GR"


def _steps(seed: int, rates: list[float]) -> list[tuple[str, float, int, float, float]]:
    """Error of real steps against the flow at time 0.2, for each learning rate, on a small problem."""
    data = sparse_regression(features=12, samples=6, nonzeros=2, shift=1.0, seed=seed)
    rows = []
    for epsilon in (0.05, -0.05, 0.0):
        end = simulate(data.X, data.y, initial_scale=0.3, gamma=0.05, epsilon=epsilon, end_time=0.2)
        for rate in rates:
            steps = max(1, round(0.2 / rate))
            trained = train(data.X, data.y, penalty_of(0.05, epsilon), initial_scale=0.3, learning_rate=rate, steps=steps, seed=0)
            error = float(np.linalg.norm(trained.beta - end.beta))
            rows.append((_difference(epsilon), rate, steps, error, error / rate))
    return rows


def _draw_alpha(rows: list[tuple]):
    figure, axes = drawing.panels(2)
    for axis, setting in zip(axes, SETTINGS, strict=True):
        mine = [row for row in rows if row[0] == setting.name]
        axis.plot([row[4] for row in mine], [row[8] for row in mine], color="#bbbbbb", linewidth=1.2, zorder=1)
        for name in ("B-GR", "DB", "F-GR"):
            points = [row for row in mine if row[5] == name]
            axis.errorbar(
                [row[4] for row in points],
                [row[8] for row in points],
                yerr=[row[9] for row in points],
                fmt={"B-GR": "s", "DB": "D", "F-GR": "o"}[name],
                color=drawing.COLOURS[name],
                capsize=3,
                markersize=6.5,
                label={"B-GR": "B-GR (radius |ε|)", "DB": "DB (ε = 0)", "F-GR": "F-GR (radius ε)"}[name],
            )
        title = f"{setting.name} data, μ = {setting.shift:g}, α₀ = {setting.initial_scale:g}, γ = {setting.gamma:g}"
        drawing.label(axis, title, "signed radius ε", "mean ln(α / α₀) ± s.e.")
    drawing.legend_below(figure, axes[0])
    return figure


def _draw_recovery(rows: list[tuple]):
    figure, axes = drawing.panels(2)
    for axis, setting in zip(axes, SETTINGS, strict=True):
        for name in ("B-GR", "DB", "F-GR"):
            mine = [row for row in rows if row[0] == setting.name and row[5] == name]
            epsilon = "0" if name == "DB" else f"{'−' if name == 'B-GR' else ''}{abs(mine[0][4]):g}"
            axis.plot(
                [row[3] for row in mine],
                [row[6] for row in mine],
                marker={"B-GR": "s", "DB": "D", "F-GR": "o"}[name],
                color=drawing.COLOURS[name],
                label=f"{name}, ε = {epsilon}",
            )
        strongest = [row for row in rows if row[0] == setting.name][-1]
        without = next(row for row in rows if row[0] == setting.name and row[3] == 0.0)
        verdict = "better" if strongest[6] < without[6] else "worse"
        drawing.label(
            axis,
            f"{setting.name} data (μ = {setting.shift:g}): recovery gets {verdict}",
            "strength γ",
            "‖β − β*‖², mean over problems",
        )
        axis.set_ylim(bottom=0)
        drawing.legend(axis, loc="lower left" if verdict == "better" else "lower right")
    return figure


def _draw_trajectories(flow, nonzeros: int):
    figure, axes = drawing.panels(2, rows=2, height=3.3)
    cases = [(s, g, e) for s in SETTINGS for g, e in ((0.0, 0.0), (s.gamma, s.tabulated[-1]))]
    for axis, (setting, gamma, epsilon) in zip(axes, cases, strict=True):
        path = flow(setting, gamma, epsilon)
        time = np.maximum(path.time, 1e-2)
        axis.plot(time, path.trajectory[:, nonzeros:], color="#bbbbbb", linewidth=0.8)
        axis.plot(time, path.trajectory[:, :nonzeros], color=drawing.COLOURS["F-GR"], linewidth=2.0)
        axis.axhline(1 / np.sqrt(nonzeros), color="#D55E00", linestyle="--", linewidth=1.3)
        axis.plot([], [], color=drawing.COLOURS["F-GR"], label=f"β of the {nonzeros} coordinates in the target")
        axis.plot([], [], color="#bbbbbb", label="β of all others (target 0)")
        axis.plot([], [], color="#D55E00", linestyle="--", label="their value in the target")
        axis.set_xscale("log")
        axis.set_xlim(1e-2, float(time[-1]))
        axis.set_ylim(-0.25, 0.7 * np.sqrt(3 / nonzeros))
        what = "no penalty" if gamma == 0 else f"F-GR, γ = {gamma:g}, ε = {epsilon:g}"
        drawing.label(axis, f"{setting.name} data, {what}", "flow time (learning rate × steps)", "coordinates of β")
    drawing.legend_below(figure, axes[0])
    return figure


def _draw_steps(rows: list[tuple[str, float, int, float, float]]):
    figure, (axis,) = drawing.panels(1, width=5.6)
    for name, size in (("B-GR", 11), ("DB", 7.5), ("F-GR", 5)):
        mine = [row for row in rows if row[0] == name]
        axis.plot(
            [0.0, *(row[1] * 1e4 for row in reversed(mine))],
            [0.0, *(row[3] * 1e4 for row in reversed(mine))],
            marker={"B-GR": "s", "DB": "D", "F-GR": "o"}[name],
            markersize=size,
            color=drawing.COLOURS[name],
            label=name,
        )
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    drawing.label(axis, "Real steps of gradreg.torch approach the flow", "learning rate η (10⁻⁴)", "‖β − β of the flow‖ at t = 0.2 (10⁻⁴)")
    drawing.legend(axis, loc="upper left")
    return figure
