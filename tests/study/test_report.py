"""The page in a real browser: the table's numbers, drawn charts, no error, no network, and no sideways scrolling on a phone."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest

from gradreg import study
from gradreg.study.comparison import run_study
from gradreg.study.plan import make_plan
from gradreg.study.table import shown_columns
from gradreg.train import recipe as recipes
from gradreg.train.task import RecipeTask

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
if os.environ.get("GRADREG_REQUIRE_CHROMIUM"):
    assert CHROMIUM, "GRADREG_REQUIRE_CHROMIUM is set, and no chromium is on the path"

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.mark.chromium
@pytest.mark.skipif(CHROMIUM is None, reason="needs headless Chromium")
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_the_page_shows_the_table_and_draws_the_charts(browser, comparison, width, height):
    page = browser.new_page(viewport={"width": width, "height": height})
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"file://{comparison.folder / 'report.html'}")
    page.wait_for_function("document.querySelectorAll('.chart svg.drawn').length >= 4")
    assert messages == []
    assert (comparison.folder / "report.html").stat().st_size < 1_500_000
    assert requests == [f"file://{comparison.folder / 'report.html'}"]

    shown = page.locator("#results tbody tr").all_inner_texts()
    table = json.loads((comparison.folder / "results.json").read_text())["table"]
    assert len(shown) == len(table) == 4
    for text, row in zip(shown, table, strict=True):
        assert text.startswith(row["label"])
        assert f"{row['mean']:.2f} ± {row['deviation']:.2f}" in text
        if row["difference"]:
            difference = row["difference"]
            assert f"{difference['difference']:+.2f} [{difference['low']:+.2f}, {difference['high']:+.2f}]" in text

    # Three variants in the first chart, the longer baseline beside them in the second, a trace a row in the third.
    lines = [page.locator(f"#chart-{i} path.line").count() for i in (0, 1)]
    assert lines[0] >= 3
    assert lines[1] >= 4
    assert page.locator("#chart-0 path.band").count() == 3
    assert page.locator("#chart-3 circle.point").count() == 12
    drawn = page.locator("#chart-0 path.line").first.bounding_box()
    assert drawn["width"] > 0.3 * min(width, 900)
    for label in page.locator("#chart-3 svg.drawn text").all():
        box = label.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width

    # A point tells its value when the pointer is there, and a name in the legend hides its lines.
    point = page.locator("#chart-3 circle.point").nth(4)
    point.scroll_into_view_if_needed()
    point.hover()
    tip = page.locator("#chart-3 .tip")
    assert tip.is_visible()
    seed, value, label = re.fullmatch(r"seed (\d+): ([\d.]+) %\n(.+)", tip.inner_text()).groups()
    (row,) = (row for row in table if row["label"] == label)
    found = json.loads((comparison.folder / "results.json").read_text())["runs"]
    (run,) = (run for run in found if (run["variant"], run["budget"], run["seed"]) == (row["variant"], row["budget"], int(seed)))
    assert float(value) == pytest.approx(100 * run["test_accuracy"], rel=1e-3)
    page.locator("#chart-0 .legend button").first.click()
    assert page.locator("#chart-0 path.band").count() == 2
    assert page.locator("#chart-0 path.line").count() < lines[0]
    page.locator("#chart-0 .legend button").first.click()
    assert page.locator("#chart-0 path.line").count() == lines[0]
    assert messages == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


MINIMIZED = """
import torch
from gradreg import study

ERRORS = {"None": 100.25, "SAM": 9.5, "C-GR": 20.75, "GNP": float("nan")}

@study.task(metric="rmse", mode="min")
def train(run: study.Run) -> None:
    model = torch.nn.Linear(1, 1)
    regularizer = run.regularizer(model)
    error = ERRORS[str(run.penalty).partition("(")[0]]
    for epoch in run.epochs(2):
        regularizer.backward(lambda: model(torch.ones(1, 1)).sum())
        run.log(test_rmse=error * (1 + run.seed / 100 - 0.01 * epoch))
