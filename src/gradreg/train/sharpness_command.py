"""``gradreg sharpness RUN``: the curvature of trained runs, side by side, as a table, a picture and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradreg import checks, files
from gradreg.sharpness.measures import CAUTION, DEFAULT, MEASURES
from gradreg.study.sharpness import correlation_text
from gradreg.study.statistics import rank_correlation
from gradreg.train.arguments import CommandParser
from gradreg.train.configuration import Config
from gradreg.train.data.configuration import AugmentationConfig
from gradreg.train.evaluate_command import configuration_and_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gradreg.penalties import GradientPenalty
    from gradreg.sharpness import Slice, Spectrum

DESCRIPTION = (
    "Measure how sharp the minima of trained runs are: the largest eigenvalue and the trace of the Hessian, how far the loss rises along "
    "SAM's perturbation (from the gradient of all samples, and from that of each batch), and the critical sharpness along the gradient. "
    "All on the first samples of the set, not augmented, in eval mode. Keys of an evaluation can be overridden, as in --data.root "
    "ELSEWHERE. It is a diagnostic, not a goal: flatter is not better as such."
)
SPLITS = ("train", "validation", "test")
COLUMNS = {**{name: MEASURES[name] for name in DEFAULT}, "loss": "loss", "test_metric": "test"}


@dataclass(frozen=True)
class MeasuredRun:
    """One run's numbers.

    Args:
        numbers: what is written as JSON.
        line: the slice of the loss.
        density: the spectral density, if it was asked for.
    """

    numbers: dict[str, Any]
    line: Slice
    density: Spectrum | None


def main(argv: Sequence[str]) -> int:
    """Run ``gradreg sharpness``; returns 0."""
    parser = CommandParser("sharpness", DESCRIPTION, positional=("run", "folder of the run"))
    parser.add("--against", type=str, nargs="+", default=[], metavar="RUN", help="folders of other runs")
    parser.add("--weights", type=str, default="last", help="last, best or ema")
    parser.add("--split", type=str, default="train", help="train, validation or test")
    parser.add("--samples", type=int, default=1000, help="how many of its samples, >= 1 (default 1000)")
    parser.add("--batch", type=int, default=100, help="samples at a time, which are also the m of the m-sharpness (default 100)")
    parser.add("--rho", type=float, default=0.05, help="radius of SAM's perturbation, > 0 (default 0.05)")
    parser.add("--vectors", type=int, default=10, help="random vectors for the trace, >= 2 (default 10)")
    parser.add("--spectrum", action="store_true", help="the spectral density too, for about 200 products more")
    parser.add("--out", type=str, default=None, help="folder for sharpness.json, .png and .svg (default: none are written)")
    parser.add("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse(argv)
    checks.choice("--split", options["split"], SPLITS)
    checks.whole("--samples", options["samples"], minimum=1)
    checks.whole("--batch", options["batch"], minimum=1)
    checks.whole("--vectors", options["vectors"], minimum=2)
    checks.positive("--rho", options["rho"])
    runs = list(dict.fromkeys([options["run"], *options["against"]]))
    configured = [(run, *configuration_and_weights(parser, argv, run, options["weights"])) for run in runs]
    out = None if options["out"] is None else files.make_directory(Path(options["out"]), purpose="--out")
    measured = [_measured(run, config, file, options) for run, config, file in configured]
    report = {
        "runs": [m.numbers for m in measured],
        "settings": {key: options[key] for key in ("weights", "split", "samples", "batch", "rho", "vectors")},
        "caution": CAUTION,
        "rank_correlation_with_test": _correlations([m.numbers for m in measured]),
    }
    if out is not None:
        files.write_json(out / "sharpness.json", report)
        _write(_figure(measured), out)
    print(json.dumps(report, allow_nan=False) if options["json"] else _text(report))
    return 0


def _measured(run: str, config: Config, weights: Path, options: Mapping[str, Any]) -> MeasuredRun:
    """Load a run, and measure it."""
    import torch

    from gradreg import sharpness
    from gradreg.train import models
    from gradreg.train.devices import Devices
    from gradreg.train.loop import load_data
    from gradreg.train.run_folder import RunFolder
    from gradreg.train.run_to_folder import load_weights
    from gradreg.train.sharpness_recorder import closures_of

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    notes: list[str] = []
    if config.precision in ("bf16", "fp16"):
        notes.append(f"Measured in fp32; the run computes in {config.precision}.")
        config.precision = "fp32"
    if not config.data.is_own:
        config.augmentation = AugmentationConfig(normalize=config.augmentation.normalize)
    devices = Devices(config)
    try:
        if devices.processes > 1:
            raise ValueError(f"sharpness must run in one process; got {devices.processes}. Start it without torchrun or accelerate launch.")
        data = load_data(config, devices)
        model = models.create(config.model, classes=data.classes, image_shape=data.image_shape, code=config.code)
        model.to(devices.device, torch.float64 if config.precision == "fp64" else None)
        load_weights(model, weights)
        if options["split"] == "validation" and data.validation is None:
            raise ValueError(f"--split must name samples that there are; got 'validation' of {run!r}, which has none. Use train or test.")
        wanted = options["samples"]
        samples = {"train": data.unaugmented(wanted), "validation": data.validation, "test": data.test}[options["split"]]
        assert samples is not None
        closures, sizes = closures_of(config, model, samples.batches(options["batch"]), wanted)
        common: dict[str, Any] = {"sizes": sizes, "mode": "eval"}
        found = sharpness.summary(model, closures, measures=list(MEASURES), rho=options["rho"], vectors=options["vectors"], **common)
        for name, why in found.failures.items():
            if name != "critical_sharpness":
                raise why
            notes.append(f"No critical sharpness: {why}")
        penalty, step, penalized = _penalized(config, model, closures, found.results, len(data.train), notes, common)
        line = sharpness.slice_1d(model, closures, **common)
        density = sharpness.spectrum(model, closures, steps=40, **common) if options["spectrum"] else None
    finally:
        devices.close()
    top, trace = found.results["largest_eigenvalue"], found.results["trace"]
    numbers = {
        "run": run,
        "method": top.method,
        "samples": sum(sizes),
        "loss": top.loss,
        "gradient_norm": top.gradient_norm,
        **dict.fromkeys(MEASURES),
        **found.numbers,
        "share_by_layer": sharpness.by_layer(top.shares[0]),
        "learning_rate": config.optimizer.lr,
        "momentum": config.optimizer.momentum if config.optimizer.name == "sgd" else 0.0,
        "optimizer": config.optimizer.name,
        "penalty": None if penalty is None else penalty.to_dict(),
        "penalty_step": step,
        "penalized": penalized,
        "product_error": None if top.product_error is None else float(top.product_error),
        "trace_by_layer": sharpness.by_layer(trace.by_parameter),
        "negative_share": None if density is None else density.share_below(0.0)[0],
        "test_metric": _test_metric(RunFolder(Path(run)), config, options["weights"]),
        "slice": {"positions": line.positions.tolist(), "losses": line.losses.tolist()},
        "gradients": found.gradients + sum(one.passes.gradients for one in (line, density) if one is not None),
        "notes": list(dict.fromkeys([*found.notes, *line.notes, *notes])),
    }
    return MeasuredRun(_plain(numbers), line, density)


def _penalized(
    config: Config, model: Any, closures: Any, results: Mapping[str, Any], images: int, notes: list[str], common: Mapping[str, Any]
) -> tuple[GradientPenalty | None, int, list[dict[str, float]]]:
    """The run's penalty, its last step, and what it makes there of the curvature along the outermost eigenvectors."""
    from gradreg import sharpness

    steps_per_epoch = config.steps_per_epoch(images)
    penalty, last = config.resolved_penalty(steps_per_epoch).penalty, config.epochs * steps_per_epoch - 1
    measured: list[dict[str, float]] = []
    if penalty is None:
        return None, last, measured
    for name in ("largest_eigenvalue", "smallest_eigenvalue"):
        top = results[name]
        try:
            found = sharpness.penalized_curvature(model, closures, penalty, top.vectors[0], at=last, **common)
        except ValueError as error:
            notes.append(f"What the penalty makes of the curvature was not measured: {error}")
            break
        measured.append({"curvature": float(top.values[0]), "penalized": found.value, "error": found.error})
    return penalty, last, measured


