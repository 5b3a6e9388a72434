"""The one training loop, for all methods: it gives the regularizer a closure, and the penalty decides where that is evaluated."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gradreg.flooding import Flooding, IndividualFlooding
from gradreg.torch import GradientRegularizer
from gradreg.train import models
from gradreg.train.checkpoints.policy import Saver
from gradreg.train.checkpoints.save_and_load import TrainingState, unwrapped
from gradreg.train.configuration import Config
from gradreg.train.data import loader
from gradreg.train.data.loader import AnyBatch, Data, EvaluationBatches
from gradreg.train.devices import Devices
from gradreg.train.evaluation import Evaluation, autocast, evaluate, widened
from gradreg.train.optimization import squared_norm, warn_of_harm
from gradreg.train.outcome import Epoch, Outcome, best_of
from gradreg.train.penalty import RecipePenalty
from gradreg.train.sharpness_recorder import SharpnessRecorder

OnStep = Callable[[int, nn.Module, Data], None]


def train(
    config: Config,
    *,
    devices: Devices | None = None,
    saver: Saver | None = None,
    resume_from: Path | None = None,
    on_start: Callable[[Sequence[Epoch]], None] = lambda history: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_step: OnStep | None = None,
) -> Outcome:
    """Train as ``config`` says; on a CPU the same configuration gives the same weights on the same machine, bit for bit.

    Args:
        config: the run.
        devices: the processes and the device; by default those that the launcher and ``config`` give.
        saver: writes checkpoints; None writes none.
        resume_from: the checkpoint to resume from; None starts from the beginning.
        on_start: called before the first step with the epochs done already: those of the checkpoint, or none.
        on_epoch: called after every epoch.
        on_step: called after every optimizer step with the number of steps done, the model, and the data; must not change them.

    Returns:
        The model and the history. A run whose loss is no longer finite ends with the epoch in which that happened.

    Raises:
        Stopped: by ``saver``, after a signal; the run is saved.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run = Run(config, devices or Devices(config))
    if resume_from is not None:
        run.state.load(resume_from, run.devices)
    progress = run.state.progress
    run.best = best_of(progress.history, config.objective.judged)
    if saver is not None:
        saver.begin()
    on_start(progress.history)
    while progress.epoch < config.epochs and not (progress.history and not progress.history[-1].finite):
        run.train_epoch(saver, on_step)
        on_epoch(progress.history[-1])
        if saver is not None:
            saver.after_epoch(run.state, last=progress.epoch == config.epochs or not progress.history[-1].finite)
    ema = run.state.ema
    return Outcome(
        model=unwrapped(run.state.model),
        weights=run.state.weights(),
        history=progress.history,
        first_loss=progress.first_loss,
        ema=None if ema is None else ema.module,
        best=run.state.best,
        metric=config.objective.judged,
        own_loss=config.objective.own_loss,
    )


def load_data(config: Config, devices: Devices) -> Data:
    """The data of a run: images of a known set, or samples of a data set of one's own."""
    place: dict[str, Any] = {"seed": config.seed, "device": devices.device, "rank": devices.rank, "processes": devices.processes}
    place["kept_out"] = config.described_penalty.kept_out
    if config.data.is_own:
        from gradreg.train.data import samples

        return samples.load(config.data, code=config.code, **place)
    return loader.load(config.data, config.augmentation, **place)


