"""``gradreg lab edge``: gradient descent sharpens to 2/η and SAM to an edge of its own, measured on MNIST or on data that are made."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from gradreg import checks
from gradreg.theory.edge import EdgePath, follow, mnist, synthetic
from gradreg.theory.lab import drawing
from gradreg.theory.lab.report import LabReport, Table

HELP = "the edge of stability of gradient descent (2/eta) and of SAM, by the measured Hessian, on MNIST or on data that are made"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("--data", choices=("synthetic", "mnist"), default="synthetic", help="what is trained on (default synthetic)")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder that holds MNIST/raw (default data)")
    parser.add_argument("--samples", type=int, default=1000, help="training samples, all in every step, >= 1 (default 1000)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[100, 100], help="widths of the hidden layers (default 100 100)")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[0.1, 0.2], help="eta, each > 0 (default 0.1 0.2)")
    parser.add_argument("--rhos", type=float, nargs="+", default=[0.0, 0.02, 0.1], help="radii, 0 is gradient descent (default 0 0.02 0.1)")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each run, >= 1 (default 1000)")
    parser.add_argument("--every", type=int, default=20, help="steps from one measurement to the next, >= 1 (default 20)")


def run(options: argparse.Namespace) -> LabReport:
    """Train with each learning rate and radius, tabulate and draw the measured curvature beside the edges."""
    for rate in options.learning_rates:
        checks.positive("--learning-rates", rate)
    for rho in options.rhos:
        checks.non_negative("--rhos", rho, remedy="0 is gradient descent.")
    if options.data == "mnist":
        problem = mnist(options.root, samples=options.samples)
    else:
        problem = synthetic(samples=options.samples, seed=options.seed)
    paths = [
        follow(
            problem,
            learning_rate=rate,
            rho=rho,
            steps=options.steps,
            every=options.every,
            hidden=options.hidden,
            seed=options.seed,
        )
        for rate in dict.fromkeys(options.learning_rates)
        for rho in dict.fromkeys(options.rhos)
    ]
    columns = (
        "method",
        "eta",
        "rho",
        "loss",
        "|g|",
        "curvature",
        "2/eta",
        "edge",
        "reached at step",
        "curvature/edge",
        "1st quartile",
        "3rd",
    )
    tables = {
        "edge": Table(
            columns,
            [_row(path) for path in paths],
            f"Largest eigenvalue of the Hessian after {options.steps} steps on {options.samples} samples of {options.data}, and the edge; "
            "curvature/edge: median and quartiles since it was reached",
        ),
        "curves": Table(
            ("eta", "rho", "step", "loss", "|g|", "curvature", "error", "edge"),
            [
                (p.learning_rate, p.rho, int(p.step[i]), *(float(v[i]) for v in (p.loss, p.gradient_norm, p.sharpness, p.error, p.edge)))
                for p in paths
                for i in range(len(p.step))
            ],
        ),
    }
    return LabReport(tables, {"edge": _draw(paths)}, _remarks(paths))


def _row(path: EdgePath) -> tuple[str | float | int, ...]:
    last = (path.loss, path.gradient_norm, path.sharpness)
    arrival = "never" if path.arrival is None else str(path.arrival)
    method = ("gradient descent" if path.rho == 0 else "SAM") + (", diverged" if path.diverged else "")
    ends = [float(values[-1]) for values in last]
    return method, path.learning_rate, path.rho, *ends, 2 / path.learning_rate, float(path.edge[-1]), arrival, *path.settled()


def _remarks(paths: Sequence[EdgePath]) -> list[str]:
    remarks = [
        "On a quadratic nothing above the edge is stable. Here curvature reaches it and stays around it while the loss goes on falling: "
        "the edge is where training lives, not a limit that it must keep away from."
    ]
    never = [path for path in paths if path.arrival is None]
    if never:
        named = ", ".join(f"eta {path.learning_rate:g} with rho {path.rho:g}" for path in never)
        remarks.append(f"The edge was not reached by {named}: train longer (--steps), or with a larger learning rate.")
    return remarks


def _draw(paths: Sequence[EdgePath]):
    rates = list(dict.fromkeys(path.learning_rate for path in paths))
    radii = list(dict.fromkeys(path.rho for path in paths))
    figure, axes = drawing.panels(len(rates), rows=2, width=5.2, height=3.5)
    for i, rate in enumerate(rates):
        above, below = axes[i], axes[len(rates) + i]
        for path in (path for path in paths if path.learning_rate == rate):
            color = drawing.SEQUENCE[radii.index(path.rho) % len(drawing.SEQUENCE)]
            name = "gradient descent" if path.rho == 0 else f"SAM, ρ = {path.rho:g}"
            above.plot(path.step, path.sharpness, color=color, label=name)
            above.plot(path.step, path.edge, color=color, linestyle="--", linewidth=1.1)
            below.semilogy(path.step, path.loss, color=color)
        above.plot([], [], color="black", linestyle="--", linewidth=1.1, label="its edge: 2/η, or SAM's at the measured ‖g‖")
        above.set_ylim(0, 1.5 * 2 / rate)
        drawing.label(above, f"η = {rate:g}", "steps", "largest eigenvalue of the Hessian")
        drawing.label(below, f"η = {rate:g}", "steps", "loss")
    drawing.legend_below(figure, axes[0])
    return figure
