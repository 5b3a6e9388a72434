"""What an import says where a package is missing: the extra that has it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def needing(module: str, extra: str) -> Generator[None]:
    """Around the imports of ``module``: a missing package raises an error that names the extra to install.

    Raises:
        ModuleNotFoundError: a package of the extra is not installed; ``name`` is the package's.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "gradreg":
            raise
        raise ModuleNotFoundError(
            f"{module} needs the package {error.name!r}, which is not installed. Run: pip install 'gradreg[{extra}]'",
            name=error.name,
            path=error.path,
        ) from error
