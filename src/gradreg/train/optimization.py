"""The keys ``optimizer`` and ``schedule`` of a recipe, and what they build: optimizers and learning-rate schedules of timm and PyTorch.

The simplest ones (SGD, Adam and AdamW without options, and a cosine) are built without timm, whose import takes several times as long as a
small run. Their numbers are the same as timm's.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gradreg import checks
from gradreg.penalties import GradientPenalty

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

_TORCH = "torch."
_WITHOUT_STEP = ("Optimizer", "LBFGS", "SparseAdam")
"""Optimizers of torch.optim that cannot be used with given dense gradients: one needs a closure, one sparse gradients."""

_PLAIN = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
"""timm's names for optimizers that are PyTorch's -> their classes."""


@dataclass
class OptimizerConfig:
    """The optimizer, by timm's factory.

    Args:
        name: "sgd", "adamw" or any other name of timm.optim.list_optimizers(); or "torch." and a class of torch.optim, as in "torch.ASGD".
        lr: learning rate at its peak, > 0.
        momentum: momentum of SGD-like optimizers, >= 0 and < 1.
        nesterov: Nesterov's form of SGD's momentum.
        weight_decay: weight decay as the optimizer understands it (in the gradient for SGD, decoupled for AdamW), >= 0.
        decay_biases_and_norms: whether weight decay also applies to biases and normalization layers.
        l2_in_loss: coefficient λ of (λ/2)·‖θ‖² over all parameters in the loss itself, >= 0. Unlike weight_decay it enters the ascent
            direction and both gradients of a penalty, as in the code of Zhao et al. 2022.
        options: further keyword arguments of the optimizer.
    """

    name: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    decay_biases_and_norms: bool = True
    l2_in_loss: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.positive("optimizer.lr", self.lr)
        checks.non_negative("optimizer.l2_in_loss", self.l2_in_loss)
        checks.fraction("optimizer.momentum", self.momentum)
        checks.non_negative("optimizer.weight_decay", self.weight_decay)

    def build(self, model: nn.Module) -> Optimizer:
        """The optimizer over the model's trainable parameters.

        Raises:
            ValueError: an unknown name (the nearest known one is named), or options that the optimizer does not take.
        """
        if self.nesterov and self.name != "sgd" and not self.name.startswith(_TORCH):
            self._check_name()
            raise ValueError(f"optimizer.nesterov must be false for {self.name!r}; got true. Only 'sgd' knows it.")
        if self.name in _PLAIN and not self.weight_decay and not self.options:
            momentum: dict[str, Any] = {"momentum": self.momentum, "nesterov": self.nesterov} if self.name == "sgd" else {}
            weights = [p for p in model.parameters() if p.requires_grad]
            return _uncompiled(_PLAIN[self.name])(weights, lr=self.lr, weight_decay=0.0, **momentum)
        return self._of_torch(model) if self.name.startswith(_TORCH) else self._of_timm(model)

    def _of_timm(self, model: nn.Module) -> Optimizer:
        import timm.optim

        self._check_name()
        # timm's "sgd" means Nesterov's form; here the key ``nesterov`` decides.
        options = {"nesterov": self.nesterov, **self.options} if self.name == "sgd" else dict(self.options)
        known = timm.optim.get_optimizer_info(self.name)
        for option, takes in (("betas", known.has_betas), ("eps", known.has_eps)):
            if option in options and not takes:  # timm would silently drop it
                raise ValueError(f"optimizer.options.{option} must be left out for {self.name!r}, which has none; got {options[option]}.")
        try:
            return timm.optim.create_optimizer_v2(
                model,
                opt=self.name,
                lr=self.lr,
                weight_decay=self.weight_decay,
                momentum=self.momentum,
                filter_bias_and_bn=not self.decay_biases_and_norms,
                **options,
            )
        except TypeError as error:
            raise ValueError(f"optimizer {self.name!r} does not accept its options {options or 'none'}: {error}") from error

    def _check_name(self) -> None:
        import timm.optim

        names = [str(name) for name in timm.optim.list_optimizers()]
        if self.name not in names:
            raise ValueError(checks.unknown("optimizer", self.name, names))

    def _of_torch(self, model: nn.Module) -> Optimizer:
        """An optimizer of ``torch.optim`` by its class name; momentum is given to those that have it."""
        import torch
        from torch.optim import Optimizer

        known = {name: cls for name, cls in vars(torch.optim).items() if isinstance(cls, type) and issubclass(cls, Optimizer)}
        known = {name: cls for name, cls in known.items() if name not in _WITHOUT_STEP}
        name = self.name.removeprefix(_TORCH)
        if name not in known:
            raise ValueError(checks.unknown("optimizer", self.name, [f"{_TORCH}{name}" for name in known]))
        accepted = inspect.signature(known[name]).parameters
        common = {"lr": self.lr, "momentum": self.momentum, "nesterov": self.nesterov, "weight_decay": self.weight_decay}
        if self.nesterov and "nesterov" not in accepted:
            raise ValueError(f"optimizer.nesterov must be false for {self.name!r}, which does not know it; got true.")
        if self.weight_decay and "weight_decay" not in accepted:
            raise ValueError(f"optimizer.weight_decay must be 0 for {self.name!r}, which has none; got {self.weight_decay:g}.")
        options = {**{key: value for key, value in common.items() if key in accepted}, **self.options}
        weights: Any = model.parameters()
        spared = self.weight_decay > 0 and not self.decay_biases_and_norms
        if spared:
            import timm.optim

            weights = timm.optim.param_groups_weight_decay(model, self.weight_decay)
        try:
            return known[name](weights, **options)
        except TypeError as error:
            raise ValueError(f"optimizer {self.name!r} does not accept its options {self.options or 'none'}: {error}") from error

    @property
    def adaptive(self) -> bool:
        """Whether the optimizer divides its steps by a running magnitude of the gradient, or takes their sign.

        >>> [name for name in ("sgd", "adamw", "rmsprop", "lion", "nesterov") if OptimizerConfig(name).adaptive]
        ['adamw', 'rmsprop', 'lion']
        """
        if self.name.startswith(_TORCH):
            return not self.name.startswith(("torch.SGD", "torch.ASGD"))
        import timm.optim

        found = timm.optim.get_optimizer_info(self.name)
        return (found.has_eps or found.has_betas) and not self.name.startswith(("sgd", "lars", "nlars", "larc", "nlarc"))


@cache
def _uncompiled(name: str) -> Callable[..., Optimizer]:
    """The class of ``torch.optim`` without its ``torch.compile`` guard: that imports the compiler, which takes as long as importing
    PyTorch, and no optimizer is compiled here.
    """
    import torch

    of_torch: Any = getattr(torch.optim, name)

    def step(self: Any, closure: Any = None) -> Any:
        with torch.no_grad():
            return inspect.unwrap(of_torch.step)(self, closure)

    guarded = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {method: inspect.unwrap(getattr(of_torch, method)) for method in guarded}
    return type(name, (of_torch,), {**methods, "step": step, "__module__": __name__, "__doc__": of_torch.__doc__})


class LearningRate(Protocol):
    """A schedule of the learning rate, updated with the number of steps done after each optimizer step."""

    def step_update(self, num_updates: int) -> object:
        """Set the learning rate of the step after ``num_updates``."""
        ...


@dataclass
class ScheduleConfig:
    """The learning rate over the run, by timm's schedulers, updated every optimizer step.

    Args:
        name: "cosine" and "tanh" fall to min_lr at the end of the run; "poly" falls as (1 - progress) to the power decay_rate (1 is a
            straight line); "step" multiplies by decay_rate at decay_epochs; "wsd" and "rsqrt" stay, or fall as 1 / sqrt(step), and decay
            at the end; "constant" stays. timm's "plateau", which timm deprecates, is left out: it cannot be resumed exactly.
        warmup_epochs: epochs of linear warm-up from 0 to lr, >= 0; they are part of the run.
        min_lr: the lowest learning rate, >= 0.
        decay_epochs: epochs at which "step" decays.
        decay_rate: factor of each decay of "step", power of "poly", > 0.
        options: further keyword arguments of timm.scheduler.create_scheduler_v2, such as k_decay or cycle_limit.
    """

    name: Literal["constant", "cosine", "tanh", "poly", "step", "wsd", "rsqrt"] = "cosine"
    warmup_epochs: int = 0
    min_lr: float = 0.0
    decay_epochs: list[int] = field(default_factory=list)
    decay_rate: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.whole("schedule.warmup_epochs", self.warmup_epochs, minimum=0)
        checks.non_negative("schedule.min_lr", self.min_lr)
        checks.positive("schedule.decay_rate", self.decay_rate)
        for epoch in self.decay_epochs:
            checks.whole("schedule.decay_epochs", epoch, minimum=1)
        if self.name == "step" and not self.decay_epochs:
            raise ValueError("schedule.decay_epochs must name at least one epoch for schedule 'step'; got none. Write [60, 120, 160], say.")
        if self.name != "step" and self.decay_epochs:
            raise ValueError(
                f"schedule.decay_epochs must be empty for schedule {self.name!r}, which has none; got {self.decay_epochs}. "
                "Remove it, or use name: step."
            )

    def build(self, optimizer: Optimizer, *, epochs: int, steps_per_epoch: int) -> LearningRate | None:
        """The schedule; None for "constant" without warm-up.

        timm decays one optimizer step before the epoch named in ``decay_epochs`` ends.

        Raises:
            ValueError: options that timm does not take.
        """
        if self.name == "constant" and self.warmup_epochs == 0 and not self.options:
            return None
        if self.name == "cosine" and not self.options:
            return Cosine(optimizer, steps=epochs * steps_per_epoch, warmup=self.warmup_epochs * steps_per_epoch, end=self.min_lr)
        import timm.scheduler

        try:
            schedule, _ = timm.scheduler.create_scheduler_v2(
                optimizer,
                sched="multistep" if self.name == "step" else self.name,
                num_epochs=epochs,
                warmup_epochs=self.warmup_epochs,
                warmup_lr=0.0,
                step_on_epochs=False,
                updates_per_epoch=steps_per_epoch,
                min_lr=self.min_lr,
                decay_milestones=self.decay_epochs,
                decay_rate=self.decay_rate,
                **self.options,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"schedule {self.name!r} does not accept its options {self.options or 'none'}: {error}") from error
        return schedule


class Cosine:
    """timm's ``CosineLRScheduler`` for one cycle, updated every optimizer step: the same numbers, without timm.

    Args:
        optimizer: its groups' learning rates are the peak, and are set to the first step's.
        steps: optimizer steps of the run, ≥ 1, including the warm-up.
        warmup: steps of a linear warm-up from 0, ≥ 0.
        end: the learning rate after the last step.
    """

    def __init__(self, optimizer: Optimizer, *, steps: int, warmup: int, end: float) -> None:
        self._optimizer, self._steps, self._warmup, self._end = optimizer, steps, warmup, end
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._peaks = [group["initial_lr"] for group in optimizer.param_groups]
        self._set([0.0] * len(self._peaks) if warmup else self._peaks)

    def step_update(self, num_updates: int) -> None:
        """Set the learning rate of the step after ``num_updates``."""
        if num_updates < self._warmup:
            self._set([num_updates * (peak / self._warmup) for peak in self._peaks])
        elif num_updates < self._steps:
            fall = 1 + math.cos(math.pi * num_updates / self._steps)
            self._set([self._end + 0.5 * (peak - self._end) * fall for peak in self._peaks])
        else:
            self._set([self._end] * len(self._peaks))

    def _set(self, rates: list[float]) -> None:
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * group.get("lr_scale", 1.0)


class HarmfulPenalty(UserWarning):
    """A penalty in a setting in which it was found to hurt."""


def warn_of_harm(optimizer: OptimizerConfig, schedule: ScheduleConfig, penalty: GradientPenalty | None, *, steps_per_epoch: int) -> None:
    """Warn if an adaptive optimizer with a learning-rate warm-up has a penalty at full strength from the first step.

    Source: Zhao et al. 2024, arXiv 2406.09723: there the penalty can cost accuracy, and warming it up too prevents that.
    """
    warming = schedule.warmup_epochs * steps_per_epoch
    if penalty is None or not warming or not optimizer.adaptive:
        return
    if penalty.nominal_at(0).strength < penalty.nominal_at(warming).strength:
        return
    warnings.warn(
        f"{optimizer.name} with a learning-rate warm-up and a penalty that is whole from step 0 can train worse than without the "
        f"penalty (Zhao et al. 2024, arXiv 2406.09723). Give it a warm-up of its own: "
        f"--penalty.warmup '{{kind: zero, epochs: {schedule.warmup_epochs}}}'.",
        HarmfulPenalty,
        stacklevel=2,
    )


def squared_norm(model: nn.Module) -> Tensor:
    """‖θ‖² over all trainable parameters, also of a sharded model; differentiable."""
    import torch

    squares: list[Any] = [p.square().sum() for p in model.parameters() if p.requires_grad]
    # Parameters that FSDP shards are DTensors, a class that takes a second to import.
    return torch.stack([s.full_tensor() if hasattr(s, "full_tensor") else s for s in squares]).sum()
