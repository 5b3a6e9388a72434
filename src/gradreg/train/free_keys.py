"""The words of a command line for mappings whose keys models, penalties and timm define: ``--model.hidden [64]``, ``--penalty '{...}'``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradreg.train import plain_yaml

FREE = ("model", "penalty", "flooding", "optimizer.options", "schedule.options")
"""The mappings. jsonargparse would read the strings in them as YAML once more: a text "1e3" would become a number."""


@dataclass(frozen=True)
class Typed:
    """One option of a command line and its value.

    Args:
        mapping: which of ``FREE`` it changes.
        path: the keys inside that lead to the changed one; empty for the whole mapping.
        value: what the text of the option's value holds as YAML.
    """

    mapping: str
    path: tuple[str, ...]
    value: Any


def separate(words: Sequence[str]) -> tuple[list[str], list[Typed]]:
    """The words that have nothing to do with ``FREE``, and what the others say, in their order.

    Raises:
        ValueError: an option without a value, or whose value is no YAML.

    >>> separate(["--epochs", "3", "--model.hidden", "[64]"])
    (['--epochs', '3'], [Typed(mapping='model', path=('hidden',), value=[64])])
    """
    others: list[str] = []
    found: list[Typed] = []
    waiting = iter(words)
    for word in waiting:
        option, has_value, text = word.partition("=")
        mapping = next((key for key in FREE if f"{option}.".startswith(f"--{key}.")), None)
        if mapping is None:
            others.append(word)
            continue
        if not has_value:
            text = next(waiting, "--")
        if not has_value and text.startswith("--"):
            raise ValueError(f"{option} must be followed by its value; got {'nothing' if text == '--' else repr(text)}.")
        inside = option.removeprefix(f"--{mapping}")
        found.append(Typed(mapping, tuple(inside.split(".")[1:]), plain_yaml.read(option, text)))
    return others, found


def changed(before: Mapping[str, Any] | None, typed: Sequence[Typed]) -> Any:
    """The mapping ``before`` with what was typed laid over it, one after the other; under a new ``name`` nothing of it is left."""
    named = [one.value for one in typed if one.path == ("name",)]
    result: Any = before if not before or not named or named[-1] == before.get("name") else {}
    for one in typed:
        result = _with(result, one.path, one.value)
    return result


def _with(before: Any, path: tuple[str, ...], value: Any) -> Any:
    if not path:
        return value
    around = before if isinstance(before, Mapping) else {}
    return {**around, path[0]: _with(around.get(path[0]), path[1:], value)}
