"""The code of docs/jax.md runs as it is written there, from top to bottom."""

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "jax.md"
pytestmark = pytest.mark.slow  # compiles every example


def test_every_block_of_the_page_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == PAGE.read_text().count("```python") > 10
    page: dict[str, Any] = {"__name__": "jax_page"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), page)
