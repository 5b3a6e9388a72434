"""Parts that no engine knows: a user's own, and subclasses of known ones, which would behave as these."""

from __future__ import annotations

from dataclasses import dataclass

from gradreg import Direction, Friendly, Gradient, GradientMixing, GradientPenalty, Mask, Random, Sparse, SurrogateGap


@dataclass(frozen=True, kw_only=True)
class OwnDirection(Direction):
    """One of a user's own."""


@dataclass(frozen=True, kw_only=True)
class OwnGradient(Gradient):
    """A subclass of the plainest direction."""


@dataclass(frozen=True, kw_only=True)
class OwnFriendly(Friendly):
    """A subclass of a direction with a state."""


@dataclass(frozen=True, kw_only=True)
class OwnRandom(Random):
    """A subclass of a direction without a first pass."""


@dataclass(frozen=True, kw_only=True)
class OwnMask(Mask):
    """One of a user's own."""


@dataclass(frozen=True, kw_only=True)
class OwnSparse(Sparse):
    """A subclass of a known mask."""


@dataclass(frozen=True, kw_only=True)
class OwnMixing(GradientMixing):
    """One of a user's own."""


@dataclass(frozen=True, kw_only=True)
class OwnGap(SurrogateGap):
    """A subclass of a known mixing."""


UNKNOWN: dict[str, tuple[str, GradientPenalty]] = {
    name: (kind, GradientPenalty(power=1, strength=0.3, radius=0.3, **{kind: part}))  # type: ignore[arg-type]
    for name, kind, part in (
        ("a direction", "direction", OwnDirection()),
        ("a kind of Gradient", "direction", OwnGradient()),
        ("a kind of Friendly", "direction", OwnFriendly()),
        ("a kind of Random", "direction", OwnRandom()),
        ("a mask", "mask", OwnMask()),
        ("a kind of Sparse", "mask", OwnSparse(sparsity=0.5)),
        ("a mixing", "mixing", OwnMixing()),
        ("a kind of SurrogateGap", "mixing", OwnGap(a=0.5)),
    )
}
"""Penalties with one part that nobody has registered, and which part that is."""
