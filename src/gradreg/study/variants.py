"""Variants as they are given: penalties as objects, texts such as ``sam:rho=0.1@lr=0.05``, mappings, or names of a task's own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gradreg import checks
from gradreg.penalties import GradientPenalty
from gradreg.registry import CONSTRUCTORS
from gradreg.study.tasks import Task, Variant
from gradreg.train.strict_yaml import read_yaml

BASELINE = "none"
"""Plain training."""


def parse_penalty(text: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """A penalty (None for "none") and changed options from their text on a command line.

    >>> parse_penalty("sam:rho=0.1,every=5@lr=0.05")
    ({'name': 'sam', 'rho': 0.1, 'every': 5}, {'lr': 0.05})

    Raises:
        ValueError: text of another form.
    """
    penalty, _, changes = text.partition("@")
    name, _, arguments = penalty.partition(":")
    found, changed = _arguments(text, arguments), _arguments(text, changes)
    if name == BASELINE and found:
        raise ValueError(
            f"penalty {text!r} must be {BASELINE!r} alone, which has no arguments. Write {BASELINE}@OPTION=VALUE to change options."
        )
    return None if name == BASELINE else {"name": name, **found}, changed


def given_variants(penalties: Mapping[str, Any] | Sequence[str] | None, named: Mapping[str, Variant]) -> dict[str, Any]:
    """Name -> what describes the variant: a penalty, a text, a mapping, or the name of one of the task's own."""
    if penalties is None:
        return {name: name for name in named}
    if isinstance(penalties, str) or not isinstance(penalties, (Mapping, Sequence)):
        raise TypeError(
            f"penalties must map names to penalties, or list texts; got {checks.describe(penalties)}. "
            "Write {'sam': gradreg.sam(rho=0.05)}."
        )
    given = penalties.items() if isinstance(penalties, Mapping) else [(text, text) for text in penalties]
    return {str(name): value for name, value in given}


def is_baseline(value: Any, named: Mapping[str, Variant]) -> bool:
    """Whether ``value`` stands for plain training with nothing else changed; a variant of the task's own does not."""
    return value is None or (value == BASELINE and value not in named) or (isinstance(value, Mapping) and dict(value) == {"penalty": None})


def variant_of(task: Task, name: str, value: Any, named: Mapping[str, Variant]) -> Variant:
    """The variant that ``value`` describes: the name of one of the task's own, a penalty, a text, or a mapping.

    Raises:
        TypeError, ValueError: something else, an unknown penalty, or what the task refuses.
    """
    changes: dict[str, Any] = {}
    if isinstance(value, Mapping):
        changes = {key: change for key, change in value.items() if key != "penalty"}
        value = value.get("penalty")
    if isinstance(value, str):
        if value in named and not changes:
            return named[value]
        text = value
        value, more = parse_penalty(text)
        changes |= more
        if value is not None and value["name"] not in CONSTRUCTORS:
            raise ValueError(checks.unknown("variant or penalty", value["name"], [*dict.fromkeys([*named, BASELINE, *CONSTRUCTORS])]))
        try:
            return task.variant(value, changes)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{text}: {error}") from error
    if value is not None and not isinstance(value, (GradientPenalty, Mapping)):
        raise TypeError(
            f"penalty {name!r} must be a GradientPenalty, None, a text or a mapping; got {checks.describe(value)}. "
            "Use gradreg.sam(rho=0.05), say."
        )
    return task.variant(value, changes)


def _arguments(text: str, given: str) -> dict[str, Any]:
    """``rho=0.1,warmup={kind: zero, steps: 3}`` as a dictionary; values are YAML."""
    found: dict[str, Any] = {}
    for part in re.split(r",(?![^{\[]*[}\]])", given) if given else []:
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ValueError(
                f"penalty {text!r} must be written NAME:KEY=VALUE,KEY=VALUE@OPTION=VALUE; got {part!r} in it. Write sam:rho=0.1, say."
            )
        if key.strip() in found:
            raise ValueError(f"penalty {text!r} must give each key once; got {key.strip()!r} twice. Remove one.")
        found[key.strip()] = read_yaml(f"{key.strip()} of penalty {text!r}", value)
    return found
