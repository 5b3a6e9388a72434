"""The ``penalty:`` block of a recipe: a ``GradientPenalty``, its warm-up perhaps in epochs, and the share of a batch it ascends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradreg import checks
from gradreg.penalties import GradientPenalty


@dataclass(frozen=True)
class RecipePenalty:
    """What a ``penalty:`` block describes.

    Args:
        penalty: the specification; None trains without one.
        ascent_fraction: share of each batch from which the ascent direction comes, > 0 and < 1; None takes the whole batch.
    """

    penalty: GradientPenalty | None
    ascent_fraction: float | None = None

    def evaluations_at(self, step: int) -> float:
        """Gradient evaluations that optimizer step ``step`` costs, in passes over a whole batch."""
        if self.penalty is None:
            return 1
        if self.ascent_fraction is None:
            return self.penalty.evaluations_at(step)
        return self.penalty.evaluations_at(step, ascent_share=self.ascent_fraction)

    def __str__(self) -> str:
        part = "" if self.ascent_fraction is None else f", ascent on {100 * self.ascent_fraction:g} % of each batch"
        return "no penalty" if self.penalty is None else f"{self.penalty}{part}"


def recipe_penalty(block: Mapping[str, Any] | None, *, steps_per_epoch: int) -> RecipePenalty:
    """The penalty of a recipe whose epochs have ``steps_per_epoch`` optimizer steps.

    Beside what ``GradientPenalty.from_dict`` knows, the block may hold ``ascent_fraction``, and ``warmup`` may give ``epochs`` in place of
    ``steps``.

    Raises:
        ValueError, TypeError: naming the key under ``penalty``, the rule, the value received and the remedy.
    """
    if block is None:
        return RecipePenalty(None)
    keys = dict(block)
    fraction = keys.pop("ascent_fraction", None)
    warmup = keys.get("warmup")
    if isinstance(warmup, Mapping) and "epochs" in warmup:
        if "steps" in warmup:
            raise ValueError(
                f"penalty.warmup must be counted in epochs or in steps; got both, {warmup['epochs']} epochs and {warmup['steps']} steps. "
                "Remove one."
            )
        epochs = checks.positive("penalty.warmup.epochs", warmup["epochs"], remedy="Leave warmup out for none.")
        rest = {k: v for k, v in warmup.items() if k != "epochs"}
        keys["warmup"] = {**rest, "steps": max(1, round(epochs * steps_per_epoch))}
    penalty = GradientPenalty.from_dict(keys)
    if fraction is None:
        return RecipePenalty(penalty)
    if checks.positive("penalty.ascent_fraction", fraction, remedy="Leave it out to ascend on the whole batch.") >= 1:
        raise ValueError(f"penalty.ascent_fraction must be < 1; got {fraction}. Leave it out to ascend on the whole batch.")
    try:
        penalty.check_ascent(f"penalty.ascent_fraction {fraction}")
    except ValueError as error:
        raise ValueError(f"penalty.ascent_fraction must be left out here: {error}") from error
    return RecipePenalty(penalty, float(fraction))