"""


@pytest.fixture(scope="module")
def minimized(tmp_path_factory):
    """A study of an error whose order as numbers is not that as text, with a variant that diverges and so has no mean."""
    folder = tmp_path_factory.mktemp("minimized")
    (folder / "mine.py").write_text(MINIMIZED)
    penalties = {"9": "sam:rho=0.1", "none": None, "gnp": "gnp:r=0.1,alpha=0.5", "10": "cgr:gamma=0.1,epsilon=0.1"}
    return study.compare(str(folder / "mine.py"), penalties=penalties, seeds=3, rivals=["epochs"], workers=0, out=folder / "out")


@pytest.mark.chromium
@pytest.mark.skipif(CHROMIUM is None, reason="needs headless Chromium")
def test_a_click_on_a_heading_sorts_by_numbers_with_empty_cells_last_and_a_second_click_reverses(browser, minimized):
    page = browser.new_page()
    page.goto(f"file://{minimized.folder / 'report.html'}")
    headings = page.locator("#results th")

    def clicked(title):
        headings.filter(has_text=title).locator("button").click()
        labels = page.locator("#results tbody tr td:first-child").all_inner_texts()
        return [label.splitlines()[0] for label in labels], [heading.get_attribute("aria-sort") for heading in headings.all()]

    titles = headings.all_inner_texts()
    assert titles[:3] == ["variant", "test rmse", "over plain, equal epochs"]
    unsorted = ["none"] * (len(titles) - 2)
    # As text, 100.25 comes before 9.5.
    assert clicked("test rmse") == (["9", "10", "none", "gnp"], ["none", "ascending", *unsorted])
    assert clicked("test rmse") == (["none", "10", "9", "gnp"], ["none", "descending", *unsorted])
    # Negative numbers; the baseline has no difference to itself, and keeps its place beside the diverged variant.
    assert clicked("over plain, equal epochs") == (["9", "10", "none", "gnp"], ["none", "none", "ascending", *unsorted[1:]])
    assert clicked("over plain, equal epochs") == (["10", "9", "none", "gnp"], ["none", "none", "descending", *unsorted[1:]])
    # Names are text, though two of them could be numbers.
    assert clicked("variant") == (["10", "9", "gnp", "none"], ["ascending", "none", *unsorted])
    assert clicked("variant") == (["none", "gnp", "9", "10"], ["descending", "none", *unsorted])
    page.close()


@pytest.mark.chromium
@pytest.mark.skipif(CHROMIUM is None, reason="needs headless Chromium")
def test_the_page_of_a_minimized_metric_names_its_seeds_and_draws_the_metric_against_seconds(browser, minimized):
    page = browser.new_page()
    page.goto(f"file://{minimized.folder / 'report.html'}")
    assert "smaller is better" in page.locator("#results ~ p, .scroll + p").first.inner_text()
    methods = page.locator("details", has_text="For the methods section of a paper").locator("p")
    assert "on mine over 3 seeds, paired by seed (the same initialization" in methods.text_content()
    assert "until" not in methods.text_content()
    chart = page.locator("h2:text-is('What the time buys') ~ .chart").first
    chart.locator("svg.drawn").wait_for()
    texts = chart.locator("svg.drawn text").all_text_contents()
    assert "seconds" in texts
    assert "test rmse" in texts
    assert chart.locator("path.line").count() == 3  # not of the variant that diverged
    page.close()


def test_text_of_a_recipe_cannot_break_the_page(comparison, tmp_path):
    from dataclasses import replace

    recipe = replace(recipes.load("digits-noisy-labels"), description="<script>alert(1)</script> & </p>")
    plan = make_plan(RecipeTask(recipe, {**recipe.settings(), "epochs": 8}), ["gnp", "fgr"], seeds=3)
    (tmp_path / "runs").symlink_to(comparison.folder / "runs")
    found = run_study(plan, tmp_path, command="gradreg compare </pre>")
    page = (tmp_path / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;/p&gt;" in page
    assert "compare &lt;/pre&gt;" in page
    assert all(column.text(row) in page for row in found.rows for column in shown_columns(found.rows))
    assert "corrected for the number of variants by Holm&#39;s method" in page


@pytest.mark.parametrize(
    ("answer", "rest"),
    [
        ("sam, rho=0.1 helps", ": accuracy +1.20 points [+0.5, +1.9] against none over 5 seeds."),
        ("sam does not help, it harms", ": accuracy -1.20 [-2, -0.4] against none over 5 seeds."),
        ("gnp: cannot tell with 5 seeds", ": accuracy +0.2 [-0.1, +0.5] against none."),
        ("gnp: no result", ", of 5 runs it diverged in every one."),
        ("fgr does not help", ": it diverged or failed at 1 of 5 seeds."),
        ("", "The best trial was 3. It was confirmed."),
    ],
)
def test_the_answer_of_a_verdict_is_what_comes_before_its_numbers(answer, rest):
    from gradreg.study.report import answer_first

    assert answer_first(answer + rest) == (answer, rest)


@pytest.mark.chromium
@pytest.mark.skipif(CHROMIUM is None, reason="needs headless Chromium")
def test_a_chart_draws_logarithms_steps_and_arrays_and_says_what_it_cannot(browser, tmp_path):
    import numpy as np
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from gradreg.study.charts import empty_figure
    from gradreg.study.report import drawn_figures, render

    def messages_of(figure):
        page, messages = browser.new_page(viewport={"width": 800, "height": 900}), []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        drawn = drawn_figures({"a chart": (figure, "")})
        (tmp_path / "page.html").write_text(render("page.html", title="", description="", verdicts=[], warnings=[], figures=drawn))
        page.goto(f"file://{tmp_path / 'page.html'}")
        page.wait_for_selector("svg.drawn")
        return page, messages

    figure = empty_figure("rho", "loss")
    figure.update_xaxes(type="log")
    marker = {"color": "#0072B2", "size": 9, "symbol": "circle-open"}
    figure.add_trace(go.Scatter(x=np.array([1e-3, 1e-2, 1e-1]), y=np.array([3.0, 1.0, 2.0]), mode="markers", marker=marker, name="trials"))
    figure.add_trace(go.Scatter(x=[1e-3, 1e-1], y=[3.0, 1.0], mode="lines", line={"shape": "hv", "color": "#D55E00"}, name="best"))
    page, messages = messages_of(figure)
    assert messages == []
    places = [float(one.get_attribute("cx")) for one in page.locator("circle.point").all()]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1])  # a decade is as long as another
    assert [text for text in page.locator("svg.drawn text").all_text_contents() if text in ("0.001", "0.01", "0.1")] == [
        "0.001",
        "0.01",
        "0.1",
    ]
    assert re.fullmatch(r"M[\d.]+ [\d.]+H[\d.]+V[\d.]+", page.locator("path.line").get_attribute("d"))
    page.close()

    panels = make_subplots(rows=1, cols=3, shared_yaxes=True)
    panels.update_layout(empty_figure("", "").layout)
    for column in (1, 2, 3):
        line = {"color": "#0072B2", "width": 2}
        panels.add_trace(go.Scatter(x=[1.0, 2.0], y=[0.0, column], mode="lines+markers", line=line, name="run"), row=1, col=column)
        panels.update_xaxes(title=f"measure {column}", row=1, col=column)
    page, messages = messages_of(panels)
    assert messages == []
    heights = [float(page.locator("svg.drawn").nth(i).locator("circle.point").nth(1).get_attribute("cy")) for i in range(3)]
    assert heights[0] > heights[1] > heights[2]  # on one range
    assert page.locator("circle.point").first.get_attribute("fill") == "#0072B2"
    tops = [page.locator("svg.drawn").nth(i).bounding_box()["y"] for i in range(3)]
    assert len(set(tops)) == 1
    page.set_viewport_size({"width": 390, "height": 900})
    page.wait_for_function("new Set([...document.querySelectorAll('svg.drawn')].map(one => one.getBoundingClientRect().top)).size === 3")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()

    figure.add_trace(go.Bar(x=[1.0], y=[1.0]))
    page, messages = messages_of(figure)
    assert messages == ["chart chart-0: bar with  is not drawn"]
    page.close()
