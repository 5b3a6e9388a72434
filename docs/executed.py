"""Code blocks of a page that are executed, each with what it prints below it.

A block is executed if the line above it is ``<!-- run -->``. The blocks of a page share their names, from top to bottom, as in a session.
"""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

BLOCK = re.compile(r"^<!-- run -->\n```python\n(?P<code>.*?)^```\n", flags=re.MULTILINE | re.DOTALL)


def with_output(text: str, *, page: str) -> str:
    """The page with the output of every executed block below it.

    Raises:
        RuntimeError: a block raised; names the page and the block's first line.
    """
    names: dict[str, Any] = {"__name__": "page"}

    def run(match: re.Match[str]) -> str:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(match["code"], f"<{page}>", "exec"), names)
        except Exception as error:
            first = match["code"].splitlines()[0]
            raise RuntimeError(
                f"{page}.md: code that is executed must run; got {error!r} in the block that begins with {first!r}."
            ) from error
        block = f"```python\n{match['code']}```\n"
        return block + (f"\n```text\n{printed.getvalue().rstrip()}\n```\n" if printed.getvalue().strip() else "")

    return BLOCK.sub(run, text)
