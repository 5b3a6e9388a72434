"""Every key of a recipe: typed, documented, checked. ``gradreg train --help`` is made from these docstrings and those of the blocks.

A block is in the same file as what it builds: ``optimizer`` and ``schedule`` in ``optimization``, ``weight_decay`` and ``penalty`` in the
files of these names, ``data`` and ``augmentation`` in ``data.configuration``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from gradreg import checks, own_code
from gradreg.flooding import Flooding, IndividualFlooding, flooding_from_dict
from gradreg.train.data.configuration import AugmentationConfig, DataConfig
from gradreg.train.objective import Objective
from gradreg.train.optimization import OptimizerConfig, ScheduleConfig
from gradreg.train.penalty import PenaltyConfig, RecipePenalty
from gradreg.train.sharpness import SharpnessConfig
from gradreg.train.weight_decay import WeightDecayConfig


@dataclass
class CheckpointConfig:
    """When a run's state is written, so that an interrupted run resumes from it exactly.

    Args:
        every_epochs: epochs from one checkpoint to the next, >= 1; null writes none by epochs.
        every_minutes: minutes from one checkpoint to the next, > 0, also in the middle of an epoch; null writes none by the clock.
        keep: how many of the newest are kept, >= 1; if one is damaged, the run resumes from the one before it.
        final: whether one is written at the end of the run too, with the optimizer's state.
        best: whether the weights of the best epoch (by the metric on the validation images; without any, on the test set) are kept as
            best.safetensors.
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
        model: "name" and the model's own options, as timm.create_model takes them; or a function of your own that makes it, "mine:build".
        loss: a function of outputs and targets that returns the mean over a batch, by "name" ("mine:loss", or
            "torch.nn.functional:mse_loss") and its options; null is cross entropy.
        metric: what epochs are ranked and studies judge by: "name" ("mine:metric", a function of outputs and targets; or "loss"), "mode"
            (max or min), and optional "percent", "label", "finish" and the function's own options; null is accuracy.
        optimizer: the optimizer.
        schedule: the learning rate over the run.
        weight_decay: weight decay over the run; if left out, it is optimizer.weight_decay throughout.
        penalty: the gradient penalty by "name" (docs/pytorch.md lists them) and its symbols. Optional: "every", "probability",
            a "warmup" of "kind" (zero, radius, strength) and "epochs" or "steps", a "tail", the last share of the steps, in which alone
            it acts, "ascent_fraction", the share of each batch from which the ascent direction comes, and "m", how many samples share a
            perturbation (m-sharpness), and "held_out", the share of the training samples kept out of training to tell whether the
            penalty helps, which is off until there is overfitting to prevent and while it does not help; a radius "lets" is learned
            from them instead. null trains without one.
        flooding: keeps the training loss from falling below a level: "name" (batch, or individual for iFlood) and "level"; null does not.
            Each micro-batch of each process is flooded separately.
        scope: under data parallelism, whether each process perturbs by its own gradient (local) or all by their mean (global).
        epochs: passes over the training data, >= 1.
        batch_size: training examples of an optimizer step, over all processes and micro-batches, >= 1; a last smaller batch is kept.
        accumulation: micro-batches into which a process divides its part of a batch, to save memory, >= 1; all make one perturbation.
        evaluation_batch_size: examples evaluated at a time, >= 1; null takes 1000, and batch_size for data that are streamed.
        seed: seed of initialization, batch order, augmentation and dropout, >= 0.
        clip_norm: largest L2 norm of the final gradient, > 0; null does not clip.
        label_smoothing: share of the target spread over all classes, 0 to 1; in the training loss alone.
        ema: decay of an exponential moving average of the weights, which is evaluated too, > 0 and < 1; null keeps none.
        precision: "fp32", or autocast to "bf16" or "fp16" (with loss scaling) with fp32 weights; "fp64" for everything.
        compile: whether torch.compile compiles the model.
        channels_last: whether images and weights use the channels-last memory format, which is faster for convolutions on recent GPUs.
        parallel: with several processes, "ddp" replicates the model, "fsdp" (FSDP2) shards it.
        checkpoint: when the run's state is written.
        sharpness: whether and when the curvature of the training loss is measured.
        trackers: where metrics go besides metrics.jsonl: tensorboard, wandb, mlflow.
        threads: CPU threads of PyTorch, >= 1; null does not change them. Small models run fastest on one.
        device: "auto" takes the accelerator if there is one; or "cpu", "cuda", "cuda:1", "mps".
        code: written by gradreg: the files of functions of your own, with digests of their content.
    """

    data: DataConfig = field(default_factory=DataConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    model: dict[str, Any] = field(default_factory=lambda: {"name": "mlp"})
    loss: dict[str, Any] | None = None
    metric: dict[str, Any] | None = None
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
    sharpness: SharpnessConfig = field(default_factory=SharpnessConfig)
    trackers: list[Tracker] = field(default_factory=lambda: ["tensorboard"])
    threads: int | None = None
    device: str = "auto"
    code: dict[str, Any] | None = None

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
        self._penalty = PenaltyConfig.parse(self.penalty)
        self._check_m(self._penalty.described.m)
        self.flooded()
        self._check_own()

    def _check_m(self, m: int | None) -> None:
        if m is None:
            return
        if self.accumulation > 1:
            raise ValueError(
                f"accumulation must be 1 with penalty.m, which divides a batch by itself; got {self.accumulation} with m {m}. Leave it out."
            )
        if self.scope == "global":
            raise ValueError(f"scope must be local with penalty.m, by which groups are perturbed each by itself; got global with m {m}.")

    def _check_own(self) -> None:
        """Import the functions of one's own, and raise for what does not fit them, and for what they make meaningless."""
        if self.data.options and not self.data.is_own:
            raise ValueError(checks.unknown("key in data", next(iter(self.data.options)), list(vars(self.data))))
        self.code = own_code.located(own_names(vars(self)), recorded=self.code)
        self.objective.check()
        if self.data.is_own:
            from gradreg.train.data import samples

            samples.check(self.data, self.code)
            if self.augmentation != AugmentationConfig():
                different = next(key for key, value in vars(AugmentationConfig()).items() if getattr(self.augmentation, key) != value)
                raise ValueError(
                    f"augmentation.{different} must be left out for {self.data.name!r}, which makes its samples itself; got "
                    f"{getattr(self.augmentation, different)!r}. Augment in its __getitem__."
                )
        if own_code.is_own(self.model["name"]):
            from gradreg.train.models import own

            own.check(self.model, self.code)
        learned = self._penalty.described.learned
        if self.flooding is not None and learned is not None:
            raise ValueError(
                f"flooding must be null with {learned}, a radius that is learned from the gap between held-out and training loss, which a "
                f"flooded one would change; got {self.flooding}. Use the radius auto, or leave flooding out."
            )
        if self.loss is not None and self.label_smoothing:
            raise ValueError(f"label_smoothing must be 0 with a loss of your own, which may smooth by itself; got {self.label_smoothing}.")
        if self.loss is not None and isinstance(self.flooded(), IndividualFlooding):
            raise ValueError("flooding must be 'batch' with a loss of your own, which returns one number for a batch; got 'individual'.")
        other = "data set" if self.data.is_own else "loss" if self.loss is not None else None
        if other is not None and self.weight_decay.schedule == "auto" and self.weight_decay.trigger != "loss":
            raise ValueError(
                f"weight_decay.trigger must be 'loss' with a {other} of your own, which need not have an accuracy; got "
                f"{self.weight_decay.trigger!r}."
            )
        if other is not None and self.weight_decay.convention == "authors":
            raise ValueError(
                f"weight_decay.convention must be 'torch' with a {other} of your own, which need not have classes; got 'authors'."
            )

    @cached_property
    def objective(self) -> Objective:
        """The loss and the metric."""
        return Objective(self.loss, self.metric, self.label_smoothing, self.code)

    def steps_per_epoch(self, images: int | None = None) -> int:
        """Optimizer steps in an epoch.

        Args:
            images: training images, with those that a penalty keeps out, where they have been loaded; None takes the number that
                ``data`` names, counting a folder's files.

        Raises:
            ValueError: ``images`` is None for data that are not counted before they are loaded.
        """
        if images is None and self.data.is_own:
            from gradreg.train.data import samples

            images = samples.training_samples(self.data, self.code, seed=self.seed)
        if images is None:
            images = self.data.training_images()
        return math.ceil((images - self._penalty.described.kept_out(images)) / self.batch_size)

    def resolved_penalty(self, steps_per_epoch: int | None = None) -> RecipePenalty:
        """The penalty that ``penalty`` describes, for epochs of ``steps_per_epoch`` steps (None: as many as ``steps_per_epoch()``).

        Raises:
            ValueError: a warm-up or a tail leaves no step of the run at which it acts.
        """
        if steps_per_epoch is None and not self._penalty.counts_steps:
            return self._penalty.described
        return self._penalty.resolve(steps_per_epoch=steps_per_epoch or self.steps_per_epoch(), epochs=self.epochs)

    @property
    def described_penalty(self) -> RecipePenalty:
        """The penalty as far as it is known before the data, and with them the steps of an epoch, are."""
        return self._penalty.described

    def with_seed(self, seed: int) -> Config:
        """The same run with another seed. No other key depends on it, so nothing is parsed or checked again."""
        other = copy.copy(self)
        other.seed = checks.seed(seed)
        return other

    def flooded(self) -> Flooding | IndividualFlooding | None:
        """The transformation of the loss that ``flooding`` describes."""
        if self.flooding is None:
            return None
        if not isinstance(self.flooding.get("name"), str):
            raise ValueError(
                f"flooding must have a name, batch or individual; got {self.flooding}. Write {{name: batch, level: 0.1}}, say."
            )
        return flooding_from_dict({"flooding" if key == "name" else key: value for key, value in self.flooding.items()})


def own_names(blocks: Mapping[str, Any]) -> list[str]:
    """The functions of one's own that the blocks of a configuration name."""
    data: DataConfig = blocks["data"]
    named = [blocks["model"].get("name"), data.name, data.collate]
    for block in (blocks["loss"], blocks["metric"]):
        named += [] if block is None else [block.get("name"), block.get("finish")]
    return [name for name in named if own_code.is_own(name)]
