"""The key ``weight_decay`` of a recipe, and what it builds: a schedule of the coefficient, or ``AutoL2`` with its measurements."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from gradreg import checks
from gradreg.schedules import Constant, Cosine, LogTime, Schedule
from gradreg.train.optimization import OptimizerConfig
from gradreg.weight_decay import AutoL2, Trigger
from gradreg.weight_decay_clock import effective_learning_rate

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from gradreg.torch.weight_decay import WeightDecay


@dataclass
class WeightDecayConfig:
    """Weight decay over the run: how the coefficient changes with the steps, and which weights decay.

    Args:
        schedule: "constant" stays at start, "cosine" falls (or rises) to end at the end of the run, "log-time" is start * t0 / (t0 + step),
            "lr-squared" is in proportion to the learning rate, so that a step's decay follows its square; "auto" is AutoL2: it divides
            the coefficient whenever training stops improving.
        start: the coefficient at step 0, >= 0; null takes optimizer.weight_decay, and 0.1 for "auto".
        end: the coefficient of "cosine" at the end, >= 0.
        t0_epochs: epochs after which half of "log-time" is left, > 0.
        cautious: decay, decoupled from the gradient, only the weights that the optimizer itself moves towards 0.
        factor: what "auto" multiplies the coefficient by when it decays, > 0 and < 1.
        refractory: "auto" waits refractory / coefficient steps between decays, > 0.
        learning_rate_aware: "auto" waits refractory / (coefficient * learning rate / (1 - momentum)) steps instead.
        measure_every: steps between the measurements of "auto", on the minibatch that comes next.
        trigger: what makes "auto" decay: the loss, the accuracy, either or both stop improving.
        minimum: lower bound of the coefficient of "auto", >= 0.
        smoothing: share of the old value in the running mean of auto's measurements, >= 0 and < 1.
        convention: "authors" runs "auto" with its authors' coefficient, whose loss is averaged over the classes: the weight decay is
            2 * classes times it.
    """

    schedule: Literal["constant", "cosine", "log-time", "lr-squared", "auto"] = "constant"
    start: float | None = None
    end: float = 0.0
    t0_epochs: float = 1.0
    cautious: bool = False
    factor: float = 0.1
    refractory: float = 0.1
    learning_rate_aware: bool = False
    measure_every: int = 10
    trigger: Trigger = "either"
    minimum: float = 0.0
    smoothing: float = 0.0
    convention: Literal["torch", "authors"] = "torch"

    def __post_init__(self) -> None:
        if self.start is not None:
            checks.non_negative("weight_decay.start", self.start)
        checks.non_negative("weight_decay.end", self.end)
        checks.positive("weight_decay.t0_epochs", self.t0_epochs)
        if self.schedule == "auto":
            try:
                self.auto(learning_rate=1.0)
            except (ValueError, TypeError) as error:
                raise type(error)(f"weight_decay.{str(error).replace('initial', 'start')}") from error
        elif self.convention == "authors":
            raise ValueError("weight_decay.convention must be 'torch' unless the schedule is 'auto'; got 'authors'. See l2_from_authors.")

    def auto(self, *, learning_rate: float) -> AutoL2:
        """The ``AutoL2`` of schedule "auto", with ``learning_rate`` over 1 - momentum."""
        return AutoL2(
            initial=0.1 if self.start is None else self.start,
            factor=self.factor,
            refractory=self.refractory,
            measure_every=self.measure_every,
            trigger=self.trigger,
            minimum=self.minimum,
            smoothing=self.smoothing,
            learning_rate=learning_rate if self.learning_rate_aware else None,
        )

    def build(
        self, model: nn.Module, config: OptimizerConfig, *, epochs: int, steps_per_epoch: int, classes: int | None
    ) -> tuple[Optimizer, WeightDecay | None]:
        """The optimizer, and what changes its weight decay from step to step; None if that is ``config.weight_decay`` throughout."""
        if self.schedule == "constant" and self.start is None and not self.cautious:
            return config.build(model), None
        from gradreg.torch.weight_decay import WeightDecay

        start = config.weight_decay if self.start is None else self.start
        # Any weight decay > 0 marks the groups that decay; WeightDecay replaces it.
        optimizer = replace(config, weight_decay=1.0).build(model)
        peak = config.lr if self.schedule == "lr-squared" else None
        if self.schedule == "auto":
            momentum = max(group.get("momentum", 0.0) for group in optimizer.param_groups)
            auto = self.auto(learning_rate=effective_learning_rate(config.lr, momentum))
            scale = 1.0
            if self.convention == "authors":
                assert classes is not None  # checked by Config
                scale = 2.0 * classes
            return optimizer, WeightDecay(optimizer, auto, scale=scale, cautious=self.cautious)
        schedule: Schedule = Constant(value=start)
        if self.schedule == "cosine":
            schedule = Cosine(start=start, end=self.end, steps=max(1, epochs * steps_per_epoch - 1))
        elif self.schedule == "log-time":
            schedule = LogTime(value=start, t0=max(1, round(self.t0_epochs * steps_per_epoch)))
        return optimizer, WeightDecay(optimizer, schedule, peak_learning_rate=peak, cautious=self.cautious)
