"""The page in a real browser: the table's numbers, drawn charts, no error, no network, and no sideways scrolling on a phone."""

from __future__ import annotations

import os
import shutil

import pytest

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
    page.wait_for_function("document.querySelectorAll('.chart .main-svg').length >= 4")
    assert messages == []
    assert requests == [f"file://{comparison.folder / 'report.html'}"]

    shown = page.locator("#results tbody tr").all_inner_texts()
    import json

    table = json.loads((comparison.folder / "results.json").read_text())["table"]
    assert len(shown) == len(table) == 4
    for text, row in zip(shown, table, strict=True):
        assert text.startswith(row["label"])
        assert f"{row['mean']:.2f} ± {row['deviation']:.2f}" in text
        if row["difference"]:
            difference = row["difference"]
            assert f"{difference['difference']:+.2f} [{difference['low']:+.2f}, {difference['high']:+.2f}]" in text

    # Three variants in the first chart, the longer baseline beside them in the second, a trace a row in the third.
    lines = [page.locator(f"#chart-{i} path.js-line").count() for i in (0, 1)]
    assert lines[0] >= 3
    assert lines[1] >= 4
    assert page.locator("#chart-3 path.point").count() == 12
    drawn = page.locator("#chart-0 path.js-line").first.bounding_box()
    assert drawn["width"] > 0.3 * min(width, 900)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
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