def _test_metric(folder: Any, config: Config, weights: str) -> float | None:
    """The run's own test metric for these weights, as it was recorded when they were."""
    result = folder.result()
    name = config.objective.judged.name
    if result is None or weights not in ("last", "ema"):
        return None
    value = result.get(f"{'ema_' if weights == 'ema' else ''}test_{name}")
    return float(value) if isinstance(value, (int, float)) else None


def _correlations(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]] | None:
    """Spearman's correlation of each number with the test metric, its 95 % interval and n, from five runs on."""
    known = [run for run in runs if run["test_metric"] is not None]
    found: dict[str, dict[str, Any]] = {}
    for key in MEASURES:
        pairs = [(run[key], run["test_metric"]) for run in known if run[key] is not None]
        one = rank_correlation([value for value, _ in pairs], [metric for _, metric in pairs])
        if one is not None:
            found[key] = {"value": one.value, "low": one.low, "high": one.high, "n": one.n}
    return found or None


def _text(report: Mapping[str, Any]) -> str:
    """The table, notes and caution for a terminal."""
    runs, settings = report["runs"], report["settings"]
    rows = [["run", *COLUMNS.values()], *([run["run"], *(_cell(run, key) for key in COLUMNS)] for run in runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows
    ]
    lines += [
        "",
        f"{settings['split']} samples {runs[0]['samples']}, {settings['weights']} weights; rises at rho {settings['rho']:g}, each batch of "
        f"{settings['batch']}; ± standard errors; {sum(run['gradients'] for run in runs):.0f} gradients of these samples in all.",
    ]
    correlations = report["rank_correlation_with_test"]
    if correlations:
        lines.append(
            "Rank correlation with the test metric over these runs, with 95 % intervals: "
            + "; ".join(f"{MEASURES[key]} {correlation_text(one)}" for key, one in correlations.items())
            + "."
        )
    for run in runs:
        lines += [f"{run['run']}: {note}" for note in run["notes"]]
    return checks.printable("\n".join([*lines, report["caution"]]))


def _cell(run: Mapping[str, Any], key: str) -> str:
    value, error = run[key], run.get(f"{key}_error")
    if value is None:
        return "-"
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.1g}"


