"""Weight decay over a run, as the configuration says: a schedule, or ``AutoL2`` with its measurements."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from gradreg.schedules import Constant, Cosine, LogTime, Schedule
from gradreg.torch.weight_decay import WeightDecay
from gradreg.train.configuration import Config, Precision
from gradreg.train.data.loader import Batch
from gradreg.train.devices import Devices
from gradreg.train.evaluation import autocast, inputs
from gradreg.train.optimization import create_optimizer
from gradreg.weight_decay_clock import effective_learning_rate


def create_with_weight_decay(
    model: nn.Module, config: Config, *, steps_per_epoch: int, classes: int
) -> tuple[Optimizer, WeightDecay | None]:
    """The optimizer, and what changes its weight decay from step to step; None where it is constantly ``optimizer.weight_decay``."""
    settings = config.weight_decay
    if settings.schedule == "constant" and settings.start is None and not settings.cautious:
        return create_optimizer(model, config.optimizer), None
    start = config.optimizer.weight_decay if settings.start is None else settings.start
    # Any weight decay > 0 marks the groups that decay; WeightDecay replaces it.
    optimizer = create_optimizer(model, replace(config.optimizer, weight_decay=1.0))
    peak = config.optimizer.lr if settings.schedule == "lr-squared" else None
    if settings.schedule == "auto":
        momentum = max(group.get("momentum", 0.0) for group in optimizer.param_groups)
        auto = settings.auto(learning_rate=effective_learning_rate(config.optimizer.lr, momentum))
        scale = 2.0 * classes if settings.convention == "authors" else 1.0
        return optimizer, WeightDecay(optimizer, auto, scale=scale, cautious=settings.cautious)
    schedule: Schedule = Constant(value=start)
    if settings.schedule == "cosine":
        schedule = Cosine(start=start, end=settings.end, steps=max(1, config.epochs * steps_per_epoch - 1))
    elif settings.schedule == "log-time":
        schedule = LogTime(value=start, t0=max(1, round(settings.t0_epochs * steps_per_epoch)))
    return optimizer, WeightDecay(optimizer, schedule, peak_learning_rate=peak, cautious=settings.cautious)


def set_weight_decay(
    weight_decay: WeightDecay | None, step: int, model: nn.Module, batch: Batch, devices: Devices, precision: Precision
) -> None:
    """Set the coefficient for the update of ``step``, measuring the bare loss and the accuracy on ``batch``, that update's, where due."""
    if weight_decay is None:
        return
    if not weight_decay.due(step):
        weight_decay.set(step)
        return
    model.eval()
    with torch.no_grad():
        with autocast(precision, batch.images.device):
            logits = model(inputs(batch.images, precision))
        logits = logits if precision == "fp64" else logits.float()
        right = (logits.argmax(dim=1) == batch.labels).to(logits.dtype).mean()
        measured = torch.stack([cross_entropy(logits, batch.labels), right]) * (devices.processes * batch.share)
    model.train()
    loss, accuracy = devices.mean(measured).tolist()
    if math.isfinite(loss):  # a run that diverges ends with its epoch, and until then nothing is to be learned from it
        weight_decay.set(step, loss=loss, accuracy=accuracy)
