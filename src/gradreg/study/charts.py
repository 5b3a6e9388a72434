"""The page's charts, by Plotly: learning curves, accuracy against gradient evaluations, and a dot for each seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from gradreg.study.results import Run
from gradreg.study.table import Row
from gradreg.train.outcome import Epoch

# Okabe and Ito's palette, which is distinguishable with any kind of color vision; the baseline is gray.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_BASELINE = "#666666"

History = Mapping[tuple[str, int], Sequence[Epoch]]
"""(row's label, seed) -> the epochs of that run; runs that diverged are left out."""


def learning_curves(rows: Sequence[Row], history: History) -> go.Figure:
    """Test accuracy after each epoch, mean and one standard deviation over the seeds, at equal epochs."""
    figure = _figure("epoch", "test accuracy, %")
    equal = {row.label for row in rows if row.budget == "epochs"}
    for row in rows:
        if row.label in equal:
            _curve(figure, row, history, rows, x=lambda epoch: epoch.epoch)
    return _with_range_of_second_halves(figure, {key: epochs for key, epochs in history.items() if key[0] in equal})


def accuracy_by_cost(rows: Sequence[Row], history: History) -> go.Figure:
    """Test accuracy against the gradient evaluations spent; the compute-matched baselines are dashed."""
    figure = _figure("gradient evaluations", "test accuracy, %")
    for row in rows:
        _curve(figure, row, history, rows, x=lambda epoch: epoch.gradient_evaluations)
    return _with_range_of_second_halves(figure, history)


def dots(rows: Sequence[Row], runs_of: Mapping[str, Sequence[Run]]) -> go.Figure:
    """Final test accuracy of every run, and their mean as a bar."""
    figure = _figure("", "final test accuracy, %")
    for row in rows:
        finished = [run for run in runs_of[row.label] if run.test_accuracy is not None]
        color = _color(row, rows)
        spread = np.linspace(-0.18, 0.18, len(finished)) if len(finished) > 1 else [0.0] * len(finished)
        position = list(rows).index(row)
        figure.add_trace(
            go.Scatter(
                x=[position + s for s in spread],
                y=[100 * (run.test_accuracy or 0.0) for run in finished],
                mode="markers",
                marker={"color": color, "size": 9, "opacity": 0.75},
                name=row.label,
                text=[f"seed {run.seed}" for run in finished],
                hovertemplate="%{text}: %{y:.2f} %<extra>" + row.label + "</extra>",
                showlegend=False,
            )
        )
        if row.accuracy is not None:
            figure.add_shape(
                type="line", x0=position - 0.3, x1=position + 0.3, y0=row.accuracy, y1=row.accuracy, line={"color": color, "width": 3}
            )
    figure.update_xaxes(tickvals=list(range(len(rows))), ticktext=[row.label.replace(", ", ",<br>") for row in rows], showgrid=False)
    return figure


def _curve(figure: go.Figure, row: Row, history: History, rows: Sequence[Row], *, x: Callable[[Epoch], float]) -> None:
    runs = [epochs for (label, _), epochs in history.items() if label == row.label]
    if not runs:
        return
    shortest = min(len(epochs) for epochs in runs)
    places = [x(epoch) for epoch in runs[0][:shortest]]
    accuracy = 100 * np.array([[epoch.test_accuracy for epoch in epochs[:shortest]] for epochs in runs])
    mean, spread = accuracy.mean(axis=0), accuracy.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(shortest)
    color = _color(row, rows)
    if len(runs) > 1:
        figure.add_trace(
            go.Scatter(
                x=[*places, *places[::-1]],
                y=[*(mean + spread), *(mean - spread)[::-1]],
                fill="toself",
                fillcolor=color,
                opacity=0.15,
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
                legendgroup=row.label,
            )
        )
    figure.add_trace(
        go.Scatter(
            x=places,
            y=mean.tolist(),
            mode="lines",
            name=row.label,
            legendgroup=row.label,
            line={"color": color, "width": 2.5, "dash": "dash" if row.budget == "gradients" else "solid"},
            hovertemplate="%{y:.2f} %<extra>" + row.label + "</extra>",
        )
    )


def _with_range_of_second_halves(figure: go.Figure, history: History) -> go.Figure:
    """The accuracy axis limited to the range of the second halves of the runs: the first epochs would squeeze the rest together."""
    late = [100 * epoch.test_accuracy for epochs in history.values() for epoch in epochs[len(epochs) // 2 :]]
    if late:
        margin = 0.15 * (max(late) - min(late)) + 0.5
        figure.update_yaxes(range=[max(0.0, min(late) - margin), min(100.0, max(late) + margin)])
    return figure


def _color(row: Row, rows: Sequence[Row]) -> str:
    if row.variant == rows[0].variant:
        return _BASELINE
    others = [r.variant for r in rows if r.variant != rows[0].variant]
    return _COLORS[others.index(row.variant) % len(_COLORS)]


def _figure(x_title: str, y_title: str) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        height=420,
        margin={"l": 60, "r": 16, "t": 16, "b": 48},
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
        hovermode="closest",
        dragmode=False,
    )
    figure.update_xaxes(title=x_title)
    figure.update_yaxes(title=y_title)
    return figure
