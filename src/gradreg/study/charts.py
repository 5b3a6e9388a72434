"""The page's charts, figures of Plotly that ``chart.js`` draws: learning curves, what evaluations and seconds buy, a dot for each seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from gradreg.sharpness.measures import MEASURES, PREFIX
from gradreg.study.results import Record
from gradreg.study.table import Row
from gradreg.study.tasks import Metric

# Okabe and Ito's palette, which is distinguishable with any kind of color vision; the baseline is gray.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_BASELINE = "#666666"

History = Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]
"""(row's label, seed) -> the records of that run; runs that diverged or failed are left out."""

Place = Callable[[Mapping[str, Any]], float | None]


def learning_curves(rows: Sequence[Row], history: History, metric: Metric) -> go.Figure | None:
    """The test metric after each epoch, mean and one standard deviation over the seeds, at equal epochs; validation dotted."""
    by_epoch = any(record.get("epoch") is not None for records in history.values() for record in records)
    figure = empty_figure("epoch" if by_epoch else "step", f"{metric.title}{metric.unit}")
    equal = {row.label for row in rows if row.budget == "epochs"}
    for row in rows:
        if row.label in equal:
            _curve(figure, row, history, rows, metric, x=lambda record: record.get("epoch" if by_epoch else "step"))
            _curve(figure, row, history, rows, metric, x=lambda record: record.get("epoch" if by_epoch else "step"), key=metric.validation)
    return _with_range_of_second_halves(figure, {key: records for key, records in history.items() if key[0] in equal}, metric)


def metric_by_cost(rows: Sequence[Row], history: History, metric: Metric) -> go.Figure | None:
    """The test metric against the gradient evaluations spent; longer baselines are dashed."""
    figure = empty_figure("gradient evaluations", f"test {metric.title}{metric.unit}")
    for row in rows:
        _curve(figure, row, history, rows, metric, x=lambda record: record.get("gradient_evaluations"))
    return _with_range_of_second_halves(figure, history, metric)


def metric_by_seconds(rows: Sequence[Row], history: History, metric: Metric) -> go.Figure | None:
    """The test metric against the seconds spent; None where runs do not record them."""
    figure = empty_figure("seconds", f"test {metric.title}{metric.unit}")
    for row in rows:
        _curve(figure, row, history, rows, metric, x=lambda record: record.get("seconds"))
    return _with_range_of_second_halves(figure, history, metric) if figure.data else None


def dots(rows: Sequence[Row], runs_of: Mapping[str, Sequence[Record]], metric: Metric) -> go.Figure:
    """Final test metric of every run, their mean as a bar, and the runs of a seed joined by a thin line."""
    figure = empty_figure("", f"final test {metric.title}{metric.unit}")
    seeds = sorted({run.seed for group in runs_of.values() for run in group})
    places = dict(zip(seeds, np.linspace(-0.18, 0.18, len(seeds)) if len(seeds) > 1 else [0.0], strict=True))
    for seed in seeds:
        joined = [(i, run) for i, row in enumerate(rows) for run in runs_of[row.label] if run.seed == seed and run.test is not None]
        figure.add_trace(
            go.Scatter(
                x=[i + places[seed] for i, _ in joined],
                y=[metric.shown(run.test or 0.0) for _, run in joined],
                mode="lines",
                line={"color": "#c9cfd6", "width": 1},
                hoverinfo="skip",
                showlegend=False,
            )
        )
    for position, row in enumerate(rows):
        finished = [run for run in runs_of[row.label] if run.test is not None]
        color = _color(row, rows)
        figure.add_trace(
            go.Scatter(
                x=[position + places[run.seed] for run in finished],
                y=[metric.shown(run.test or 0.0) for run in finished],
                mode="markers",
                marker={"color": color, "size": 9, "opacity": 0.75},
                name=row.label,
                text=[f"seed {run.seed}" for run in finished],
                hovertemplate=f"%{{text}}: %{{y:.4g}}{' %' if metric.percent else ''}<extra>{row.label}</extra>",
                showlegend=False,
            )
        )
        if row.mean is not None:
            figure.add_shape(type="line", x0=position - 0.3, x1=position + 0.3, y0=row.mean, y1=row.mean, line={"color": color, "width": 3})
    figure.update_xaxes(tickvals=list(range(len(rows))), ticktext=[row.label.replace(", ", ",<br>") for row in rows], showgrid=False)
    return figure


def _curve(figure: go.Figure, row: Row, history: History, rows: Sequence[Row], metric: Metric, *, x: Place, key: str | None = None) -> None:
    key = key or metric.test
    runs = [
        [r for r in records if r.get(key) is not None and x(r) is not None] for (label, _), records in history.items() if label == row.label
    ]
    runs = [records for records in runs if records]
    if not runs:
        return
    shortest = min(len(records) for records in runs)
    places = [float(np.mean([x(records[i]) or 0.0 for records in runs])) for i in range(shortest)]
    values = np.array([[metric.shown(record[key]) for record in records[:shortest]] for records in runs])
    mean, spread = values.mean(axis=0), values.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(shortest)
    color, test = _color(row, rows), key == metric.test
    if len(runs) > 1 and test:
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
    dash = "dot" if not test else "dash" if row.budget != "epochs" else "solid"
    figure.add_trace(
        go.Scatter(
            x=places,
            y=mean.tolist(),
            mode="lines",
            name=row.label,
            legendgroup=row.label,
            showlegend=test,
            line={"color": color, "width": 2.5 if test else 1.5, "dash": dash},
            hovertemplate=f"%{{y:.4g}}{' %' if metric.percent else ''}<extra>{row.label}</extra>",
        )
    )


def _with_range_of_second_halves(figure: go.Figure, history: History, metric: Metric) -> go.Figure:
    """The metric's axis limited to the range of the second halves of the runs: the first epochs would squeeze the rest together."""
    late = [
        metric.shown(record[metric.test])
        for records in history.values()
        for record in records[len(records) // 2 :]
        if metric.test in record
    ]
    if late:
        margin = 0.15 * (max(late) - min(late)) or 0.05 * abs(late[0]) or 0.5
        low, high = min(late) - margin, max(late) + margin
        figure.update_yaxes(range=[max(0.0, low), min(100.0, high)] if metric.percent else [low, high])
    return figure


def sharpness_by_metric(rows: Sequence[Row], runs_of: Mapping[str, Sequence[Record]], metric: Metric, measure: str) -> go.Figure:
    """A measure of sharpness and the final test metric of every run, on a logarithmic axis where all values are positive."""
    figure = empty_figure(MEASURES[measure], f"final test {metric.title}{metric.unit}")
    everything: list[float] = []
    for row in rows:
        there = [(value, run) for run in runs_of[row.label] if (value := run.sharpness.get(measure)) is not None and run.test is not None]
        everything += [value for value, _ in there]
        figure.add_trace(
            go.Scatter(
                x=[value for value, _ in there],
                y=[metric.shown(run.test or 0.0) for _, run in there],
                mode="markers",
                marker={"color": _color(row, rows), "size": 8, "opacity": 0.75 if row.budget == "epochs" else 0.35},
                name=row.label,
                text=[f"seed {run.seed}" for _, run in there],
                hovertemplate=f"%{{text}}: %{{y:.4g}}{' %' if metric.percent else ''}<extra>{row.label}</extra>",
            )
        )
    figure.update_xaxes(type="log" if everything and min(everything) > 0 else "linear")
    return figure


def sharpness_over_training(rows: Sequence[Row], history: History, measures: Sequence[str]) -> go.Figure | None:
    """The mean over seeds of the first measure, at each of its measurements; None where runs were measured once."""
    key = f"{PREFIX}{measures[0]}"
    by_epoch = any(record.get("epoch") is not None for records in history.values() for record in records)
    unit = "epoch" if by_epoch else "step"
    figure = empty_figure(unit, MEASURES[measures[0]])
    several = False
    for row in rows:
        runs = [
            [(record[unit], record[key]) for record in records if _is_finite(record.get(key))]
            for (label, _), records in history.items()
            if label == row.label
        ]
        runs = [run for run in runs if run]
        places = sorted(set.intersection(*({place for place, _ in run} for run in runs))) if runs else []
        several = several or len(places) > 1
        means = [float(np.mean([dict(run)[place] for run in runs])) for place in places]
        figure.add_trace(go.Scatter(x=places, y=means, mode="lines+markers", name=row.label, line={"color": _color(row, rows), "width": 2}))
    return figure if several else None


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and bool(np.isfinite(value))


def color_at(place: int) -> str:
    """The color of what stands at a place, the baseline at 0."""
    return _BASELINE if place == 0 else _COLORS[(place - 1) % len(_COLORS)]


def _color(row: Row, rows: Sequence[Row]) -> str:
    return color_at(list(dict.fromkeys(r.variant for r in [rows[0], *rows])).index(row.variant))


def empty_figure(x_title: str, y_title: str) -> go.Figure:
    """A figure in the style of all of them."""
    figure = go.Figure()
    figure.update_layout(
        template="none",  # chart.js has the style
        height=420,
    )
    figure.update_xaxes(title=x_title)
    figure.update_yaxes(title=y_title)
    return figure
