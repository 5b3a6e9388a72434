"""The probe: a short run at a large L2, whose step of best validation accuracy predicts the L2 for a long run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradreg import checks
from gradreg.study.executors.executor import Executor, Site, Work
from gradreg.study.running import run_one
from gradreg.train.configuration import Config
from gradreg.weight_decay import predict_l2
from gradreg.weight_decay_clock import effective_learning_rate

if TYPE_CHECKING:
    from torch import nn

LATE = 0.9
"""A best accuracy after this share of the probe counts as one at its end: it might have risen further."""


@dataclass(frozen=True)
class Probe:
    """What a probe measured, and the prediction from it.

    Args:
        l2: coefficient λ₀ of the probe.
        learning_rate: its constant learning rate η.
        momentum: μ of the clock; 0 for decoupled decay.
        steps: optimizer steps at which the validation accuracy was measured.
        accuracies: the validation accuracy at each, 0 to 1.
        probe_steps: optimizer steps of the probe.
        budget_steps: optimizer steps of the planned run.
        budget_learning_rate: mean learning rate of the planned run, under its schedule.
        smooth: measurements over which a centered mean is taken before the best is picked; 1 does not smooth.
    """

    l2: float
    learning_rate: float
    momentum: float
    steps: list[int]
    accuracies: list[float]
    probe_steps: int
    budget_steps: int
    budget_learning_rate: float
    smooth: int = 1

    @property
    def smoothed(self) -> list[float]:
        """The accuracies smoothed by centered means of ``smooth`` of them, of fewer at the ends."""
        half = self.smooth // 2
        windows = [self.accuracies[max(0, i - half) : i + half + 1] for i in range(len(self.accuracies))]
        return [sum(window) / len(window) for window in windows]

    @property
    def best_step(self) -> int:
        """t*: the first step with the highest validation accuracy."""
        judged = self.smoothed
        return self.steps[judged.index(max(judged))]

    @property
    def constant(self) -> float:
        """c = η/(1 − μ)·λ₀·t*."""
        return effective_learning_rate(self.learning_rate, self.momentum) * self.l2 * self.best_step

    @property
    def rejection(self) -> str | None:
        """Why nothing can be predicted from this probe, and what to do; None if it can."""
        if self.best_step <= LATE * self.probe_steps:
            return None
        return (
            f"no prediction: the best validation accuracy came at step {self.best_step} of {self.probe_steps}, in the last tenth of the "
            f"probe, and may not be its peak. Probe longer (--probe-epochs) or with a larger L2 (--probe-l2, now {self.l2:g})."
        )

    def predicted_l2(self) -> float:
        """The L2 for the budget.

        Raises:
            ValueError: with the ``rejection``, if there is one.
        """
        if self.rejection is not None:
            raise ValueError(self.rejection)
        return predict_l2(
            self.learning_rate,
            self.l2,
            self.best_step,
            self.budget_steps,
            self.momentum,
            probe_steps=self.probe_steps,
            budget_learning_rate=self.budget_learning_rate,
        )

    def result(self) -> dict[str, Any]:
        """All of it in plain values, with the prediction."""
        predicted = None if self.rejection else self.predicted_l2()
        return {**asdict(self), "best_step": self.best_step, "constant": self.constant, "predicted_l2": predicted}


@dataclass(frozen=True)
class ProbePlan:
    """The probe of a configuration, before it runs.

    Args:
        recipe: the run as configured, without the length and the validation split of the probe.
        budget: the run for which L2 is to be predicted.
        config: the probe's own run: constant learning rate, large L2, few epochs, a validation split.
        measure_every: optimizer steps from one measurement to the next.
        smooth: see ``Probe``.
    """

    recipe: Config
    budget: Config
    config: Config
    measure_every: int
    smooth: int

    @property
    def share(self) -> float:
        """Steps of the probe over steps of the budget."""
        return self.config.epochs / self.budget.epochs


def make_plan(
    recipe: Config,
    *,
    budget_epochs: int,
    probe_l2: float,
    probe_epochs: int,
    measure_every: int = 10,
    smooth: int = 1,
    validation: int | float = 0.1,
) -> ProbePlan:
    """Plan the probe of a run.

    Args:
        recipe: the run's configuration.
        budget_epochs: epochs of the planned run, ≥ ``probe_epochs``.
        probe_l2: λ₀, large, > 0.
        probe_epochs: epochs of the probe, ≥ 1.
        measure_every: optimizer steps from one measurement to the next, ≥ 1.
        smooth: odd number of measurements in a centered mean, ≥ 1.
        validation: the validation split (see ``data.validation``) where the recipe has none.

    Raises:
        ValueError, TypeError: a bad number, a budget shorter than the probe, or no validation image.
    """
    budget_epochs = checks.whole("--budget-epochs", budget_epochs, minimum=1)
    probe_epochs = checks.whole("--probe-epochs", probe_epochs, minimum=1)
    checks.positive("--probe-l2", probe_l2, remedy="The probe needs a large one, so that its best accuracy comes early.")
    checks.whole("--measure-every", measure_every, minimum=1)
    if checks.whole("--smooth", smooth, minimum=1) % 2 == 0:
        raise ValueError(f"--smooth must be odd, for a mean centred on each measurement; got {smooth}. Use {smooth + 1}.")
    if recipe.metric is not None or recipe.loss is not None:
        raise ValueError(
            "the recipe of a probe must be judged by accuracy, whose maximum it looks for; got one with a loss or metric of its own. Leave "
            "both out."
        )
    if budget_epochs < probe_epochs:
        raise ValueError(
            f"--budget-epochs must not be shorter than the probe, {probe_epochs} epochs; got {budget_epochs}. Probe a shorter while."
        )
    data = recipe.data if recipe.data.validation is not None else replace(recipe.data, validation=validation)
    config = replace(recipe, data=data, epochs=budget_epochs)
    probe = replace(
        config,
        epochs=probe_epochs,
        optimizer=replace(config.optimizer, weight_decay=float(probe_l2)),
        schedule=replace(config.schedule, name="constant", warmup_epochs=0),
        weight_decay=type(config.weight_decay)(cautious=config.weight_decay.cautious),
    )
    plan = ProbePlan(recipe, config, probe, measure_every, smooth)
    steps = probe_epochs * probe.steps_per_epoch()
    if steps < 3 * measure_every:
        raise ValueError(
            f"--measure-every must leave at least 3 measurements in the probe's {steps} steps; got {measure_every}. "
            "Measure more often, or probe longer."
        )
    return plan


def run_probe(plan: ProbePlan) -> Probe:
    """Train the probe and measure it."""
    import torch

    from gradreg.train.evaluation import evaluate
    from gradreg.train.loop import train

    steps: list[int] = []
    accuracies: list[float] = []
    momentum = 0.0

    def measure(step: int, model: nn.Module, sets: Any) -> None:
        if step % plan.measure_every == 0:
            steps.append(step)
            accuracies.append(evaluate(model, sets.validation).accuracy)

    outcome = train(plan.config, on_step=measure)
    if outcome.diverged:
        raise ValueError(
            f"the probe diverged: --probe-l2 {plan.config.optimizer.weight_decay:g} with learning rate {plan.config.optimizer.lr:g} is too "
            "much. Lower one of them."
        )
    group = plan.config.optimizer.build(torch.nn.Linear(1, 1)).param_groups[0]
    if "momentum" in group and not plan.config.weight_decay.cautious:
        momentum = float(group["momentum"])
    return Probe(
        l2=plan.config.optimizer.weight_decay,
        learning_rate=plan.config.optimizer.lr,
        momentum=momentum,
        steps=steps,
        accuracies=accuracies,
        probe_steps=plan.config.epochs * plan.config.steps_per_epoch(),
        budget_steps=plan.budget.epochs * plan.budget.steps_per_epoch(),
        budget_learning_rate=mean_learning_rate(plan.budget),
        smooth=plan.smooth,
    )


def run_probe_on(plan: ProbePlan, executor: Executor, folder: Path) -> Probe:
    """``run_probe``, carried out by an executor.

    Args:
        plan: the probe.
        executor: where it runs.
        folder: which workers can see.

    Raises:
        ExecutorError: nothing can be carried out, or its process died.
    """
    return run_one(Work("probe", _Probing(plan)), executor=executor, site=Site(folder.resolve(), name="l2-probe"))["probe"]


@dataclass(frozen=True, eq=False)
class _Probing:
    """The probe, as a work."""

    plan: ProbePlan

    def __call__(self, on_progress: Callable[[float], None]) -> dict[str, Any]:
        return {"probe": run_probe(self.plan)}


def mean_learning_rate(config: Config) -> float:
    """The mean over the run of the learning rate under its schedule."""
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.optimizer.lr)
    steps_per_epoch = config.steps_per_epoch()
    schedule = config.schedule.build(optimizer, epochs=config.epochs, steps_per_epoch=steps_per_epoch)
    if schedule is None:
        return config.optimizer.lr
    total, steps = 0.0, config.epochs * steps_per_epoch
    for step in range(steps):
        total += optimizer.param_groups[0]["lr"]
        schedule.step_update(step + 1)
    return total / steps
