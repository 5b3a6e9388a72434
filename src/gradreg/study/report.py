"""``report.html``: one page that needs no network: verdicts, table, charts, configuration, environment, and a paragraph on the method."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
import yaml
from markupsafe import Markup

from gradreg import __version__, files
from gradreg.sharpness.measures import MEASURES
from gradreg.study import charts, logged, sharpness
from gradreg.study.history import read_history
from gradreg.study.plan import Plan
from gradreg.study.results import Record, by_row, over_seeds, race_said, warnings
from gradreg.study.table import Row, shown_columns

SPENDING = {"obrien-fleming": "O'Brien-Fleming", "pocock": "Pocock"}


DRAWN = 24
DRAWN_SEEDS = 100
"""Rows, and seeds of each, that charts show: more cannot be told apart, and the table has them."""


def write_report(
    plan: Plan,
    rows: Sequence[Row],
    records: Sequence[Record],
    environment: Mapping[str, Any],
    *,
    folder: Path,
    command: str = "",
    race: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page into ``folder`` and return its path.

    Args:
        plan: what was compared.
        rows: the table.
        records: the runs; their histories are read from their folders, under ``folder``.
        environment: where they ran.
        folder: the comparison's folder.
        command: the command line that made it, if one did.
        race: the rule and the looks of a race; None without one.
    """
    shown = rows[:DRAWN]
    runs_of = by_row(shown, records)
    drawn = [(label, run) for label, group in runs_of.items() for run in group[:DRAWN_SEEDS] if not run.diverged and run.error is None]
    history = {(label, run.seed): read_history(folder / run.folder) for label, run in drawn}
    name = plan.metric.title
    part = (
        ""
        if len(rows) <= DRAWN and all(len(group) <= DRAWN_SEEDS for group in runs_of.values())
        else (f" Of the first {len(shown)} rows, and {DRAWN_SEEDS} seeds at most; the table has all.")
    )
    figures = {
        "Learning curves": (
            charts.learning_curves(shown, history, plan.metric),
            f"Test {name} after each epoch: mean and one standard deviation. Dotted: validation, where it is logged." + part,
        ),
        "What the gradients buy": (
            charts.metric_by_cost(shown, history, plan.metric),
            "The same against gradient evaluations. Dashed: plain training, lengthened to as many evaluations." + part,
        ),
        "What the time buys": (
            charts.metric_by_seconds(shown, history, plan.metric),
            "The same against seconds. Workers share the machine: read the ratio of two curves rather than the seconds." + part,
        ),
        "Every seed": (
            charts.dots(shown, {label: group[:DRAWN_SEEDS] for label, group in runs_of.items()}, plan.metric),
            "One dot a run, the bar at their mean. Thin lines join the runs of a seed." + part,
        ),
    }
    found = sharpness.measured(rows, records, plan.metric)
    if found is not None:
        for i, measure in enumerate(found["measures"]):
            figures[f"Sharpness beside the metric: {MEASURES[measure]}"] = (
                charts.sharpness_by_metric(shown, runs_of, plan.metric, measure),
                "One dot a run, at the end of training." + (f" {found['caution']}" if i == 0 else ""),
            )
        figures["Sharpness over training"] = (
            charts.sharpness_over_training(shown, history, found["measures"]),
            f"{MEASURES[found['measures'][0]].capitalize()}: the mean over seeds at each measurement.",
        )
    beside = logged.measured(rows, records, plan.baseline)
    figures = {title: (figure, note) for title, (figure, note) in figures.items() if figure is not None}
    page = render(
        "report.html",
        title=f"{plan.task}: does a gradient penalty help?",
        description=plan.description,
        verdicts=[row.verdict() for row in rows if row.variant != plan.baseline],
        warnings=warnings(plan, records, race),
        metric=plan.metric,
        columns=shown_columns(rows),
        rows=rows,
        seeds=over_seeds(plan, records),
        equal_seconds=bool(plan.seconds),
        race=None if race is None else race_said(plan, race["looks"]),
        figures=drawn_figures(figures),
        logged=None if beside is None else _logged(beside),
        sharpness=None if found is None else _sharpness(found),
        configuration=yaml.safe_dump({name: dict(variant.settings) for name, variant in plan.variants.items()}, sort_keys=False),
        environment=yaml.safe_dump(dict(environment), sort_keys=False, allow_unicode=True),
        command=command,
        methods=methods(plan, rows, records, race),
    )
    path = folder / "report.html"
    files.write_text(path, page)
    return path


def _logged(found: Mapping[str, Any]) -> dict[str, Any]:
    """The block as the page shows it: headings, and lines of cells."""
    return {
        "headings": [logged.heading(name) for name in found["names"]],
        "lines": [(line["label"], [logged.cell(line[name]) for name in found["names"]]) for line in found["table"]],
        "not_judged": logged.NOT_JUDGED,
    }


