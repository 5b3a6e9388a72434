"""The results of a run: one record per epoch, and its outcome."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from gradreg.sharpness.measures import PREFIX
from gradreg.study.tasks import Metric
from gradreg.train.objective import ACCURACY

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Epoch:
    """The record of one epoch: a line of ``metrics.jsonl``, and for the two times a line of ``timings.jsonl``.

    Args:
        epoch: epochs done.
        step: optimizer steps done.
        gradient_evaluations: gradient evaluations done, in passes over a whole batch (see ``GradientPenalty.evaluations_at``).
        train_loss: mean loss over the epoch's batches, of each step's first pass, at the unperturbed weights.
        test_loss: mean loss over the test set after the epoch.
        test_accuracy: share of the test set classified correctly, 0 to 1; None if the run is judged by another metric.
        test_top5: share of the test set whose class is among the five likeliest, 0 to 1; None as test_accuracy.
        lr: learning rate of the next step.
        gradient_norm: norm of the last step's first gradient.
        strength: the penalty's strength at the last step.
        radius: the penalty's radius at the last step; None without one.
        weight_decay: largest coefficient of weight decay at the last step; what the optimizer makes of it is its own business.
        validation_loss: mean loss over the validation images; None without any.
        validation_accuracy: share of them classified correctly, 0 to 1; None without any.
        ema_test_loss: as test_loss, of the running mean of the weights; None without one.
        ema_test_accuracy: as test_accuracy, of the running mean of the weights.
        ema_validation_accuracy: as validation_accuracy, of the running mean of the weights.
        validation_top5: share of the validation images whose class is among the five likeliest, 0 to 1; None without any.
        ema_validation_loss: as validation_loss, of the running mean of the weights.
        unreadable_images: images left out because they could not be read; 0 unless ``data.corrupt`` is "skip".
        own: the recipe's own metric as ``test_m``, ``validation_m``, ``ema_test_m`` and ``ema_validation_m``; empty without one.
        sharpness: what the block ``sharpness`` measured, as ``sharpness_NAME`` and ``sharpness_NAME_error``; empty where nothing was.
        seconds: seconds spent training so far, without evaluation and measurements.
        images_per_second: training images over seconds, in this epoch; of the rest of it where a run resumed in its middle.
    """

    epoch: int
    step: int
    gradient_evaluations: float
    train_loss: float
    test_loss: float
    test_accuracy: float | None
    test_top5: float | None
    lr: float
    gradient_norm: float
    strength: float
    radius: float | None
    weight_decay: float = 0.0
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    ema_test_loss: float | None = None
    ema_test_accuracy: float | None = None
    ema_validation_accuracy: float | None = None
    validation_top5: float | None = None
    ema_validation_loss: float | None = None
    unreadable_images: int = 0
    own: dict[str, float] = field(default_factory=dict)
    sharpness: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    images_per_second: float = 0.0

    @property
    def finite(self) -> bool:
        """Whether the losses are finite, in training, on the test set and on the validation images, and the recipe's own metric there."""
        judged = [value for name, value in self.own.items() if not name.startswith("ema_")]
        return all(math.isfinite(value) for value in (self.train_loss, self.test_loss, self.validation_loss, *judged) if value is not None)

    def judged_by(self, metric: Metric = ACCURACY) -> tuple[str, float]:
        """Name and value of the metric that ranks epochs: on the validation images, or without any on the test set."""
        name = metric.test if self._value(metric.validation) is None else metric.validation
        value = self._value(name)
        if value is None:
            raise KeyError(name)
        return name, value

    def _value(self, name: str) -> float | None:
        """What ``to_dict`` has under ``name``, None where it has nothing; without a copy, because a run asks for all epochs after each."""
        if name in self.own:
            return self.own[name]
        known = self.test_accuracy is not None or not name.endswith(("_accuracy", "_top5"))
        return getattr(self, name, None) if known else None

    def check(self, metric: Metric) -> None:
        """Raise for a metric that is not a number though the losses are.

        Raises:
            ValueError: naming the metric, the epoch and the loss.
        """
        for split, loss in (("test", self.test_loss), ("validation", self.validation_loss)):
            if loss is not None and math.isfinite(loss) and math.isnan(self.own.get(f"{split}_{metric.name}", 0.0)):
                raise ValueError(
                    f"metric {metric.name!r} must be a number; got nan on the {split} set after epoch {self.epoch}, where the loss is "
                    f"{loss:g}. Return 0.0, say, where it is not defined."
                )

    def to_dict(self) -> dict[str, Any]:
        """Every value by its name, those of the recipe's own metric among them, in place of the accuracies that there are not."""
        values = asdict(self)
        own = {**values.pop("own"), **values.pop("sharpness")}
        if self.test_accuracy is None:
            values = {name: value for name, value in values.items() if not name.endswith(("_accuracy", "_top5"))}
        return {**values, **own}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Epoch:
        """The epoch whose ``to_dict`` gave ``values``."""
        known = {f.name for f in fields(cls)} - {"own", "sharpness"}
        own = {
            name: value
            for name, value in values.items()
            if name not in known and name.removeprefix("ema_").startswith(("test_", "validation_"))
        }
        measured = {name: value for name, value in values.items() if name.startswith(PREFIX)}
        given = {name: value for name, value in values.items() if name not in own and name not in measured}
        return cls(**{"test_accuracy": None, "test_top5": None, **given}, own=own, sharpness=measured)


