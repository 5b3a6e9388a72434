"""Every key of a recipe: typed, documented, checked. What stands here is what ``gradreg train --help`` explains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gradreg import checks
from gradreg.flooding import Flooding, IndividualFlooding, flooding_from_dict
from gradreg.train.data.configuration import AugmentationConfig, DataConfig
from gradreg.train.penalty import recipe_penalty
from gradreg.weight_decay import AutoL2, Trigger


@dataclass
class OptimizerConfig:
    """The optimizer, by timm's factory.

    Args:
        name: "sgd", "adamw" or any other name of timm.optim.list_optimizers(); or "torch." and a class of torch.optim, as in "torch.ASGD".
        lr: learning rate at its peak, > 0.
        momentum: momentum of SGD-like optimizers, >= 0 and < 1.
        nesterov: Nesterov's form of SGD's momentum.
        weight_decay: weight decay as the optimizer understands it (in the gradient for SGD, decoupled for AdamW), >= 0.
        decay_biases_and_norms: whether weight decay applies to biases and normalization layers too.
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


@dataclass
class WeightDecayConfig:
    """Weight decay over the run: how the coefficient changes with the steps, and which weights it spares.

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
        minimum: the coefficient of "auto" never falls below, >= 0.
        smoothing: share of the old value in the running mean of auto's measurements, >= 0 and < 1.
        convention: "authors" runs "auto" on the coefficient of its authors, whose loss is averaged over the classes: the weight decay is
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


@dataclass
class CheckpointConfig:
    """When a run's state is written, from which it goes on after an interruption as if there had been none.

    Args:
        every_epochs: epochs from one checkpoint to the next, >= 1; null writes none by epochs.
        every_minutes: minutes from one checkpoint to the next, > 0, also in the middle of an epoch; null writes none by the clock.
        keep: how many of the newest are kept, >= 1; a damaged one is passed over for the one before it.
        final: whether the end of the run is one too, with the optimizer's state.
        best: whether the weights of the best epoch (on the validation images; without any, on the test set) are kept as best.safetensors.
    """

    every_epochs: int | None = None
    every_minutes: float | None = 10.0
    keep: int = 2
    final: bool = True
    best: bool = True

    def __post_init__(self) -> None:
        if self.every_epochs is not None:
            checks.whole("checkpoint.every_epochs", self.every_epochs, minimum=1, remedy="Use null for none.")
        if self.every_minutes is not None:
            checks.positive("checkpoint.every_minutes", self.every_minutes, remedy="Use null for none.")
        checks.whole("checkpoint.keep", self.keep, minimum=1)


Precision = Literal["fp32", "fp64", "bf16", "fp16"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]


@dataclass
class Config:
    """One training run.

    Args:
        data: the data and how they are split.
        augmentation: what is done to the images.
        model: "name" and the model's own options, as timm.create_model takes them.
        optimizer: the optimizer.
        schedule: the learning rate over the run.
        weight_decay: weight decay over the run; left out, it is constantly optimizer.weight_decay.
        penalty: the gradient penalty by "name" (docs/pytorch.md lists them) and its symbols. Optional beside them: "every", "probability",
            a "warmup" of "kind" (zero, radius, strength) and "epochs" or "steps", and "ascent_fraction", the share of each batch from which
            the ascent direction comes. null trains without one.
        flooding: keeps the training loss from falling below a level: "name" (batch, or individual for iFlood) and "level"; null does not.
            Each micro-batch of each process is flooded for itself.
        scope: under data parallelism, whether each process perturbs by its own gradient (local) or all by their mean (global).
        epochs: passes over the training data, >= 1.
        batch_size: training examples of an optimizer step, over all processes and micro-batches, >= 1; a last smaller batch is kept.
        accumulation: micro-batches into which a process divides its part of a batch, to save memory, >= 1; all make one perturbation.
        evaluation_batch_size: examples evaluated at a time, >= 1; null takes 1000, and batch_size for data that are streamed.
        seed: seed of initialization, batch order, augmentation and dropout, >= 0.
        clip_norm: largest L2 norm of the final gradient, > 0; null does not clip.
        label_smoothing: share of the target spread over all classes, 0 to 1; in the training loss alone.
        ema: decay of a running mean of the weights, which is evaluated beside them, > 0 and < 1; null keeps none.
        precision: "fp32", or autocast to "bf16" or "fp16" (with loss scaling), the weights staying fp32; "fp64" for weights and all.
        compile: whether torch.compile compiles the model.
        channels_last: whether images and weights are laid out channels last, as convolutions on recent GPUs prefer.
        parallel: under several processes, "ddp" holds the whole model on each, "fsdp" (FSDP2) a part of it.
        checkpoint: when the run's state is written.
        trackers: where metrics go beside metrics.jsonl: tensorboard, wandb, mlflow.
        threads: CPU threads of PyTorch, >= 1; null leaves them as they are. Small models run fastest on one.
        device: "auto" takes the accelerator if there is one; or "cpu", "cuda", "cuda:1", "mps".
    """

    data: DataConfig = field(default_factory=DataConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    model: dict[str, Any] = field(default_factory=lambda: {"name": "mlp"})
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    weight_decay: WeightDecayConfig = field(default_factory=WeightDecayConfig)
    penalty: dict[str, Any] | None = None
    flooding: dict[str, Any] | None = None
    scope: Literal["local", "global"] = "local"
    epochs: int = 60
    batch_size: int = 100
    accumulation: int = 1
    evaluation_batch_size: int | None = None
    seed: int = 0
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    ema: float | None = None
    precision: Precision = "fp32"
    compile: bool = False
    channels_last: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    trackers: list[Tracker] = field(default_factory=lambda: ["tensorboard"])
    threads: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        checks.whole("epochs", self.epochs, minimum=1)
        checks.whole("batch_size", self.batch_size, minimum=1)
        checks.whole("accumulation", self.accumulation, minimum=1)
        if self.accumulation > self.batch_size:
            raise ValueError(
                f"accumulation must be <= batch_size, {self.batch_size}; got {self.accumulation}. A micro-batch has one example."
            )
        if self.evaluation_batch_size is not None:
            checks.whole("evaluation_batch_size", self.evaluation_batch_size, minimum=1)
        checks.seed(self.seed)
        if self.threads is not None:
            checks.whole("threads", self.threads, minimum=1)
        if self.clip_norm is not None:
            checks.positive("clip_norm", self.clip_norm, remedy="Use null for no clipping.")
        if not 0 <= checks.non_negative("label_smoothing", self.label_smoothing) <= 1:
            raise ValueError(f"label_smoothing must be between 0 and 1; got {self.label_smoothing}.")
        if self.ema is not None and not checks.positive("ema", self.ema, remedy="Use null for none.") < 1:
            raise ValueError(f"ema must be < 1, the share of the old mean that a step keeps; got {self.ema}. Write 0.999, say.")
        if not isinstance(self.model.get("name"), str):
            raise ValueError(f"model must have a name; got {checks.describe(self.model)}. Write {{name: mlp, hidden: [256, 256]}}, say.")
        if self.schedule.warmup_epochs >= self.epochs and self.schedule.warmup_epochs > 0:
            raise ValueError(
                f"schedule.warmup_epochs must be < epochs; got {self.schedule.warmup_epochs} of {self.epochs}. "
                "Train longer or warm up less."
            )
        decay = self.weight_decay
        if decay.start is None and decay.schedule == "auto" and self.optimizer.weight_decay > 0:
            raise ValueError(
                f"optimizer.weight_decay must be 0 with weight_decay.schedule 'auto', which sets it; got {self.optimizer.weight_decay}. "
                "Remove it, or give weight_decay.start to say where to start."
            )
        if decay.schedule not in ("constant", "auto") and not (self.optimizer.weight_decay if decay.start is None else decay.start):
            raise ValueError(
                f"weight_decay.start must be > 0 for schedule {decay.schedule!r}; got {decay.start} and optimizer.weight_decay 0. "
                "Give one of the two."
            )
        recipe_penalty(self.penalty, steps_per_epoch=1)
        self.flooded()

    def flooded(self) -> Flooding | IndividualFlooding | None:
        """The transformation of the loss that ``flooding`` describes."""
        if self.flooding is None:
            return None
        if not isinstance(self.flooding.get("name"), str):
            raise ValueError(
                f"flooding must have a name, batch or individual; got {self.flooding}. Write {{name: batch, level: 0.1}}, say."
            )
        return flooding_from_dict({"flooding" if key == "name" else key: value for key, value in self.flooding.items()})