def _sharpness(found: Mapping[str, Any]) -> dict[str, Any]:
    """The block as the page shows it: headings, lines of cells, and lines of correlations."""
    overs = list(dict.fromkeys(one["over"] for one in found["correlations"]))
    told = {(one["measure"], one["over"]): sharpness.correlation_text(one).partition(" ") for one in found["correlations"]}
    metric = next(key for key in found["table"][0] if key.startswith("test_"))
    return {
        "headings": [MEASURES[name] for name in found["measures"]],
        "lines": [
            (line["label"], (line[metric], line[f"{metric}_sd"]), [sharpness.cell(line[name]) for name in found["measures"]])
            for line in found["table"]
        ],
        "correlations": [(over, [told.get((name, over), ("", "", "")) for name in found["measures"]]) for over in overs],
        "caution": found["caution"],
        "not_independent": sharpness.NOT_INDEPENDENT if overs else "",
    }


def methods(plan: Plan, rows: Sequence[Row], records: Sequence[Record], race: Mapping[str, Any] | None = None) -> str:
    """A paragraph on the method, to be pasted into a paper."""
    others = [f"{name} ({variant.method})" for name, variant in plan.variants.items() if name != plan.baseline]
    seeds = over_seeds(plan, records)
    sentences = [
        f"We compared {', '.join(others)} with training without a penalty on {plan.task} over {seeds}, paired by seed "
        "(the same initialization, order of the data and split)."
    ]
    if "gradients" in plan.rivals and any(row.budget == "gradients" for row in rows):
        sentences.append(
            "As a second baseline, training without a penalty was lengthened, in whole epochs rounded up, until it had spent as many "
            "gradient evaluations."
        )
    if plan.seconds:
        rounds = max(len(one.rounds) for one in plan.seconds.values())
        ratios = ", ".join(f"{one.ratio:.3g} for {name}" for name, one in plan.seconds.items())
        sentences.append(
            "As another, it was lengthened, rounded up, until it takes as many seconds: the ratio of the seconds per epoch or step was "
            f"measured once on one machine, in short runs that alternate (median of up to {rounds} rounds: {ratios})."
        )
    if any(row.early_difference is not None for row in rows):
        sentences.append(
            "As a further one, it was stopped at the epoch with the best validation metric, as were the variants compared with it."
        )
    if race is None or plan.race is None:
        sentences.append(
            "Differences are means over seeds with 95 % intervals of the paired t test; verdicts are corrected for the number of variants "
            "by Holm's method, and a variant that diverged at any seed is never said to help."
        )
    else:
        looks = race["looks"]
        sentences.append(
            f"Seeds were added to the variants that were undecided, one at a time from {plan.race.first} up to at most {len(plan.seeds)} "
            f"({len(looks)} looks). At each look the paired t test was taken at the level that an error spending function of the "
            f"{SPENDING[plan.race.spending]} type leaves (Lan and DeMets 1983) of {1 - plan.race.level:.2g} for any false verdict over all "
            f"looks and variants, with Holm's method over the variants (Maurer and Bretz 2013); {looks[-1]['spent']:.2g} was spent. "
            "Differences are means over seeds; the 95 % intervals against the first baseline order results by stages, those against other "
            "baselines are repeated confidence intervals (Jennison and Turnbull 2000). A variant that diverged at any seed is never said "
            "to help."
        )
    sentences.append(f"Computed by gradreg {__version__}.")
    return " ".join(sentences)


def drawn_figures(figures: Mapping[str, tuple[go.Figure, str]]) -> list[dict[str, Any]]:
    """Figures with their notes, by title, as templates take them."""
    return [{"title": title, "note": note, "id": f"chart-{i}", **_parts(f)} for i, (title, (f, note)) in enumerate(figures.items())]


def _parts(figure: go.Figure) -> dict[str, Markup]:
    plain = json.loads(figure.to_json() or "{}")
    # "</" inside a script element would end it.
    return {name: Markup(json.dumps(plain[name]).replace("</", "<\\/")) for name in ("data", "layout")}


def render(template: str, **values: Any) -> str:
    """A page from its template in this folder; ``page.html`` has what all pages share."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=jinja2.FunctionLoader(_text_of)
    )
    shared = {"version": __version__, "chart_script": Markup(_text_of("chart.js")), "answer_first": answer_first}
    return environment.get_template(template).render(**shared, **values)


def answer_first(verdict: str) -> tuple[str, str]:
    """A verdict in two parts: what it answers ("sam helps", "gnp: cannot tell with 5 seeds"), and what it rests on."""
    answer = _ANSWER.match(verdict)
    return ("", verdict) if answer is None else (answer.group(), verdict[answer.end() :])


_ANSWER = re.compile(
    r"(?:[^:;.]|\.(?=\d)){1,80}?(?: helps| does not help(?:, it harms)?| is no worse|: cannot tell[^:;,]{1,40}|: no result)(?=[:;,])"
)


def _text_of(template: str) -> str:
    return (resources.files("gradreg.study") / template).read_text(encoding="utf-8")
