"""Atomic file writes: to a temporary name in the same folder, flushed to disk, then renamed; and files that belong to another."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

OWNER = "configuration"
"""The key of the digest."""


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` atomically: a reader, or a crash at any moment, sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # of a full disk, whose message names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def flush(path: Path) -> None:
    """Flush the file or folder at ``path`` to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write ``value`` as indented JSON; NaN raises ``ValueError``, because JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, *, holds: str, remedy: str) -> dict[str, Any]:
    """The mapping in a JSON file.

    Args:
        path: the file.
        holds: what it must hold, for errors.
        remedy: what to do where it does not.

    Raises:
        ValueError: naming the file, and what is wrong with it.
    """
    try:
        if not path.is_file():  # nor is it waited for what a FIFO will say
            raise ValueError("it is no plain file" if os.path.lexists(path) else "it is missing")
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} must hold {holds}; it is damaged: {error}. {remedy}") from error


def tied(values: Mapping[str, Any], owner: Path) -> dict[str, Any]:
    """``values`` with the digest of the file that they belong to, for ``check_tie``."""
    return {**values, OWNER: _digest(owner)}


def check_tie(path: Path, values: Mapping[str, Any], owner: Path, *, remedy: str) -> None:
    """Check that the content of ``path`` belongs to the file ``owner`` beside it: neither was exchanged for that of another folder.

    Raises:
        ValueError: it belongs to another file; what is older than ``tied`` does not say, and is taken as it is.
    """
    if OWNER in values and values[OWNER] != _digest(owner):
        raise ValueError(f"{str(path)!r} must belong to the {owner.name} beside it; it was written beside another. {remedy}")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parse_json(text: str | bytes) -> dict[str, Any]:
    """The mapping that ``text`` holds as JSON.

    Raises:
        ValueError: another value, or no JSON; also where it is nested too deep for the parser.
    """
    try:
        found: Any = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds {type(found).__name__} and no mapping")
    return cast("dict[str, Any]", found)


def append_json_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append ``values`` to a file of JSON lines. NaN and infinity, which JSON does not have, are written as strings."""
    plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    append_text(path, json.dumps(plain, allow_nan=False) + "\n")


def append_text(path: Path, text: str) -> None:
    """Append to a file of UTF-8 text; errors name it."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def make_directory(path: Path, *, purpose: str) -> Path:
    """Create ``path`` with its parents and check that it can be written to.

    Raises:
        OSError: naming ``purpose`` (an argument, say ``--out``), the path and the reason.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise OSError(f"{purpose} must name a folder that can be written to; got {str(path)!r}: {error.strerror}.") from error
    return path
