"""What a configuration is known to do badly, said before the run pays for it."""

from __future__ import annotations

import warnings

import timm.optim

from gradreg.train.configuration import Config
from gradreg.train.penalty import RecipePenalty


class HarmfulPenalty(UserWarning):
    """A penalty under circumstances in which it was found to hurt."""


def is_adaptive(optimizer: str) -> bool:
    """Whether the optimizer of timm's name divides its steps by a running magnitude of the gradient, or takes their sign.

    >>> [name for name in ("sgd", "adamw", "rmsprop", "lion", "nesterov") if is_adaptive(name)]
    ['adamw', 'rmsprop', 'lion']
    """
    if optimizer.startswith("torch."):
        return not optimizer.startswith(("torch.SGD", "torch.ASGD"))
    found = timm.optim.get_optimizer_info(optimizer)
    return (found.has_eps or found.has_betas) and not optimizer.startswith(("sgd", "lars", "nlars", "larc", "nlarc"))


def warn_of_harm(config: Config, penalty: RecipePenalty, *, steps_per_epoch: int) -> None:
    """Warn where an adaptive optimizer warms its learning rate up under a penalty that is whole from the first step.

    Source: Zhao et al. 2024, arXiv 2406.09723: there the penalty can cost accuracy, and a warm-up of its own mends it.
    """
    warming = config.schedule.warmup_epochs * steps_per_epoch
    if penalty.penalty is None or not warming or not is_adaptive(config.optimizer.name):
        return
    if penalty.penalty.strength_at(0) < penalty.penalty.strength_at(warming):
        return
    warnings.warn(
        f"{config.optimizer.name} with a learning-rate warm-up and a penalty that is whole from step 0 can train worse than without the "
        f"penalty (Zhao et al. 2024, arXiv 2406.09723). Give it a warm-up of its own: "
        f"--penalty.warmup '{{kind: zero, epochs: {config.schedule.warmup_epochs}}}'.",
        HarmfulPenalty,
        stacklevel=2,
    )
