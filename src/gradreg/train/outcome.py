"""The results of a run: one record per epoch, and its outcome."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
        test_loss: mean cross entropy over the test set after the epoch.
        test_accuracy: share of the test set classified correctly, 0 to 1.
        test_top5: share of the test set whose class is among the five likeliest, 0 to 1.
        lr: learning rate of the next step.
        gradient_norm: norm of the last step's first gradient.
        strength: the penalty's strength at the last step.
        radius: the penalty's radius at the last step; None without one.
        weight_decay: largest coefficient of weight decay at the last step; what the optimizer makes of it is its own business.
        validation_loss: mean cross entropy over the validation images; None without any.
        validation_accuracy: share of them classified correctly, 0 to 1; None without any.
        ema_test_loss: as test_loss, of the running mean of the weights; None without one.
        ema_test_accuracy: as test_accuracy, of the running mean of the weights.
        ema_validation_accuracy: as validation_accuracy, of the running mean of the weights.
        validation_top5: share of the validation images whose class is among the five likeliest, 0 to 1; None without any.
        ema_validation_loss: as validation_loss, of the running mean of the weights.
        unreadable_images: images left out because they could not be read; 0 unless ``data.corrupt`` is "skip".
        seconds: seconds spent training so far, without evaluation.
        images_per_second: training images over seconds, in this epoch; of the rest of it where a run resumed in its middle.
    """

    epoch: int
    step: int
    gradient_evaluations: float
    train_loss: float
    test_loss: float
    test_accuracy: float
    test_top5: float
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
    seconds: float = 0.0
    images_per_second: float = 0.0

    @property
    def finite(self) -> bool:
        """Whether the losses are finite: in training, on the test set and on the validation images."""
        return all(math.isfinite(loss) for loss in (self.train_loss, self.test_loss, self.validation_loss) if loss is not None)

    @property
    def judged_by(self) -> tuple[str, float]:
        """Name and value of the accuracy that ranks epochs: on the validation images, or without any on the test set."""
        if self.validation_accuracy is not None:
            return "validation_accuracy", self.validation_accuracy
        return "test_accuracy", self.test_accuracy


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
    """

    model: nn.Module
    weights: dict[str, Tensor]
    history: list[Epoch]
    first_loss: float
    ema: nn.Module | None = None
    best: dict[str, Tensor] | None = None

    @property
    def diverged(self) -> bool:
        """Whether the loss became non-finite, or ended above twice that of the untrained model."""
        last = self.history[-1]
        return not last.finite or last.train_loss > 2 * self.first_loss

    @property
    def best_epoch(self) -> Epoch:
        """The first epoch with the highest accuracy, as ``Epoch.judged_by`` has it."""
        return max(self.history, key=lambda epoch: epoch.judged_by[1] if epoch.finite else -1.0)

    def summary(self) -> dict[str, Any]:
        """The last epoch in plain values, and which one was best; the accuracy and losses are None for a run that diverged."""
        last, best = self.history[-1], self.best_epoch
        name, value = best.judged_by
        ended = {
            "test_accuracy": last.test_accuracy,
            "test_top5": last.test_top5,
            "train_loss": last.train_loss,
            "test_loss": last.test_loss,
            "validation_accuracy": last.validation_accuracy,
            "validation_top5": last.validation_top5,
            "validation_loss": last.validation_loss,
            "ema_test_accuracy": last.ema_test_accuracy,
            "ema_validation_accuracy": last.ema_validation_accuracy,
        }
        return {
            "epochs": last.epoch,
            "steps": last.step,
            "gradient_evaluations": last.gradient_evaluations,
            **(dict.fromkeys(ended) if self.diverged else ended),
            "best": None if self.diverged else {"epoch": best.epoch, "by": name, name: value, "test_accuracy": best.test_accuracy},
            "seconds": last.seconds,
            "diverged": self.diverged,
        }
