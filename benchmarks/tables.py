"""Markdown tables, as the benchmarks print and store them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a line for each of ``rows``, without a line's end behind the last."""
    first, *others = (f"| {' | '.join(cells)} |" for cells in (header, *rows))
    return "\n".join([first, "|---" * len(header) + "|", *others])


def with_quartiles(found: Mapping[str, Any], digits: int) -> str:
    """The ``ratio`` of a result, with its ``ratio_quartiles``."""
    low, high = found["ratio_quartiles"]
    return f"{found['ratio']:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"