class Run:
    """A run while it trains: its constant parts, and its ``TrainingState``."""

    def __init__(self, config: Config, devices: Devices) -> None:
        self.config = config
        self.devices = devices
        torch.manual_seed(config.seed)
        random.seed(config.seed)
        self.data: Data = load_data(config, devices)
        model = models.create(config.model, classes=self.data.classes, image_shape=self.data.image_shape, code=config.code)
        self.loss = config.objective.build_loss()
        if devices.rank > 0:  # after the same initial weights everywhere, different dropout masks on each process
            torch.manual_seed(config.seed + 1_000_003 * devices.rank)
        if config.ema is not None and config.parallel == "fsdp":
            raise ValueError(f"ema must be null with parallel 'fsdp', which holds no whole model; got {config.ema}. Use parallel: ddp.")
        model = devices.place(model, config)
        ema = None
        if config.ema is not None:
            ema = AveragedModel(unwrapped(model), multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
        kept_out = 0 if self.data.kept_out is None else len(self.data.kept_out)
        self.steps_per_epoch: int = config.steps_per_epoch(len(self.data.train) + kept_out)
        self.sharpness = SharpnessRecorder(config, self.data, devices)
        self.flooding: Flooding | IndividualFlooding | None = config.flooded()
        self.penalty: RecipePenalty = config.resolved_penalty(self.steps_per_epoch)
        self.held_out = self.penalty.switch(steps_per_epoch=self.steps_per_epoch, epochs=config.epochs)
        warn_of_harm(config.optimizer, config.schedule, self.penalty.penalty, steps_per_epoch=self.steps_per_epoch)
        length = {"epochs": config.epochs, "steps_per_epoch": self.steps_per_epoch}
        optimizer, weight_decay = config.weight_decay.build(unwrapped(model), config.optimizer, classes=self.data.classes, **length)
        self.schedule = config.schedule.build(optimizer, **length)
        self.state: TrainingState = TrainingState(
            model=model,
            optimizer=optimizer,
            regularizer=GradientRegularizer(model, self.penalty.penalty, scope=config.scope, held_out=self.held_out),
            scaler=torch.amp.GradScaler(devices.device.type, enabled=config.precision == "fp16"),
            weight_decay=weight_decay,
            ema=ema,
            divided=devices.processes > 1 and config.parallel == "fsdp",
        )
        self.best: Epoch | None = None
        """The epoch with the best metric so far."""
        self.evaluation_batch_size: int = config.evaluation_batch_size or (1000 if self.data.in_memory else config.batch_size)

    def train_epoch(self, saver: Saver | None, on_step: OnStep | None) -> None:
        """Train the rest of the epoch, evaluate, and add its record to the history."""
        progress, spent = self.state.progress, self.state.progress.seconds
        left = len(self.data.train) - progress.batch * self.config.batch_size
        started = time.perf_counter()
        self.train_batches(saver, on_step)
        train_loss = self.devices.mean(torch.stack([loss.to(self.devices.device) for loss in progress.losses]).mean()).item()
        here = time.perf_counter() - started
        progress.seconds = spent + here
        self._record(progress.epoch + 1, train_loss, left / here)
        progress.epoch, progress.batch, progress.losses = progress.epoch + 1, 0, []

    def train_batches(self, saver: Saver | None, on_step: OnStep | None) -> None:
        """Train on the remaining batches of the epoch."""
        progress, model = self.state.progress, self.state.model
        spent = progress.seconds
        model.train()
        started = time.perf_counter()
        for batch in self.data.train.batches(progress.epoch + 1, self.config.batch_size, start=progress.batch):
            loss = self._step(batch)
            if math.isnan(progress.first_loss):
                progress.first_loss = self.devices.mean(loss).item()
            progress.losses.append(loss)
            progress.batch += 1
            if on_step is not None:
                on_step(self.state.regularizer.step, model, self.data)
                model.train()
            if saver is not None:
                progress.seconds = spent + time.perf_counter() - started
                saver.after_step(self.state)

    def _step(self, batch: AnyBatch) -> Tensor:
        """One optimizer step on this process's part of a batch; the loss before it, to be averaged over the processes."""
        config, state = self.config, self.state
        step = state.regularizer.step
        self._set_weight_decay(step, batch)
        state.optimizer.zero_grad()
        state.regularizer.measure_norm = state.progress.batch + 1 == self.steps_per_epoch  # the step that the epoch's record logs
        fraction, m = self.penalty.ascent_fraction, self.penalty.m
        ascent = None if fraction is None else self._closures(batch, fraction)
        if m is not None and not self.penalty.acts_at(step):
            m = None  # a step without a penalty is that of plain training
        loss = state.regularizer.backward(
            self._closures(batch, 1.0, m),
            ascent=ascent,
            held_out=self._held_out(step),
            ascent_share=1.0 if fraction is None else fraction,
            perturb="all" if m is None else "each",
            scaler=state.scaler if state.scaler.is_enabled() else None,
        )
        if config.clip_norm is not None:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_norm)
        state.scaler.step(state.optimizer)
        state.regularizer.decoupled_step(state.optimizer)
        state.scaler.update()
        state.progress.metrics = state.regularizer.metrics
        held = state.optimizer.param_groups[0]["weight_decay"]
        state.progress.weight_decay = held if state.weight_decay is None else state.weight_decay.value
        if self.schedule is not None:
            self.schedule.step_update(state.regularizer.step)
        if state.ema is not None:
            state.ema.update_parameters(unwrapped(state.model))
        return loss

    def _set_weight_decay(self, step: int, batch: AnyBatch) -> None:
        """Set the coefficient for the update of ``step``; if due, measure loss and accuracy without L2 on ``batch``, that update's."""
        weight_decay, model, precision = self.state.weight_decay, self.state.model, self.config.precision
        if weight_decay is None:
            return
        if not weight_decay.due(step):
            weight_decay.set(step)
            return
        model.eval()
        with torch.no_grad():
            given, labels = batch.labeled(precision)
            with autocast(precision, self.devices.device):
                outputs = widened(model(given), precision)
            found = self.loss.total(outputs, labels, batch.size) / batch.size
            classified = not self.config.data.is_own and not self.config.objective.own_loss
            right = (outputs.argmax(dim=1) == labels).to(outputs.dtype).mean() if classified else torch.zeros_like(found)
            measured = torch.stack([found, right]) * (self.devices.processes * batch.share)
        model.train()
        loss, accuracy = self.devices.mean(measured).tolist()
        if math.isfinite(loss):  # a diverged run ends with its epoch; until then its measurements mean nothing
            weight_decay.set(step, loss=loss, accuracy=accuracy)

    def _closures(self, batch: AnyBatch, fraction: float, m: int | None = None) -> list[Callable[[], Tensor]]:
        """One closure for each micro-batch of the first ``fraction`` of the images; their gradients, averaged over processes, add up.

        With ``m`` a micro-batch has at most m images, or one more on a process with an image more than others.
        """
        size = math.ceil(fraction * batch.size)
        # The same number on every process, even if one has an image more, because each closure involves collective operations.
        parts = min(self.config.accumulation, math.ceil(fraction * batch.fewest)) if m is None else math.ceil(batch.fewest / m)
        whole = self.devices.processes * batch.share
        ends = [size * i // parts for i in range(parts + 1)]
        return [
            self._closure(batch, slice(start, end), whole * (end - start) / size, l2=1.0 / parts if m is not None else float(start == 0))
            for start, end in itertools.pairwise(ends)
        ]

    def _closure(self, batch: AnyBatch, rows: slice, weight: float, *, l2: float) -> Callable[[], Tensor]:
        """The loss of some rows times ``weight``, and ``l2`` times that of the weights."""
        config, model = self.config, self.state.model
        given, targets = batch.part(rows, config.precision)
        if config.channels_last:
            given = given.to(memory_format=torch.channels_last)

        def closure() -> Tensor:
            with autocast(config.precision, self.devices.device):
                outputs = widened(model(given), config.precision)
            reduction = "none" if isinstance(self.flooding, IndividualFlooding) else "mean"
            loss = self.loss.training(outputs, targets, reduction=reduction)
            loss = loss if self.flooding is None else self.flooding(loss)
            loss = loss if weight == 1.0 else weight * loss
            if l2 and config.optimizer.l2_in_loss:
                loss = loss + l2 * config.optimizer.l2_in_loss / 2 * squared_norm(model)
            return loss

        return closure

    def _held_out(self, step: int) -> Callable[[], Tensor] | None:
        """The loss on a batch of what is kept out, which is fetched only if it is asked for: with another step another one, in turn.

        None if nothing is kept out.
        """
        samples, size, rule = self.data.kept_out, self.config.batch_size, self.held_out or self.penalty.learned
        if rule is None:
            return None
        assert samples is not None
        epoch, i = divmod(step // rule.every, math.ceil(len(samples) / size))

        def closure() -> Tensor:
            batch = next(iter(samples.batches(epoch + 1, size, start=i)))
            given, targets = batch.part(slice(None), self.config.precision)
            with autocast(self.config.precision, self.devices.device):
                outputs = widened(self.state.model(given), self.config.precision)
            loss = self.devices.processes * batch.share * self.loss.training(outputs, targets, reduction="mean")
            l2 = self.config.optimizer.l2_in_loss
            # A learned radius follows the gap of two losses, which must be one function on other samples.
            return loss + l2 / 2 * squared_norm(self.state.model) if l2 and self.penalty.learned is not None else loss

        return closure

    def _evaluate(self, model: nn.Module, samples: EvaluationBatches) -> Evaluation:
        config = self.config
        return evaluate(
            model,
            samples,
            batch_size=self.evaluation_batch_size,
            devices=self.devices,
            precision=config.precision,
            objective=config.objective,
        )

    def _record(self, epoch: int, train_loss: float, images_per_second: float) -> None:
        state, optimizer = self.state, self.state.optimizer
        test = self._evaluate(state.model, self.data.test)
        validation = None if self.data.validation is None else self._evaluate(state.model, self.data.validation)
        averaged = None if state.ema is None else self._evaluate(state.ema.module, self.data.test)
        averaged_validation = None
        if state.ema is not None and self.data.validation is not None:
            averaged_validation = self._evaluate(state.ema.module, self.data.validation)
        evaluated = {"test": test, "validation": validation, "ema_test": averaged, "ema_validation": averaged_validation}
        values = {
            f"{split}_{name}": value for split, found in evaluated.items() if found is not None for name, value in found.metrics.items()
        }
        metrics = state.progress.metrics
        record = Epoch(
            epoch=epoch,
            step=state.regularizer.step,
            gradient_evaluations=metrics["evaluations"],
            train_loss=train_loss,
            test_loss=test.loss,
            test_accuracy=values.pop("test_accuracy", None),
            test_top5=values.pop("test_top5", None),
            lr=optimizer.param_groups[0]["lr"],
            gradient_norm=metrics["gradient_norm"],
            strength=metrics["strength"],
            radius=None if math.isnan(metrics["radius"]) else metrics["radius"],
            weight_decay=state.progress.weight_decay,
            validation_loss=None if validation is None else validation.loss,
            validation_accuracy=values.pop("validation_accuracy", None),
            ema_test_loss=None if averaged is None else averaged.loss,
            ema_test_accuracy=values.pop("ema_test_accuracy", None),
            ema_validation_accuracy=values.pop("ema_validation_accuracy", None),
            validation_top5=values.pop("validation_top5", None),
            ema_validation_loss=None if averaged_validation is None else averaged_validation.loss,
            unreadable_images=self.data.unreadable,
            sharpness=self.sharpness.after(epoch, state.model),
            own=values,
            seconds=state.progress.seconds,
            images_per_second=images_per_second,
        )
        metric = self.config.objective.judged
        record.check(metric)
        best = best_of([*([] if self.best is None else [self.best]), record], metric)
        state.progress.history.append(record)
        if best is self.best:
            return
        self.best = best
        if self.config.checkpoint.best:
            weights = state.weights()
            state.best = weights if self.devices.main else None
