"""What every run of a recipe imports, for the process from which workers are forked. It raises nothing: a worker says what is missing."""

from __future__ import annotations

import contextlib

with contextlib.suppress(Exception):
    import gradreg.train.run_to_folder as _run_to_folder  # noqa: F401
