"""``search.html``: the search drawn, what the values of each side scored and how the best came about, and every trial in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import plotly.graph_objects as go

from gradreg import files
from gradreg.study import charts
from gradreg.study.report import drawn_figures, render
from gradreg.study.search import Finding, Search


def write_search_page(
    search: Search,
    findings: Sequence[Finding],
    chosen: Mapping[str, Finding],
    path: Path,
    *,
    sentences: Sequence[str],
    verdicts: Sequence[str],
    warnings: Sequence[str],
    confirmed: bool,
) -> Path:
    """Write the page of a search, and return its path.

    Args:
        search: what was searched.
        findings: every trial.
        chosen: side -> its best trial.
        path: of the page.
        sentences: what was chosen.
        verdicts: what the comparison with fresh seeds says.
        warnings: what must be known beside it.
        confirmed: whether that comparison lies in ``confirmation``.
    """
    metric = search.task.metric
    keys = list(dict.fromkeys(key for arm in search.arms for key in arm.space))
    figures = {
        f"What {key.removeprefix('penalty.')} does": (
            _scores(search, findings, key),
            "Each point is a trial: the mean of its seeds. Hollow: dropped before it had all of them, behind the best of its side.",
        )
        for key in keys
    }
    figures["How the best came about"] = (
        _progress(search, findings),
        "The best complete trial of each side, against the runs it had so far.",
    )
    page = render(
        "search.html",
        title=f"{search.task.name}: which strength?",
        description=search.task.description,
        verdicts=[*sentences, *verdicts],
        warnings=warnings,
        confirmed=confirmed,
        figures=drawn_figures(figures),
        metric=metric,
        trials=[
            {
                "arm": one.arm,
                "number": one.number,
                "searched": one.shown_values(),
                "score": "" if one.mean is None else f"{metric.shown(one.mean):.4g}",
                "seeds": len(one.scores),
                "end": one.error or one.state,
                "seconds": f"{one.seconds:.1f}",
                "chosen": chosen.get(one.arm) == one,
            }
            for one in findings
        ],
    )
    files.write_text(path, page)
    return path


def _scores(search: Search, findings: Sequence[Finding], key: str) -> go.Figure:
    """The mean of validation over the values of one thing that is searched."""
    metric = search.task.metric
    figure = charts.empty_figure(key.removeprefix("penalty."), f"validation {metric.title}{metric.unit}")
    if all(getattr(arm.space.get(key), "log", True) for arm in search.arms if key in arm.space):
        figure.update_xaxes(type="log")
    for place, arm in enumerate(search.arms):
        for complete in (True, False):
            group = [
                one for one in findings
                if one.arm == arm.name and key in one.values and one.mean is not None and (one.state == "complete") == complete
            ]  # fmt: skip
            figure.add_trace(
                go.Scatter(
                    x=[one.values[key] for one in group],
                    y=[metric.shown(one.mean or 0.0) for one in group],
                    mode="markers",
                    marker={"color": charts.color_at(place), "size": 9, "symbol": "circle" if complete else "circle-open"},
                    name=arm.name,
                    legendgroup=arm.name,
                    showlegend=complete and bool(group),
                    text=[f"trial {one.number}: {one.shown_values()}" for one in group],
                    hovertemplate=f"%{{text}}<br>%{{y:.4g}}<extra>{arm.name}</extra>",
                )
            )
    return figure


def _progress(search: Search, findings: Sequence[Finding]) -> go.Figure:
    """The best mean of each side so far, over the runs of that side."""
    metric = search.task.metric
    figure = charts.empty_figure("runs of the side", f"best validation {metric.title}{metric.unit}")
    for place, arm in enumerate(search.arms):
        runs, best = 0, None
        x: list[int] = []
        y: list[float] = []
        for one in findings:
            if one.arm != arm.name:
                continue
            runs += len(one.scores)
            if one.state == "complete" and one.mean is not None and (best is None or metric.is_better(one.mean, best)):
                best = one.mean
            if best is not None:
                x.append(runs)
                y.append(metric.shown(best))
        if x:
            line = {"color": charts.color_at(place), "width": 2.5, "shape": "hv"}
            figure.add_trace(go.Scatter(x=x, y=y, mode="lines", name=arm.name, line=line))
    return figure
