"""How the gradients of a step are mixed.

With P the sum of the weighted gradients as the table of ``gradreg.penalties`` gives it (for c = 1, P = ∇L(θ + radius·d)) and g the plain
gradient:

    ============  ==========================================================  ====================
    mixing        result G                                                    evaluations
    ============  ==========================================================  ====================
    "plain"       P                                                           the table's
    "unit"        P with (1 − c)·g/‖g‖ in place of (1 − c)·g                  the table's
    SurrogateGap  P − a·(g − (⟨g, P⟩ / ⟨P, P⟩)·P)                             the table's
    Decoupled     g; P − g is applied to the parameters outside of it         the table's
    Reuse         P at every k-th step; g + a·(‖g‖ / ‖h‖)·h between them      1 between them
    ============  ==========================================================  ====================

with h the part of the last P that is orthogonal to that step's g. Inner products and norms are taken over all parameters that are trained,
moved or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from gradreg import checks
from gradreg.plain import from_plain, to_plain


class GradientMixing:
    """A mixing that needs the plain gradient and P side by side; immutable, compared by value."""

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary (for YAML and JSON) from which ``mixing_from_dict`` builds an equal mixing."""
        return to_plain(self, "mixing", _NAMED)


@dataclass(frozen=True, kw_only=True)
class SurrogateGap(GradientMixing):
    """``G = P − a·(part of g orthogonal to P)``: descend on P, and on the gap between the moved loss and the plain one.

    Args:
        a: the weight α ≥ 0 of the gap; 0 is "plain".

    Source: Zhuang et al. 2022, arXiv 2203.08065, algorithm 1.
    """

    a: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "a", checks.non_negative("a", self.a))

    def __str__(self) -> str:
        return f"surrogate gap(a {self.a:g})"


@dataclass(frozen=True, kw_only=True)
class Decoupled(GradientMixing):
    """``G = g`` goes through the optimizer; ``P − g`` is subtracted from the parameters beside it, times the learning rate alone.

    The optimizer's momentum and preconditioner then never see the penalty. The second part is applied after ``optimizer.step()`` by the
    engine (``GradientRegularizer.decoupled_step`` in PyTorch).

    Source: Yue et al. 2023, arXiv 2305.15817, algorithm 1.
    """

    def __str__(self) -> str:
        return "decoupled"


@dataclass(frozen=True, kw_only=True)
class Reuse(GradientMixing):
    """The penalty's own part of the gradient, found at every k-th step and reused in between.

    Before anything has been found (a run that was resumed without its state, the end of a warm-up) the gradient is the plain one.

    Args:
        k: optimizer steps, ≥ 1; found at steps that are multiples of it. 1 is "plain".
        a: the weight α ≥ 0 of what is reused, relative to the length of the plain gradient.

    Source: Liu et al. 2022, arXiv 2203.02714, algorithm 1.
    """

    k: int
    a: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", checks.whole("k", self.k, minimum=1))
        object.__setattr__(self, "a", checks.non_negative("a", self.a))

    def __str__(self) -> str:
        return f"reuse(every {self.k} steps, a {self.a:g})"


Mixing: TypeAlias = Literal["plain", "unit"] | GradientMixing
"""What a penalty's ``mixing`` may be."""

_NAMED: dict[str, type[GradientMixing]] = {"surrogate-gap": SurrogateGap, "decoupled": Decoupled, "reuse": Reuse}


def mixing_from_dict(data: Mapping[str, Any]) -> GradientMixing:
    """The mixing that ``GradientMixing.to_dict`` described: ``{"mixing": "reuse", "k": 5, "a": 0.7}``.

    Raises:
        ValueError, TypeError: as ``gradreg.plain.from_plain``.
    """
    return from_plain(data, "mixing", _NAMED)
