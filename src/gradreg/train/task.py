"""A recipe as a task of a study: its variants, what they cost, and a run of each in a folder like those of ``gradreg train``."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from gradreg.penalties import GradientPenalty
from gradreg.study.tasks import OnProgress, Task, Variant
from gradreg.train import arguments
from gradreg.train import recipe as recipes
from gradreg.train.configuration import Config
from gradreg.train.objective import Objective


class RecipeTask(Task):
    """A recipe with the keys of a command line laid over it.

    Args:
        recipe: as read.
        base: the recipe's nested keys with the overrides; None takes its own.
    """

    def __init__(self, recipe: recipes.Recipe, base: Mapping[str, Any] | None = None) -> None:
        self.recipe = recipe
        self.base: dict[str, Any] = dict(recipe.base if base is None else base)
        self.name = recipe.name
        self.description = recipe.description
        self.metric = Objective(metric=self.base.get("metric")).judged

    @cached_property
    def variants(self) -> Mapping[str, Variant]:
        """The recipe's variants; of one without, its own penalty if it has one."""
        if self.recipe.variants:
            settings = {name: self.recipe.settings(name, base=self.base) for name in self.recipe.variants}
            return {name: self._variant(self.recipe.configuration(keys, name)) for name, keys in settings.items()}
        own = self._variant(self.recipe.configuration(self.base))
        return {} if own.is_plain else {str(self.base["penalty"].get("name", "penalty")): own}

    def variant(self, penalty: GradientPenalty | Mapping[str, Any] | None, options: Mapping[str, Any]) -> RecipeVariant:
        block = penalty.to_dict() if isinstance(penalty, GradientPenalty) else penalty
        keys = recipes.merge({**self.base, "penalty": None}, {"penalty": block, **_nested(options)})
        return self._variant(self.recipe.configuration(keys))

    def _variant(self, config: Config) -> RecipeVariant:
        if config.objective.judged != self.metric:
            raise ValueError(
                f"metric must be the same for all variants of recipe {self.name!r}, which are compared by it; got {config.metric} beside "
                f"{self.base.get('metric')}. Move it out of the variant."
            )
        return RecipeVariant(config)

    def configured(self, options: Mapping[str, Any]) -> RecipeTask:
        return RecipeTask(self.recipe, recipes.merge(self.base, _nested(options)))


@dataclass(frozen=True, eq=False)
class RecipeVariant(Variant):
    """One configuration of a recipe."""

    config: Config

    @property
    def method(self) -> str:
        return str(self.config.resolved_penalty())

    @property
    def is_plain(self) -> bool:
        return self.config.penalty is None

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        return asdict(self.config)

    @property
    def code(self) -> Path | None:
        files = [Path(one["file"]) for one in (self.config.code or {}).values()]
        return files[0].parent if files else None

    @property
    def imports(self) -> str:
        return "gradreg.train.preloaded"

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def epochs(self) -> int | None:
        return self.config.epochs

    @cached_property
    def evaluations(self) -> int | None:
        if self.config.described_penalty.held_out is not None:
            return None  # the penalty may be off at some steps
        return gradient_evaluations(self.config)

    def result(self, folder: Path, seed: int, stretch: Fraction) -> dict[str, Any] | None:
        from gradreg.train.run_folder import RunFolder

        held = RunFolder(folder)
        held.check_free_for(self._configuration(seed, stretch))
        return held.result()

    def run(self, folder: Path, seed: int, stretch: Fraction, on_progress: OnProgress) -> dict[str, Any]:
        from gradreg.train.checkpoints.policy import Stopped
        from gradreg.train.run_to_folder import run_to_folder

        config = self._configuration(seed, stretch)
        try:
            return run_to_folder(folder, config, on_epoch=lambda epoch: on_progress(epoch.epoch / config.epochs), track=False)
        except Stopped as stopped:  # the run is saved, and this worker has been told to end
            os._exit(128 + stopped.signal_number)

    def _configuration(self, seed: int, stretch: Fraction) -> Config:
        return (self.config if stretch == 1 else lengthened(self.config, stretch)).with_seed(seed)


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """``{"optimizer.lr": 0.1}`` as ``{"optimizer": {"lr": 0.1}}``."""
    changes: dict[str, Any] = {}
    for key, value in options.items():
        *blocks, last = arguments.key_of(key).split(".")
        inside = changes
        for block in blocks:
            inside = inside.setdefault(block, {})
        inside[last] = value
    return changes


def gradient_evaluations(config: Config) -> int:
    """Gradient evaluations of a whole run, from its schedule of penalties."""
    steps = config.epochs * config.steps_per_epoch()
    penalty = config.resolved_penalty()
    if penalty.penalty is None:
        return steps
    if not penalty.penalty.depends_on_step:  # most penalties, and a study plans hundreds of variants
        return round(steps * penalty.evaluations_at(0))
    return round(sum(penalty.evaluations_at(step) for step in range(steps)))


def lengthened(config: Config, stretch: Fraction) -> Config:
    """The run lengthened to ``stretch`` times its epochs, rounded up.

    Warm-up and decay epochs of the learning rate are stretched with it, so that the baseline gets its whole schedule.
    """
    epochs = math.ceil(config.epochs * stretch)
    ratio = epochs / config.epochs
    schedule = replace(
        config.schedule,
        warmup_epochs=round(config.schedule.warmup_epochs * ratio),
        decay_epochs=[round(epoch * ratio) for epoch in config.schedule.decay_epochs],
    )
    return replace(config, epochs=epochs, schedule=schedule)