def _plain(numbers: dict[str, Any]) -> dict[str, Any]:
    """Numbers that JSON can hold: None for NaN and infinity."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list) else value

    return plain(numbers)


def _figure(measured: Sequence[MeasuredRun]) -> Figure:
    """Slices of the loss, and spectral densities where they were measured."""
    from matplotlib.figure import Figure

    dense = [m for m in measured if m.density is not None]
    figure = Figure(figsize=(5.2 * (2 if dense else 1), 3.9), layout="constrained")
    axes = figure.subplots(1, 2 if dense else 1, squeeze=False)[0]
    for one in measured:
        axes[0].plot(one.line.positions, one.line.losses, label=one.numbers["run"])
    axes[0].set(title="Along one random direction, filters normalized", xlabel="distance in lengths of the filters", ylabel="loss")
    axes[0].legend(frameon=False, fontsize=8)
    for one in dense:
        assert one.density is not None
        grid = one.density.grid(600)
        axes[1].semilogy(grid, one.density.density(grid)[0].clip(1e-6), label=one.numbers["run"])
    if dense:
        axes[1].set(title="Eigenvalues of the Hessian", xlabel="eigenvalue", ylabel="density")
    return figure


def _write(figure: Figure, out: Path) -> None:
    import io

    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "gradreg"}):
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            content = io.BytesIO()
            figure.savefig(content, format=suffix, dpi=130, metadata=metadata)
            files.write_bytes(out / f"sharpness.{suffix}", content.getvalue())
