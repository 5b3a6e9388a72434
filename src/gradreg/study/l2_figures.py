"""The figure of a weight-decay probe, by matplotlib."""

from __future__ import annotations

import io
from pathlib import Path

from gradreg import files
from gradreg.study.l2_probe import Probe


def draw_probe(probe: Probe, path: Path) -> Path:
    """Write the probe's validation accuracy over its steps, with t* marked, as a PNG; returns ``path``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.add_subplot()
    axis.plot(
        probe.steps, [100 * a for a in probe.accuracies], ".", color="#0072B2", alpha=0.5 if probe.smooth > 1 else 1.0, label="measured"
    )
    if probe.smooth > 1:
        axis.plot(probe.steps, [100 * a for a in probe.smoothed], color="#0072B2", label=f"mean of {probe.smooth}")
    color = "#D55E00" if probe.rejection else "#009E73"
    axis.axvline(probe.best_step, color=color, linestyle="--", label=f"t* = {probe.best_step}" + (" (rejected)" if probe.rejection else ""))
    axis.set(
        xlabel=f"optimizer steps (clock at t*: {probe.constant:.3g})",
        ylabel="validation accuracy, %",
        xlim=(0, probe.probe_steps),
        title=f"probe at L2 {probe.l2:g}, learning rate {probe.learning_rate:g}",
    )
    axis.grid(alpha=0.3)
    axis.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    files.write_bytes(path, buffer.getvalue())
    return path
