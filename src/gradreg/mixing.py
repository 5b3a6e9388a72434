"""How the gradients of a step become its result.

With P the sum of the weighted gradients as the table of ``gradreg.penalties`` gives it (for c = 1, P = ∇L(θ + radius·d)) and g the plain
gradient:

    ============  ====================================================
    mixing        result G
    ============  ====================================================
    Plain         P
    Unit          P with (1 − c)·g/‖g‖ in place of (1 − c)·g
    SurrogateGap  P − a·(g − (⟨g, P⟩ / ⟨P, P⟩)·P)
    ClipEach      P with g and ∇L(θ ± radius·d) each clipped at M
    ============  ====================================================

Besides the mixing, a penalty may say *when* its part of the gradient is computed (``Reuse``) and *where* the result goes (``decoupled``).
Inner products and norms are taken over all trained parameters, perturbed or not.

A mixing is a frozen dataclass that says what it needs; each engine has one function per mixing, found by type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from gradreg import checks
from gradreg.serialization import Part


class GradientMixing(Part, tag="mixing"):
    """One of the kinds in this module's table, or one of your own; immutable, compared by value."""

    plain_gradient: ClassVar[Literal["summed", "normalized", "apart"]] = "apart"
    """What it needs of the plain gradient: "summed" needs only the weighted sum; "normalized" rescales its part of the sum once its norm is
    known; "apart" needs the whole plain gradient separately from P, which costs the memory of one more gradient."""

    differences: ClassVar[tuple[str, ...]] = ("forward", "backward", "central")
    """The finite differences for which it is defined."""

    tends_to_plain: ClassVar[bool] = False
    """Whether the result tends to the plain gradient as the radius tends to 0, with c = strength / radius held: G − g is then the part of
    the penalty, and to first order proportional to the radius."""


@dataclass(frozen=True, kw_only=True)
class Plain(GradientMixing, name="plain"):
    """``G = P``, the weighted sum."""

    plain_gradient: ClassVar[Literal["summed", "normalized", "apart"]] = "summed"
    tends_to_plain: ClassVar[bool] = True

    def __str__(self) -> str:
        return "plain"


@dataclass(frozen=True, kw_only=True)
class Unit(GradientMixing, name="unit"):
    """``G = (1 − c)·g/‖g‖ + c·∇L(θ + radius·d)``, as the published GNP code mixes by default; power 1, forward difference, ``Gradient()``.

    Source: the code of Zhao et al. 2022, arXiv 2202.03599 (its flag ``norm_perturbations``); the paper and its README say ``(1 − c)·g``.
    """

    plain_gradient: ClassVar[Literal["summed", "normalized", "apart"]] = "normalized"

    def __str__(self) -> str:
        return "unit"


@dataclass(frozen=True, kw_only=True)
class SurrogateGap(GradientMixing, name="surrogate-gap"):
    """``G = P − a·(part of g orthogonal to P)``: descend along P, and on the gap between the perturbed and the plain loss.

    Args:
        a: the weight α ≥ 0 of the gap; 0 is ``Plain``.

    Source: Zhuang et al. 2022, arXiv 2203.08065, algorithm 1.
    """

    a: float

    tends_to_plain: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "a", checks.non_negative("a", self.a))

    def __str__(self) -> str:
        return f"surrogate gap(a {self.a:g})"


@dataclass(frozen=True, kw_only=True)
class ClipEach(GradientMixing, name="clip-each"):
    """``G = (1 − c)·clip(g) + c·clip(∇L(θ + radius·d))`` with ``clip(x) = min(1, M/‖x‖)·x``: no spike of either gradient enters the result.

    Their difference is multiplied by c = strength / radius, so clipping the result alone would keep the direction of a spike. For the
    forward and the backward difference, whose two gradients it can tell apart.

    Args:
        max_norm: M > 0, for the norm over all trained parameters.

    Source: the code of Ackermann et al. 2026, arXiv 2602.18037.
    Differs from their code: parameters that are not perturbed get the same combination, theirs the second gradient alone.
    """

    max_norm: float

    differences: ClassVar[tuple[str, ...]] = ("forward", "backward")

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_norm", checks.positive("max_norm", self.max_norm, remedy="Use mixing='plain' for no limit."))

    def __str__(self) -> str:
        return f"each clipped at {self.max_norm:g}"


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """The penalty's part of the gradient, computed at every k-th step and reused in between: ``g + a·(‖g‖ / ‖h‖)·h``, one pass.

    h is the part of the last P that was orthogonal to that step's g. Before the first h is computed (after the end of a warm-up, or in a
    run resumed without its state) the gradient is the plain one.

    Args:
        k: optimizer steps, ≥ 1; computed at steps that are multiples of it. 1 computes it at every step.
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
