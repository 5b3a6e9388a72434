"""Penalties that cannot be used with frameworks that call the optimizer themselves."""

from __future__ import annotations

from gradreg.penalties import GradientPenalty


def refuse_decoupled(penalty: GradientPenalty | None, framework: str) -> None:
    """Raise for a penalty that must do something after the optimizer's step.

    Raises:
        ValueError: ``penalty.decoupled``.
    """
    if penalty is not None and penalty.decoupled:
        raise ValueError(
            f"penalty must not be decoupled under {framework}, which steps the optimizer by itself and leaves no place for the part that "
            f"comes after; got {penalty}. Use gradreg.wsam(rho=..., gamma=...), the coupled form, or a loop of your own."
        )


def refuse_learned(penalty: GradientPenalty | None, framework: str) -> None:
    """Raise for a penalty whose radius is learned from held-out data, which nothing but a loop can give.

    Raises:
        ValueError: ``penalty.learned_radius``.
    """
    if penalty is not None and penalty.learned_radius is not None:
        raise ValueError(
            f"penalty must not learn its radius from held-out data under {framework}, which gives it none; got {penalty}. Use "
            "gradreg.AutoRadius(), or a loop of your own: regularizer.backward(closure, held_out=...)."
        )
