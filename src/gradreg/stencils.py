"""The finite differences as numbers: where the gradient is evaluated and with what weight each evaluation enters the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradreg.penalties import Difference


@dataclass(frozen=True)
class Stencil:
    """``G = at_theta·g + Σ weight·∇L(θ + place·radius·d)`` over the pairs (place, weight) of ``moved``."""

    at_theta: Any
    moved: tuple[tuple[int, Any], ...]


def stencil(difference: Difference, coefficient: Any) -> Stencil:
    """The evaluations of a finite difference with c = ``coefficient``, a number or a traced one; not for "exact", which has none.

    >>> stencil("forward", 0.75)
    Stencil(at_theta=0.25, moved=((1, 0.75),))
    """
    c = coefficient
    if difference == "forward":
        return Stencil(at_theta=1.0 - c, moved=((+1, c),))
    if difference == "backward":
        return Stencil(at_theta=1.0 + c, moved=((-1, -c),))
    if difference == "central":
        return Stencil(at_theta=1.0, moved=((+1, c / 2), (-1, -c / 2)))
    raise ValueError(f"difference must be 'forward', 'backward' or 'central'; got {difference!r}, which evaluates at no other place.")
