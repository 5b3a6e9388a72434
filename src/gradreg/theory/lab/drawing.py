"""The style of the figures: one font size, colors that are distinguishable with any color vision, and axes with units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"none": "#777777", "B-GR": "#D55E00", "DB": "#222222", "F-GR": "#0072B2"}
"""One color for each difference, the same in every figure (Okabe and Ito's palette)."""

SEQUENCE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")

_STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.labelsize": 11,
    "legend.fontsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def panels(columns: int, *, rows: int = 1, width: float = 5.0, height: float = 3.9) -> tuple[Figure, list[Axes]]:
    """A figure of rows × columns panels, ``width`` × ``height`` inches each, left to right and top to bottom."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """Title and axis labels."""
    axes.set_title(title, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def legend_below(figure: Figure, axes: Axes, columns: int | None = None) -> None:
    """The panel's legend under all panels, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns or len(labels), frameon=False, fontsize=10)


def legend(axes: Axes, **where: object) -> None:
    """A legend inside the panel, on a white background."""
    axes.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=9.5, **where)  # type: ignore[arg-type]


def shades(count: int) -> Sequence[str]:
    """``count`` colors from light to dark blue, for an ordered quantity."""
    scale = matplotlib.colormaps["viridis"]
    return [to_hex(scale(0.85 - 0.8 * i / max(1, count - 1))) for i in range(count)]
