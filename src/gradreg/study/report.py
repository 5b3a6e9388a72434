"""``report.html``: one page that needs no network: verdicts, table, charts, configuration and environment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
import plotly.offline
import yaml
from markupsafe import Markup

from gradreg import __version__, files
from gradreg.study import charts
from gradreg.study.plan import Plan
from gradreg.study.results import Run
from gradreg.study.table import COLUMNS, Row
from gradreg.train.run_folder import RunFolder


def write_report(
    plan: Plan, rows: Sequence[Row], runs: Sequence[Run], environment: Mapping[str, Any], *, folder: Path, command: str
) -> Path:
    """Write the page into ``folder`` and return its path.

    Args:
        plan: what was compared.
        rows: the table.
        runs: the runs; their histories are read from their folders, under ``folder``.
        environment: where they ran.
        folder: the comparison's folder.
        command: the command line that made it.
    """
    runs_of = {row.label: [run for run in runs if _belongs(run, row)] for row in rows}
    drawn = [(label, run) for label, group in runs_of.items() for run in group if not run.diverged]
    history = {(label, run.seed): RunFolder(folder / run.folder).history() for label, run in drawn}
    figures = {
        "Learning curves": (charts.learning_curves(rows, history), "Test accuracy after each epoch: mean and one standard deviation."),
        "What the gradients buy": (
            charts.accuracy_by_cost(rows, history),
            "The same against gradient evaluations. Dashed: plain training, lengthened to as many evaluations.",
        ),
        "Every seed": (charts.dots(rows, runs_of), "One dot a run, the bar at their mean."),
    }
    page = _template().render(
        title=f"{plan.recipe}: does a gradient penalty help?",
        description=plan.description,
        verdicts=[row.verdict() for row in rows if row.variant != plan.baseline],
        columns=COLUMNS,
        rows=rows,
        seeds=plan.seeds,
        figures=[{"title": title, "note": note, "id": f"chart-{i}", **_parts(f)} for i, (title, (f, note)) in enumerate(figures.items())],
        configuration=yaml.safe_dump(plan.settings, sort_keys=False),
        environment=yaml.safe_dump(dict(environment), sort_keys=False, allow_unicode=True),
        command=command,
        version=__version__,
        plotly=Markup(plotly.offline.get_plotlyjs()),
    )
    path = folder / "report.html"
    files.write_text(path, page)
    return path


def _belongs(run: Run, row: Row) -> bool:
    same = run.variant == row.variant and run.budget == row.budget
    return same and (run.budget == "epochs" or run.planned_evaluations == row.gradient_evaluations)


def _parts(figure: go.Figure) -> dict[str, Markup]:
    plain = json.loads(figure.to_json() or "{}")
    # "</" inside a script element would end it.
    return {name: Markup(json.dumps(plain[name]).replace("</", "<\\/")) for name in ("data", "layout")}


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((resources.files("gradreg.study") / "report.html").read_text(encoding="utf-8"))
