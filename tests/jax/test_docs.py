"""The code of docs/jax.md runs as it is written there, from top to bottom."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "jax.md"
pytestmark = pytest.mark.slow  # compiles every example


def test_every_block_of_the_page_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == PAGE.read_text().count("```python") > 10
    page: dict[str, Any] = {"__name__": "jax_page"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), page)


def test_the_costs_on_the_page_are_the_stored_ones() -> None:
    stored = json.loads((ROOT / "benchmarks/results/jax_step_cost.json").read_text())["models"].values()
    table = PAGE.read_text().split("| step | MLP | CNN | ViT |")[1]
    rows = dict(re.findall(r"^\| ([^|]+) \| (\d[^|]+ \| [^|]+ \| [^|]+) \|$", table, flags=re.MULTILINE))
    by_processor = [model["ratio in processor time"] for model in stored]
    assert set(rows) == set(by_processor[0])
    for name, row in rows.items():
        assert [float(cell) for cell in row.split("|")] == pytest.approx([model[name] for model in by_processor], abs=0.0051)
    exact = [f"{model['gradreg exact'] / model['one plain gradient']:.1f}" for model in by_processor]
    assert f"{exact[0]}, {exact[1]} and {exact[2]} plain gradients" in table
    times = by_processor[1]['the same, over, branch="cond"'] / by_processor[1]["two plain gradients"]
    assert f"took {times:.0f} times as long inside `cond`" in PAGE.read_text()
