"""The runs of a comparison: every variant and seed, and compute-matched baselines, which spend as many gradient evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from gradreg import checks
from gradreg.train import recipe as recipes
from gradreg.train.configuration import Config

Budget = Literal["epochs", "gradients"]


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Args:
        variant: the variant that is trained; for a compute-matched run, the baseline.
        seed: the run's seed.
        budget: "epochs" trains as the recipe says, "gradients" trains the baseline with as many gradient evaluations as a variant spends.
        evaluations: gradient evaluations that the run will spend.
        config: what is run.
    """

    variant: str
    seed: int
    budget: Budget
    evaluations: int
    config: Config

    @property
    def folder(self) -> str:
        """The run's folder within the comparison's."""
        matched = f"-{self.evaluations}-gradients" if self.budget == "gradients" else ""
        return f"{self.variant}{matched}/seed-{self.seed}"


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison.

    Args:
        recipe: the recipe's name.
        description: the recipe's.
        baseline: name of the variant without a penalty to which the others are compared.
        variants: the variants' names, the baseline first.
        seeds: the seeds.
        jobs: every run, in the order of the seeds.
        settings: variant -> all keys of its configuration, nested.
        matched: variant -> gradient evaluations of its compute-matched baseline; a variant that costs no more than the baseline has none.
    """

    recipe: str
    description: str
    baseline: str
    variants: list[str]
    seeds: list[int]
    jobs: list[Job]
    settings: dict[str, dict[str, Any]]
    matched: dict[str, int] = field(default_factory=dict)


def make_plan(recipe: recipes.Recipe, base: Mapping[str, Any], *, penalties: Sequence[str] | None, seeds: int) -> Plan:
    """Plan the comparison of a recipe's variants.

    Args:
        recipe: where the variants come from; one without ``variants`` compares its own penalty to none.
        base: the recipe's nested keys with the command line's overrides.
        penalties: names of the variants to compare; None takes all. The baseline is always included.
        seeds: how many seeds, from the configuration's ``seed`` on, ≥ 1.

    Raises:
        ValueError: no seeds, an unknown variant, or nothing to compare.
    """
    checks.whole("--seeds", seeds, minimum=1, remedy="A paired interval needs 2; 5 is the default.")
    settings = {name: recipe.settings(name, base=base) for name in recipe.variants}
    if not settings and base.get("penalty"):
        settings = {str(base["penalty"].get("name", "penalty")): dict(base)}
    picked = list(dict.fromkeys(penalties)) if penalties else list(settings)
    baseline = next((name for name, keys in settings.items() if not keys.get("penalty")), "none")
    settings.setdefault(baseline, recipes.merge(base, {"penalty": None}))
    for name in picked:
        if name not in settings:
            raise ValueError(checks.unknown(f"variant of recipe {recipe.name!r}:", name, settings))
    names = [baseline, *(name for name in picked if name != baseline)]
    if len(names) < 2:
        raise ValueError(
            f"a comparison needs at least one variant beside the baseline {baseline!r}; got none. Name some with --penalties, "
            "or add variants: to the recipe."
        )
    configs = {name: recipe.configuration(settings[name], name if name in recipe.variants else None) for name in names}
    plain = configs[baseline]
    evaluations = {name: gradient_evaluations(config) for name, config in configs.items()}
    longer = {name: with_gradient_evaluations(plain, evaluations[name]) for name in names}
    matched = {name: gradient_evaluations(config) for name, config in longer.items() if config is not None}
    of_matched = {matched[name]: config for name, config in longer.items() if config is not None}
    jobs: list[Job] = []
    for seed in range(plain.seed, plain.seed + seeds):
        jobs += [Job(name, seed, "epochs", evaluations[name], config.with_seed(seed)) for name, config in configs.items()]
        jobs += [Job(baseline, seed, "gradients", spent, config.with_seed(seed)) for spent, config in of_matched.items()]
    return Plan(
        recipe=recipe.name,
        description=recipe.description,
        baseline=baseline,
        variants=names,
        seeds=list(range(plain.seed, plain.seed + seeds)),
        jobs=jobs,
        settings={name: asdict(config) for name, config in configs.items()},
        matched=matched,
    )


def gradient_evaluations(config: Config) -> int:
    """Gradient evaluations of a whole run, from its schedule of penalties."""
    steps = config.epochs * config.steps_per_epoch()
    penalty = config.resolved_penalty()
    return steps if penalty.penalty is None else round(sum(penalty.evaluations_at(step) for step in range(steps)))


def with_gradient_evaluations(plain: Config, evaluations: int) -> Config | None:
    """The plain run lengthened, in whole epochs rounded up, to ``evaluations``; None if it spends as many already.

    Warm-up and decay epochs of the learning rate are stretched with it, so that the baseline gets its whole schedule.
    """
    epochs = math.ceil(evaluations / plain.steps_per_epoch())
    if epochs <= plain.epochs:
        return None
    stretch = epochs / plain.epochs
    schedule = replace(
        plain.schedule,
        warmup_epochs=round(plain.schedule.warmup_epochs * stretch),
        decay_epochs=[round(epoch * stretch) for epoch in plain.schedule.decay_epochs],
    )
    return replace(plain, epochs=epochs, schedule=schedule)
