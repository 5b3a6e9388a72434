"""Optimizers and learning-rate schedules: timm's, chosen by the configuration."""

from __future__ import annotations

import timm.optim
import timm.scheduler
import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from gradreg import checks
from gradreg.train.configuration import OptimizerConfig, ScheduleConfig


def create_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer over the model's trainable parameters.

    Raises:
        ValueError: an unknown name (the nearest known one is named), or options that the optimizer refuses.
    """
    names = [str(name) for name in timm.optim.list_optimizers()]
    if config.name not in names:
        raise ValueError(checks.unknown("optimizer", config.name, names))
    # In timm's naming "sgd" means Nesterov's form; here it is what the key ``nesterov`` says.
    options = {"nesterov": config.nesterov, **config.options} if config.name == "sgd" else dict(config.options)
    if config.nesterov and config.name != "sgd":
        raise ValueError(f"optimizer.nesterov must be false for {config.name!r}; got true. Only 'sgd' knows it.")
    try:
        return timm.optim.create_optimizer_v2(
            model,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            filter_bias_and_bn=not config.decay_biases_and_norms,
            **options,
        )
    except TypeError as error:
        raise ValueError(f"optimizer {config.name!r} refuses its options {options or 'none'}: {error}") from error


def create_schedule(optimizer: Optimizer, config: ScheduleConfig, *, epochs: int, steps_per_epoch: int) -> Scheduler | None:
    """The schedule, to be told the number of optimizer steps done (``step_update``) after each; None for "constant" without warm-up.

    timm decays one optimizer step before the epoch named in ``decay_epochs`` ends.

    Raises:
        ValueError: options that timm refuses.
    """
    if config.name == "constant" and config.warmup_epochs == 0 and not config.options:
        return None
    try:
        schedule, _ = timm.scheduler.create_scheduler_v2(
            optimizer,
            sched="multistep" if config.name == "step" else config.name,
            num_epochs=epochs,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=0.0,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
            min_lr=config.min_lr,
            decay_milestones=config.decay_epochs,
            decay_rate=config.decay_rate,
            **config.options,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"schedule {config.name!r} refuses its options {config.options or 'none'}: {error}") from error
    return schedule


def squared_norm(model: nn.Module) -> Tensor:
    """‖θ‖² over all trainable parameters, whole ones even where each process holds a part; differentiable."""
    squares = [p.square().sum() for p in model.parameters() if p.requires_grad]
    return torch.stack([s.full_tensor() if isinstance(s, DTensor) else s for s in squares]).sum()
