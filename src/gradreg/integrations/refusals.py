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
