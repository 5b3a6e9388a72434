"""The one training loop. No method forks it: it hands the regularizer a closure, and the penalty decides where that is evaluated."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradreg.torch import GradientRegularizer
from gradreg.train import models
from gradreg.train.configuration import Config
from gradreg.train.data.loading import Data, load
from gradreg.train.data.sets import EvaluationSet
from gradreg.train.optimization import create_schedule
from gradreg.train.weight_decay import create_with_weight_decay, set_weight_decay


@dataclass(frozen=True)
class Epoch:
    """What one epoch showed; one line of ``metrics.jsonl``.

    Args:
        epoch: epochs done.
        step: optimizer steps done.
        gradient_evaluations: gradient evaluations done (see ``GradientPenalty.evaluations_at``).
        train_loss: mean loss over the epoch's batches, of each step's first pass, at the unperturbed weights.
        test_loss: mean cross entropy over the test set after the epoch.
        test_accuracy: share of the test set classified rightly, 0 to 1.
        lr: learning rate of the next step.
        gradient_norm: norm of the last step's first gradient.
        strength: the penalty's strength at the last step.
        radius: the penalty's radius at the last step; None without one.
        seconds: seconds spent training so far, without evaluation.
        weight_decay: largest coefficient of weight decay at the last step; what the optimizer makes of it is its own business.
        validation_loss: mean cross entropy over the images held out to validate on; None without any.
        validation_accuracy: share of them classified rightly, 0 to 1; None without any.
    """

    epoch: int
    step: int
    gradient_evaluations: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    lr: float
    gradient_norm: float
    strength: float
    radius: float | None
    seconds: float
    weight_decay: float = 0.0
    validation_loss: float | None = None
    validation_accuracy: float | None = None

    @property
    def finite(self) -> bool:
        """Whether the loss, in training and on the test set, is still a finite number."""
        return math.isfinite(self.train_loss) and math.isfinite(self.test_loss)


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

    Args:
        model: the trained model.
        history: one entry an epoch; it ends early where the loss stopped being a finite number.
        first_loss: loss of the first step, of the untrained model.
    """

    model: nn.Module
    history: list[Epoch]
    first_loss: float

    @property
    def diverged(self) -> bool:
        """Whether the loss stopped being finite, or ended at more than twice what the untrained model had."""
        last = self.history[-1]
        return not last.finite or last.train_loss > 2 * self.first_loss

    def summary(self) -> dict[str, Any]:
        """The last epoch in plain values; ``test_accuracy`` is None for a run that diverged."""
        last = self.history[-1]
        return {
            "epochs": last.epoch,
            "steps": last.step,
            "gradient_evaluations": last.gradient_evaluations,
            "test_accuracy": None if self.diverged else last.test_accuracy,
            "train_loss": None if self.diverged else last.train_loss,
            "test_loss": None if self.diverged else last.test_loss,
            "seconds": last.seconds,
            "diverged": self.diverged,
        }


def train(
    config: Config,
    *,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_step: Callable[[int, nn.Module, Data], None] | None = None,
) -> Outcome:
    """Train as ``config`` says; the same configuration gives the same weights on the same machine, bit for bit on a CPU.

    Args:
        config: the run.
        on_epoch: called after every epoch.
        on_step: called after every optimizer step with the number of steps done, the model, and the data; to measure, not to change.

    Returns:
        The model and the history. A run whose loss is no longer finite ends with the epoch in which that happened.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = _device(config.device)
    torch.manual_seed(config.seed)
    sets = load(config.data, config.augmentation, seed=config.seed, device=device)
    model = models.create(config.model, classes=sets.classes, image_shape=sets.image_shape).to(device)
    steps_per_epoch = math.ceil(len(sets.train) / config.batch_size)
    optimizer, weight_decay = create_with_weight_decay(model, config, steps_per_epoch=steps_per_epoch, classes=sets.classes)
    schedule = create_schedule(optimizer, config.schedule, epochs=config.epochs, steps_per_epoch=steps_per_epoch)
    regularizer = GradientRegularizer(model, config.gradient_penalty())

    history: list[Epoch] = []
    seconds = first_loss = 0.0
    for epoch in range(1, config.epochs + 1):
        started = time.perf_counter()
        model.train()
        losses: list[Tensor] = []
        for batch in sets.train.batches(epoch, config.batch_size):
            set_weight_decay(weight_decay, regularizer.step, model, batch)
            optimizer.zero_grad()
            losses.append(
                regularizer.backward(lambda b=batch: cross_entropy(model(b.images), b.targets, label_smoothing=config.label_smoothing))
            )
            if config.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            if schedule is not None:
                schedule.step_update(regularizer.step)
            if on_step is not None:
                on_step(regularizer.step, model, sets)
                model.train()
        train_loss = torch.stack(losses).mean().item()
        if epoch == 1:
            first_loss = losses[0].item()
        seconds += time.perf_counter() - started
        test_loss, test_accuracy = evaluate(model, sets.test)
        validation_loss, validation_accuracy = (None, None) if sets.validation is None else evaluate(model, sets.validation)
        metrics = regularizer.metrics
        history.append(
            Epoch(
                epoch=epoch,
                step=regularizer.step,
                gradient_evaluations=int(metrics.evaluations),
                train_loss=train_loss,
                test_loss=test_loss,
                test_accuracy=test_accuracy,
                lr=optimizer.param_groups[0]["lr"],
                gradient_norm=metrics.gradient_norm,
                strength=metrics.strength,
                radius=None if math.isnan(metrics.radius) else metrics.radius,
                seconds=seconds,
                weight_decay=optimizer.param_groups[0]["weight_decay"] if weight_decay is None else weight_decay.value,
                validation_loss=validation_loss,
                validation_accuracy=validation_accuracy,
            )
        )
        on_epoch(history[-1])
        if not history[-1].finite:
            break
    return Outcome(model=model, history=history, first_loss=first_loss)


@torch.no_grad()
def evaluate(model: nn.Module, split: EvaluationSet, *, batch_size: int = 1000) -> tuple[float, float]:
    """Mean cross entropy and share of right answers over the whole split, in evaluation mode."""
    model.eval()
    loss = right = 0.0
    for batch in split.batches(batch_size):
        logits = model(batch.images)
        loss += cross_entropy(logits, batch.labels, reduction="sum").item()
        right += (logits.argmax(dim=1) == batch.labels).sum().item()
    return loss / len(split), right / len(split)


def _device(name: str) -> torch.device:
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found if found is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"device must name one that this machine has; got {name!r}: {first_line}. Use auto or cpu.") from error
    return device
