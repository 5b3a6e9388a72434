"""What runs record of sharpness: the names, and the words that must stand beside the numbers. Needs no framework."""

from __future__ import annotations

MEASURES = {
    "largest_eigenvalue": "largest eigenvalue",
    "smallest_eigenvalue": "smallest eigenvalue",
    "trace": "trace",
    "sam_sharpness": "SAM rise",
    "m_sharpness": "each batch's rise",
    "critical_sharpness": "critical",
}
"""Name of a measure -> its heading in tables."""

DEFAULT = ("largest_eigenvalue", "trace", "sam_sharpness", "m_sharpness", "critical_sharpness")
"""What is measured where nothing is said."""

PREFIX = "sharpness_"
"""What its keys begin with in records and results: ``sharpness_trace``, ``sharpness_trace_error``."""

CAUTION = (
    "Flatter is not better as such: regularized minima are often sharper by these numbers and still generalize better (arXiv 2510.12451, "
    "2306.04226). Compare only runs of one architecture on the same samples."
)