def best_of(history: Sequence[Epoch], metric: Metric) -> Epoch | None:
    """The first of the epochs with the best ``Epoch.judged_by``; None if the losses of none are finite."""
    best: Epoch | None = None
    for epoch in history:
        if epoch.finite and (best is None or metric.is_better(epoch.judged_by(metric)[1], best.judged_by(metric)[1])):
            best = epoch
    return best


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

    Args:
        model: the trained model.
        weights: its parameters and buffers by name, whole and on the CPU.
        history: one entry per epoch; it ends early if the loss became non-finite.
        first_loss: loss of the first step, of the untrained model.
        ema: the model with the EMA of the weights; None without one.
        best: the weights of the best epoch by name; None where they are not kept.
        metric: what epochs are ranked by.
        own_loss: whether the loss is not ours, so that its scale is not known.
    """

    model: nn.Module
    weights: dict[str, Tensor]
    history: list[Epoch]
    first_loss: float
    ema: nn.Module | None = None
    best: dict[str, Tensor] | None = None
    metric: Metric = ACCURACY
    own_loss: bool = False

    @property
    def diverged(self) -> bool:
        """Whether the loss became non-finite, or, if it is ours, ended above twice that of the untrained model."""
        last = self.history[-1]
        return not last.finite or (not self.own_loss and last.train_loss > 2 * self.first_loss)

    @property
    def best_epoch(self) -> Epoch:
        """The first epoch with the best metric, as ``Epoch.judged_by`` has it."""
        return best_of(self.history, self.metric) or self.history[0]

    def summary(self) -> dict[str, Any]:
        """The last epoch in plain values, and which one was best; the accuracy and losses are None for a run that diverged."""
        last, best = self.history[-1], self.best_epoch
        name, value = best.judged_by(self.metric)
        values, test = last.to_dict(), self.metric.test
        ended = {key: values[key] for key in _ENDED if key in values} | last.own
        measured = next((epoch for epoch in reversed(self.history) if epoch.sharpness), None)
        return {
            "epochs": last.epoch,
            "steps": last.step,
            "gradient_evaluations": last.gradient_evaluations,
            **(dict.fromkeys(ended) if self.diverged else ended),
            "best": None if self.diverged else {"epoch": best.epoch, "by": name, name: value, test: best.to_dict()[test]},
            **({} if measured is None else {f"{PREFIX}epoch": measured.epoch, **_plain(measured.sharpness)}),
            "seconds": last.seconds,
            "diverged": self.diverged,
        }


def _plain(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


_ENDED = (
    *("test_accuracy", "test_top5", "train_loss", "test_loss", "validation_accuracy", "validation_top5", "validation_loss"),
    *("ema_test_accuracy", "ema_validation_accuracy"),
)
"""The values of the last epoch that a result has."""
