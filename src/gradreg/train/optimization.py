"""Optimizers and learning-rate schedules: timm's, chosen by the configuration."""

from __future__ import annotations

import inspect
from typing import Any

import timm.optim
import timm.scheduler
import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from gradreg import checks
from gradreg.train.configuration import OptimizerConfig, ScheduleConfig

_TORCH = "torch."
_WITHOUT_STEP = ("Optimizer", "LBFGS", "SparseAdam")
"""Of torch.optim, what is no optimizer for a loop that hands gradients over: one wants a closure, one sparse gradients."""


def create_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer over the model's trainable parameters.

    Raises:
        ValueError: an unknown name (the nearest known one is named), or options that the optimizer refuses.
    """
    names = [str(name) for name in timm.optim.list_optimizers()]
    if config.name.startswith(_TORCH):
        return _of_torch(model, config)
    if config.name not in names:
        raise ValueError(checks.unknown("optimizer", config.name, names))
    # In timm's naming "sgd" means Nesterov's form; here it is what the key ``nesterov`` says.
    options = {"nesterov": config.nesterov, **config.options} if config.name == "sgd" else dict(config.options)
    if config.nesterov and config.name != "sgd":
        raise ValueError(f"optimizer.nesterov must be false for {config.name!r}; got true. Only 'sgd' knows it.")
    known = timm.optim.get_optimizer_info(config.name)
    for option, takes in (("betas", known.has_betas), ("eps", known.has_eps)):
        if option in options and not takes:  # timm would drop it
            raise ValueError(f"optimizer.options.{option} must be left out for {config.name!r}, which has none; got {options[option]}.")
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


def _of_torch(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """An optimizer of ``torch.optim`` by its class name; momentum is given to those that have it."""
    known = {name: cls for name, cls in vars(torch.optim).items() if isinstance(cls, type) and issubclass(cls, Optimizer)}
    known = {name: cls for name, cls in known.items() if name not in _WITHOUT_STEP}
    name = config.name.removeprefix(_TORCH)
    if name not in known:
        raise ValueError(checks.unknown("optimizer", config.name, [f"{_TORCH}{name}" for name in known]))
    accepted = inspect.signature(known[name]).parameters
    common = {"lr": config.lr, "momentum": config.momentum, "nesterov": config.nesterov, "weight_decay": config.weight_decay}
    if config.nesterov and "nesterov" not in accepted:
        raise ValueError(f"optimizer.nesterov must be false for {config.name!r}, which does not know it; got true.")
    if config.weight_decay and "weight_decay" not in accepted:
        raise ValueError(f"optimizer.weight_decay must be 0 for {config.name!r}, which has none; got {config.weight_decay:g}.")
    options = {**{key: value for key, value in common.items() if key in accepted}, **config.options}
    spared = config.weight_decay > 0 and not config.decay_biases_and_norms
    weights: Any = timm.optim.param_groups_weight_decay(model, config.weight_decay) if spared else model.parameters()
    try:
        return known[name](weights, **options)
    except TypeError as error:
        raise ValueError(f"optimizer {config.name!r} refuses its options {config.options or 'none'}: {error}") from error


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
