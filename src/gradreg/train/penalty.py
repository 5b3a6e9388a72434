"""The ``penalty:`` block of a recipe: a ``GradientPenalty``, whose warm-up may be in epochs, and the share of a batch it ascends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

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


@dataclass(frozen=True)
class PenaltyConfig:
    """A ``penalty:`` block, parsed.

    In addition to the keys of ``GradientPenalty.from_dict`` it may have ``ascent_fraction``, and ``warmup`` may have ``epochs`` instead of
    ``steps``. Only a block with epochs is built again once the data, and with them the steps per epoch, are known.

    Args:
        keys: the block without ``ascent_fraction`` and ``warmup.epochs``.
        warmup_epochs: length of the warm-up, > 0; None where it is counted in steps, or there is none.
        built: steps in an epoch -> the penalty that the block describes; 0 stands for any number, if no epochs are counted.
    """

    keys: Mapping[str, Any]
    warmup_epochs: float | None
    built: dict[int, RecipePenalty] = field(compare=False)

    @classmethod
    def parse(cls, block: Mapping[str, Any] | None) -> PenaltyConfig:
        """The block of a recipe, checked; None trains without a penalty.

        Raises:
            ValueError, TypeError: naming the key under ``penalty``, the rule, the value received and the remedy.
        """
        if block is None:
            return cls({}, None, {0: RecipePenalty(None)})
        keys = dict(block)
        fraction, warmup, epochs = keys.pop("ascent_fraction", None), keys.get("warmup"), None
        if isinstance(warmup, Mapping) and "epochs" in warmup:
            if "steps" in warmup:
                raise ValueError(
                    f"penalty.warmup must be counted in epochs or in steps; got both, {warmup['epochs']} epochs and {warmup['steps']} "
                    "steps. Remove one."
                )
            epochs = checks.positive("penalty.warmup.epochs", warmup["epochs"], remedy="Leave warmup out for none.")
            keys["warmup"] = {k: v for k, v in cast("Mapping[str, Any]", warmup).items() if k != "epochs"}
        parsed = cls(keys, epochs, {})
        penalty = GradientPenalty.from_dict(parsed._with_steps(1))
        if fraction is not None:
            if checks.positive("penalty.ascent_fraction", fraction, remedy="Leave it out to ascend on the whole batch.") >= 1:
                raise ValueError(f"penalty.ascent_fraction must be < 1; got {fraction}. Leave it out to ascend on the whole batch.")
            try:
                penalty.check_ascent(f"penalty.ascent_fraction {fraction}")
            except ValueError as error:
                raise ValueError(f"penalty.ascent_fraction must be left out here: {error}") from error
            fraction = float(fraction)
        parsed.built[1 if parsed.counts_epochs else 0] = RecipePenalty(penalty, fraction)
        return parsed

    @property
    def counts_epochs(self) -> bool:
        """Whether the penalty depends on the number of steps in an epoch."""
        return self.warmup_epochs is not None

    def resolve(self, *, steps_per_epoch: int) -> RecipePenalty:
        """The penalty that the block describes if an epoch has ``steps_per_epoch`` optimizer steps."""
        steps = steps_per_epoch if self.counts_epochs else 0
        if steps not in self.built:
            fraction = next(iter(self.built.values())).ascent_fraction
            self.built[steps] = RecipePenalty(GradientPenalty.from_dict(self._with_steps(steps)), fraction)
        return self.built[steps]

    def _with_steps(self, steps_per_epoch: int) -> dict[str, Any]:
        if self.warmup_epochs is None:
            return dict(self.keys)
        return {**self.keys, "warmup": {**self.keys["warmup"], "steps": max(1, round(self.warmup_epochs * steps_per_epoch))}}
