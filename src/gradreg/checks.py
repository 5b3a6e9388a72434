"""Argument checks shared by every public constructor: each error names the argument, the rule, the value received and the remedy."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import cast


def describe(value: object) -> str:
    """The value as an error message shows it: its repr (shortened), and its type unless that is a plain number."""
    text = repr(value)
    if len(text) > 80:
        text = text[:77] + "..."
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return text
    return f"{text} ({type(value).__name__})"


def printable(text: str) -> str:
    r"""``text`` for a terminal: what would move its cursor or change its colors, and what no encoding holds, is written as in Python.

    >>> printable("runs/\x1b[31mred"), printable("naïve ± 1")
    ('runs/\\x1b[31mred', 'naïve ± 1')
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def real(name: str, value: object, *, rule: str = "be a number", remedy: str = "") -> float:
    """``value`` as a finite float; ``TypeError`` if it is not a real number, ``ValueError`` if it is NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        hint = remedy
        if isinstance(value, str):
            hint = f"Remove the quotes; in YAML write exponents with a dot and a sign, as in 1.0e-3. {remedy}"
        raise TypeError(f"{name} must {rule}; got {describe(value)}. {hint}".rstrip())
    try:
        number = float(value)
    except OverflowError:  # of a whole number: floats end at 1.8e308
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must {rule} and finite; got {number}. {remedy}".rstrip())
    return number


def positive(name: str, value: object, *, remedy: str = "") -> float:
    """``value`` as a finite float > 0."""
    number = real(name, value, rule="be a number > 0", remedy=remedy)
    if number <= 0:
        raise ValueError(f"{name} must be finite and > 0; got {describe(value)}. {remedy}".rstrip())
    return number


def non_negative(name: str, value: object, *, remedy: str = "") -> float:
    """``value`` as a finite float ≥ 0."""
    number = real(name, value, rule="be a number >= 0", remedy=remedy)
    if number < 0:
        raise ValueError(f"{name} must be finite and >= 0; got {describe(value)}. {remedy}".rstrip())
    return number


def whole(name: str, value: object, *, minimum: int, remedy: str = "") -> int:
    """``value`` as an int ≥ ``minimum``; floats raise ``TypeError`` and are not rounded."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number >= {minimum}; got {describe(value)}. {remedy}".rstrip())
    number = int(value)
    if number < minimum:
        raise ValueError(f"{name} must be >= {minimum}; got {number}. {remedy}".rstrip())
    return number


def whole_numbers(name: str, value: object, *, minimum: int) -> list[int]:
    """``value`` as a list of ints, each ≥ ``minimum``."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list of whole numbers >= {minimum}; got {describe(value)}. Write it in brackets.")
    return [whole(name, number, minimum=minimum) for number in cast("Sequence[object]", value)]


def fraction(name: str, value: object, *, remedy: str = "") -> float:
    """``value`` as a float in [0, 1)."""
    number = real(name, value, rule="be a number in [0, 1)", remedy=remedy)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{name} must be in [0, 1); got {describe(value)}. {remedy}".rstrip())
    return number


def share(name: str, value: object, *, remedy: str = "") -> float:
    """``value`` as a float in [0, 1]."""
    number = real(name, value, rule="be a number in [0, 1]", remedy=remedy)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} must be in [0, 1]; got {describe(value)}. {remedy}".rstrip())
    return number


def probability(name: str, value: object, *, remedy: str = "") -> float:
    """``value`` as a float in (0, 1]."""
    number = real(name, value, rule="be a number in (0, 1]", remedy=remedy)
    if not 0.0 < number <= 1.0:
        raise ValueError(f"{name} must be in (0, 1]; got {describe(value)}. {remedy}".rstrip())
    return number


def flag(name: str, value: object) -> bool:
    """``value`` if it is True or False, else ``TypeError``."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {describe(value)}.")
    return value


def seed(value: object, *, name: str = "seed") -> int:
    """``value`` as an int of 32 bits, ≥ 0."""
    number = whole(name, value, minimum=0)
    if number >= 2**32:
        raise ValueError(f"{name} must be < 2**32; got {number}.")
    return number


def unknown(what: str, value: object, known: Iterable[str]) -> str:
    """The text that says ``value`` is not among ``known``, naming the nearest one."""
    import difflib  # imported here so that only the error path pays for it

    names = list(known)
    lowered = {name.lower(): name for name in names}
    nearest = difflib.get_close_matches(str(value).lower(), lowered, n=1, cutoff=0.4)
    hint = f"Did you mean {lowered[nearest[0]]!r}? " if nearest else ""
    if len(names) > 16:
        names = [*names[:16], f"and {len(names) - 16} more"]
    return f"unknown {what} {value!r}. {hint}Known: {', '.join(names)}."


def choice(name: str, value: object, known: tuple[str, ...]) -> str:
    """``value`` if it is one of the strings ``known``, else ``ValueError`` naming the nearest."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(unknown(name, value, known))
    return value
