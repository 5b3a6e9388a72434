"""Every key of a recipe: typed, documented, checked. What stands here is what ``gradreg train --help`` explains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gradreg import checks
from gradreg.penalties import GradientPenalty


@dataclass
class DataConfig:
    """The data and how they are split.

    Args:
        name: data set; "digits" is scikit-learn's: 1,797 real images of handwritten digits, 8 x 8 pixels, 10 classes.
        train_size: training images, drawn at random; the rest is the test set.
        label_noise: share of the training labels replaced by a class drawn at random (which may be the true one), 0 to 1.
        split_seed: seed of the split and of the label noise; null takes the run's seed, so that every seed has its own.
    """

    name: str = "digits"
    train_size: int = 1000
    label_noise: float = 0.0
    split_seed: int | None = None

    def __post_init__(self) -> None:
        checks.whole("data.train_size", self.train_size, minimum=1)
        if checks.non_negative("data.label_noise", self.label_noise) > 1:
            raise ValueError(f"data.label_noise must be between 0 and 1; got {self.label_noise}. It is a share, not a percentage.")
        if self.split_seed is not None:
            checks.whole("data.split_seed", self.split_seed, minimum=0)


@dataclass
class OptimizerConfig:
    """The optimizer, by timm's factory.

    Args:
        name: "sgd", "adamw" or any other name of timm.optim.list_optimizers().
        lr: learning rate at its peak, > 0.
        momentum: momentum of SGD-like optimizers, 0 to 1.
        nesterov: Nesterov's form of SGD's momentum.
        weight_decay: weight decay as the optimizer understands it (in the gradient for SGD, decoupled for AdamW), >= 0.
        decay_biases_and_norms: whether weight decay applies to biases and normalization layers too.
        options: further keyword arguments of the optimizer.
    """

    name: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    decay_biases_and_norms: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.positive("optimizer.lr", self.lr)
        checks.non_negative("optimizer.momentum", self.momentum)
        checks.non_negative("optimizer.weight_decay", self.weight_decay)


@dataclass
class ScheduleConfig:
    """The learning rate over the run, by timm's schedulers, updated every optimizer step.

    Args:
        name: "cosine" falls to min_lr at the end of the run, "step" multiplies by decay_rate at decay_epochs, "constant" stays.
        warmup_epochs: epochs of linear warm-up from 0 to lr, >= 0; they are part of the run.
        min_lr: the lowest learning rate, >= 0.
        decay_epochs: epochs at which "step" decays.
        decay_rate: factor of each decay of "step", > 0.
    """

    name: Literal["constant", "cosine", "step"] = "cosine"
    warmup_epochs: int = 0
    min_lr: float = 0.0
    decay_epochs: list[int] = field(default_factory=list)
    decay_rate: float = 0.1

    def __post_init__(self) -> None:
        checks.whole("schedule.warmup_epochs", self.warmup_epochs, minimum=0)
        checks.non_negative("schedule.min_lr", self.min_lr)
        checks.positive("schedule.decay_rate", self.decay_rate)
        for epoch in self.decay_epochs:
            checks.whole("schedule.decay_epochs", epoch, minimum=1)
        if self.name == "step" and not self.decay_epochs:
            raise ValueError("schedule.decay_epochs must name at least one epoch for schedule 'step'; got none. Write [60, 120, 160], say.")


@dataclass
class Config:
    """One training run.

    Args:
        data: the data and how they are split.
        model: "name" and the model's own options, as timm.create_model takes them.
        optimizer: the optimizer.
        schedule: the learning rate over the run.
        penalty: the gradient penalty by "name" (sam, gnp, fgr, bgr, cgr, exact) and its symbols, with an optional "warmup" of "kind" (zero,
            radius, strength) and "steps"; null trains without one.
        epochs: passes over the training data, >= 1.
        batch_size: training examples a step, >= 1; a last smaller batch is kept.
        seed: seed of initialization, batch order and dropout, >= 0.
        clip_norm: largest L2 norm of the final gradient, > 0; null does not clip.
        label_smoothing: share of the target spread over all classes, 0 to 1; in the training loss alone.
        threads: CPU threads of PyTorch, >= 1; null leaves them as they are. Small models run fastest on one.
        device: "auto" takes the accelerator if there is one; or "cpu", "cuda", "cuda:1", "mps".
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = field(default_factory=lambda: {"name": "mlp"})
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    penalty: dict[str, Any] | None = None
    epochs: int = 60
    batch_size: int = 100
    seed: int = 0
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    threads: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        checks.whole("epochs", self.epochs, minimum=1)
        checks.whole("batch_size", self.batch_size, minimum=1)
        checks.whole("seed", self.seed, minimum=0)
        if self.threads is not None:
            checks.whole("threads", self.threads, minimum=1)
        if self.clip_norm is not None:
            checks.positive("clip_norm", self.clip_norm, remedy="Use null for no clipping.")
        if not 0 <= checks.non_negative("label_smoothing", self.label_smoothing) <= 1:
            raise ValueError(f"label_smoothing must be between 0 and 1; got {self.label_smoothing}.")
        if not isinstance(self.model.get("name"), str):
            raise ValueError(f"model must have a name; got {checks.describe(self.model)}. Write {{name: mlp, hidden: [256, 256]}}, say.")
        if self.schedule.warmup_epochs >= self.epochs and self.schedule.warmup_epochs > 0:
            raise ValueError(
                f"schedule.warmup_epochs must be < epochs; got {self.schedule.warmup_epochs} of {self.epochs}. "
                "Train longer or warm up less."
            )
        self.gradient_penalty()

    def gradient_penalty(self) -> GradientPenalty | None:
        """The penalty that ``penalty`` describes."""
        return None if self.penalty is None else GradientPenalty.from_dict(self.penalty)
