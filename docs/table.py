"""A table in Markdown, as the pages hold it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, with | escaped and code between single backquotes."""
    lines = ["|".join(["", *["---"] * len(header), ""])]
    for cells in (header, *rows):
        line = " | ".join(cell.replace("|", "\\|").replace("``", "`") for cell in cells)
        lines.append(f"| {line} |".replace("|  |", "| |"))
    rule, head, *body = lines
    return "\n".join([head, rule, *body, ""])
