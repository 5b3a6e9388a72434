"""The ``penalty:`` block of a recipe: a ``GradientPenalty`` whose warm-up may be in epochs and whose tail is a share of the run, and the
samples that share a direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from gradreg import checks
from gradreg.held_out import HeldOut
from gradreg.lets import LETS
from gradreg.penalties import GradientPenalty

MEASUREMENTS = 60
"""In a run, if each step is penalized, or more."""
LATEST = 2 / 3
"""Share of a run after which a penalty that waits for overfitting does not begin any more."""


@dataclass(frozen=True)
class RecipePenalty:
    """What a ``penalty:`` block describes.

    Args:
        penalty: the specification; None trains without one.
        ascent_fraction: share of each batch from which the ascent direction comes, > 0 and < 1; None takes the whole batch.
        m: samples that share a perturbation, ≥ 1; None makes one from each process's whole part of a batch.
        held_out: share of the training samples that are kept out of training, to tell whether the penalty helps, or to learn its radius
            from (``LETS``), > 0 and < 1; None keeps none out.
    """

    penalty: GradientPenalty | None
    ascent_fraction: float | None = None
    m: int | None = None
    held_out: float | None = None

    def kept_out(self, samples: int) -> int:
        """How many of ``samples`` training samples are kept out for ``held_out``.

        Raises:
            ValueError: none would be left to train on.
        """
        number = 0 if self.held_out is None else max(1, round(self.held_out * samples))
        if number >= samples:
            raise ValueError(f"penalty.held_out must leave samples to train on; got {self.held_out:g} of {samples}. Use a smaller share.")
        return number

    def switch(self, *, steps_per_epoch: int, epochs: int) -> HeldOut | None:
        """The rule by which held-out samples switch the penalty, which measures often enough for a short run; None if none do."""
        if self.held_out is None or self.learned is not None:
            return None
        steps = epochs * steps_per_epoch
        rule = HeldOut(steps_per_epoch=steps_per_epoch, every=min(HeldOut.every, max(1, steps // MEASUREMENTS)))
        latest = round(LATEST * steps)
        return replace(rule, latest=latest) if latest > rule.earliest else rule

    @property
    def learned(self) -> LETS | None:
        """The rule of a radius that is learned from held-out samples; None for any other."""
        return None if self.penalty is None else self.penalty.learned_radius

    def evaluations_at(self, step: int) -> float:
        """Gradient evaluations that optimizer step ``step`` costs, in passes over a whole batch."""
        if self.penalty is None:
            return 1
        if self.ascent_fraction is None:
            return self.penalty.evaluations_at(step)
        return self.penalty.evaluations_at(step, ascent_share=self.ascent_fraction)

    def acts_at(self, step: int) -> bool:
        """Whether optimizer step ``step`` is penalized."""
        return self.penalty is not None and bool(self.penalty.nominal_at(step).acts)

    def __str__(self) -> str:
        part = "" if self.ascent_fraction is None else f", ascent on {100 * self.ascent_fraction:g} % of each batch"
        each = "" if self.m is None else f", m {self.m}"
        held_out = "" if self.held_out is None else f", {100 * self.held_out:g} % held out"
        return "no penalty" if self.penalty is None else f"{self.penalty}{part}{each}{held_out}"


@dataclass(frozen=True)
class PenaltyConfig:
    """A ``penalty:`` block, parsed.

    In addition to the keys of ``GradientPenalty.from_dict`` it may have ``ascent_fraction``, ``m`` and ``held_out``, and ``warmup`` may
    have ``epochs`` instead of ``steps``. Only a block with epochs is built again once the data, and with them the steps per epoch, are
    known.

    Args:
        keys: the block without ``ascent_fraction``, ``m``, ``held_out`` and ``warmup.epochs``.
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
        fraction, m, held_out = (keys.pop(key, None) for key in ("ascent_fraction", "m", "held_out"))
        warmup, epochs = keys.get("warmup"), None
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
        if held_out is not None and checks.positive("penalty.held_out", held_out, remedy="Leave it out to keep none out.") >= 1:
            raise ValueError(f"penalty.held_out must be a share < 1 of the training samples; got {held_out}. Write 0.05, say.")
        if fraction is not None:
            fraction = _checked_fraction(penalty, fraction)
        if m is not None:
            m = checks.whole("penalty.m", m, minimum=1, remedy="Leave it out for one perturbation of the whole batch.")
            if fraction is not None:
                raise ValueError(
                    f"penalty.m must be left out with penalty.ascent_fraction, whose direction is that of the whole step; got {m} with "
                    f"{fraction:g}. Remove one."
                )
            try:
                penalty.check_each()
            except ValueError as error:
                raise ValueError(f"penalty.m must be left out here; got {m}: {error}") from error
        found = RecipePenalty(penalty, fraction, m, held_out)
        if found.learned is not None and held_out is None:
            raise ValueError(
                f"penalty.held_out must be given with {found.learned}, a radius that is learned from held-out samples; got none. Write "
                "0.05, say, or the radius auto, which needs none."
            )
        parsed.built[1 if parsed.counts_epochs else 0] = found
        return parsed

    @property
    def counts_epochs(self) -> bool:
        """Whether the penalty depends on the number of steps in an epoch."""
        return self.warmup_epochs is not None

    @property
    def counts_steps(self) -> bool:
        """Whether it depends on the number of steps of the run: by a warm-up in epochs, or a tail."""
        penalty = self.described.penalty
        return self.counts_epochs or (penalty is not None and penalty.depends_on_length)

    @property
    def described(self) -> RecipePenalty:
        """The penalty as far as it is known without the steps of an epoch, as if that were 1."""
        return next(iter(self.built.values()))

    def resolve(self, *, steps_per_epoch: int, epochs: int) -> RecipePenalty:
        """The penalty that the block describes in a run of ``epochs`` epochs of ``steps_per_epoch`` optimizer steps.

        Raises:
            ValueError: a warm-up or a tail leaves no step of the run at which it acts.
        """
        steps = steps_per_epoch if self.counts_epochs else 0
        if steps not in self.built:
            self.built[steps] = replace(self.described, penalty=GradientPenalty.from_dict(self._with_steps(steps)))
        found = self.built[steps]
        if found.penalty is None:
            return found
        try:
            return replace(found, penalty=found.penalty.over(epochs * steps_per_epoch))
        except ValueError as error:
            raise ValueError(f"penalty: {error}") from error

    def _with_steps(self, steps_per_epoch: int) -> dict[str, Any]:
        if self.warmup_epochs is None:
            return dict(self.keys)
        return {**self.keys, "warmup": {**self.keys["warmup"], "steps": max(1, round(self.warmup_epochs * steps_per_epoch))}}


def _checked_fraction(penalty: GradientPenalty, fraction: Any) -> float:
    if checks.positive("penalty.ascent_fraction", fraction, remedy="Leave it out to ascend on the whole batch.") >= 1:
        raise ValueError(f"penalty.ascent_fraction must be < 1; got {fraction}. Leave it out to ascend on the whole batch.")
    try:
        penalty.check_ascent(f"penalty.ascent_fraction {fraction}")
    except ValueError as error:
        raise ValueError(f"penalty.ascent_fraction must be left out here: {error}") from error
    return float(fraction)
