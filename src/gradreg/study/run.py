"""One run of a task: what a training function receives, and what it leaves in the run's folder."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from gradreg import checks, files
from gradreg.penalties import GradientPenalty
from gradreg.study.counted import CountedValueAndGrad
from gradreg.study.ending import ending
from gradreg.study.history import METRICS
from gradreg.study.tasks import Metric, OnProgress, TaskError

_OFTEN = 0.5
"""Seconds between two reports of progress."""

_ended: list[tuple[weakref.ref[Any], int]] = []
"""The regularizers of earlier runs in this process, and the steps that they had done when their run ended."""


class Run:
    """What a task's function receives: the variant's penalty, the seed, how long to train, and where to log.

    Args:
        penalty: the variant's penalty; None for plain training.
        seed: seeds whatever the task draws. Python's, numpy's and torch's generators are seeded with it before the function is called.
        folder: the run's folder, where it may keep files of its own.
        metric: what the study judges by.
        stretch: how many times as long as the function asks it trains.
        on_progress: told which share is done.
    """

    def __init__(
        self,
        penalty: GradientPenalty | None,
        seed: int,
        folder: Path,
        *,
        metric: Metric,
        stretch: Fraction = Fraction(1),
        on_progress: OnProgress = lambda share: None,
    ) -> None:
        self._penalty = penalty
        self._penalized_steps: int | None = None
        self.seed = seed
        self.folder = folder
        self._metric = metric
        self._stretch = stretch
        self._on_progress = on_progress
        self._started: float | None = None
        self._reported = 0.0
        self._regularizers: list[Any] = []
        self._counted: list[tuple[Any, Callable[[], int] | None]] = []
        self._functions: list[CountedValueAndGrad] = []
        self._length: _Length | None = None
        self._epoch: int | None = None
        self._declared = 0
        self._declared_evaluations: float = 0
        self._records: list[dict[str, Any]] = []
        self._measuring = 0.0
        self._unmeasured: dict[str, str] = {}

    @property
    def penalty(self) -> GradientPenalty | None:
        """The variant's penalty; None for plain training. One with a tail knows the steps of the run once these are known."""
        steps = self._penalized_steps
        if steps is None and self._length is not None and self._length.unit == "steps":
            steps = self._length.total
        return self._penalty if self._penalty is None or steps is None else self._penalty.over(steps)

    @property
    def device(self) -> Any:
        """The ``torch.device`` to train on: the accelerator if there is one, else the CPU."""
        import torch

        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")

    def epochs(self, n: int) -> Epochs:
        """``range(n)`` for the loop over epochs; longer for a baseline that may spend more. ``total_epochs`` is its length from then on.

        Args:
            n: epochs that a variant trains, ≥ 1.

        Raises:
            RuntimeError: the run's length was given before.
        """
        return Epochs(self, self._set_length("epochs", n))

    def steps(self, n: int) -> Steps:
        """``range(n)`` for a loop over optimizer steps.

        Within the loop over epochs these are the steps of one epoch. Alone they are the whole run, and longer for a baseline that may
        spend more. The length may also be taken without a loop, for ``jax.lax.scan``: ``len(run.steps(n))``.

        A task whose gradients are computed inside ``jax.jit``, where a call cannot be seen, declares them by this.

        Args:
            n: optimizer steps, ≥ 1.
        """
        if self._epoch is not None:
            return Steps(self, checks.whole("steps", n, minimum=1))
        return Steps(self, self._set_length("steps", n))

    @property
    def total_epochs(self) -> int:
        """Epochs that this run trains, for schedules: those of ``epochs(n)``, or more for a baseline that may spend more.

        Raises:
            RuntimeError: before ``epochs(n)``.
        """
        return self._total("epochs")

    @property
    def total_steps(self) -> int:
        """As ``total_epochs``, for runs whose length is ``steps(n)``."""
        return self._total("steps")

    def regularizer(self, model: Any, *, total_steps: int | None = None, **options: Any) -> Any:
        """A ``gradreg.torch.GradientRegularizer`` of ``model`` with this run's penalty, whose gradient evaluations are counted.

        Args:
            model: a ``torch.nn.Module``.
            total_steps: optimizer steps of the whole run, of which a penalty's tail is a share (``sam:rho=0.1,tail=0.3``): the length of
                ``run.epochs(n)`` times the steps of an epoch. Not needed if the length is ``run.steps(n)``, asked for before.
            options: of ``GradientRegularizer``, such as ``parameters=``.
        """
        from gradreg.torch import GradientRegularizer

        if "penalty" in options:
            raise TypeError(
                "penalty must be left out of run.regularizer(), which takes that of the variant; got one. Name it in penalties=."
            )
        self._set_penalized_steps(total_steps)
        made = GradientRegularizer(model, self.penalty, **options)
        self._regularizers.append(made)
        return made

    def value_and_grad(
        self, fun: Callable[..., Any], *, state: bool = False, total_steps: int | None = None, **options: Any
    ) -> CountedValueAndGrad:
        """``gradreg.jax.value_and_grad`` of ``fun`` with this run's penalty, whose gradient evaluations are counted.

        Calls outside ``jax.jit`` are counted one by one. Inside it a call cannot be seen: declare the steps by ``run.steps(n)``.

        Args:
            fun: the loss, as ``gradreg.jax.value_and_grad`` takes it.
            state: whether the function takes ``state=`` and returns ``(value, gradients, state)``, for every penalty alike, with an empty
                state for those that have none. ``init(params)`` makes the first.
            total_steps: as for ``regularizer``.
            options: of ``gradreg.jax.value_and_grad``.

        Raises:
            TaskError: a penalty that has a state, without ``state=True``.
        """
        self._set_penalized_steps(total_steps)
        made = CountedValueAndGrad(fun, self.penalty, state, options)
        self._functions.append(made)
        return made

    def count(self, made: Any, *, steps: Callable[[], int] | None = None) -> None:
        """Count the gradient evaluations of a regularizer that an integration makes itself, from ``run.penalty``.

        ::

            callback = GradientRegularization(run.penalty)                       # Lightning's
            trainer = Trainer(max_epochs=len(run.epochs(20)), callbacks=[callback])
            run.count(callback, steps=lambda: trainer.global_step)

        Args:
            made: a ``GradientRegularizer``, or what has one as its attribute ``regularizer``, then or later: Lightning's callback, a
                ``RegularizedTrainer``, a ``RegularizedOptimizer``.
            steps: gives the optimizer steps done, for plain training, where an integration may make none.
        """
        if not hasattr(made, "regularizer") and not hasattr(made, "metrics"):
            raise TypeError(
                f"made must have a regularizer; got {checks.describe(made)}. Pass the callback, trainer or optimizer that trains."
            )
        self._counted.append((made, steps))

    def log(self, **metrics: Any) -> None:
        """Record metrics after an epoch, or as often as wanted: numbers, or tensors and arrays with one element.

        A study with metric m needs ``test_m``; with ``validation_m`` beside it the best epoch can be selected, and a baseline that stops
        early be compared with. ``loss`` tells whether the run diverged. Several calls in one epoch add to the same record. The last value
        of any other name (``forgetting``, ``loss_in_4_bits``, ``calibration_error``) is shown beside the metric, with its difference to
        plain training.

        Raises:
            TypeError: a value that is not a number.
            TaskError: a share that is not between 0 and 1.
        """
        values = {name: _number(name, value) for name, value in metrics.items()}
        for name in (self._metric.test, self._metric.validation):
            if self._metric.percent and math.isfinite(values.get(name, 0.0)) and not 0.0 <= values.get(name, 0.0) <= 1.0:
                raise TaskError(
                    f"{name} must be a share between 0 and 1, which tables show in percent; got {values[name]:g}. "
                    "Divide it by 100, or declare @study.task(..., percent=False)."
                )
        epoch = None if self._epoch is None else self._epoch + 1
        record = {
            "epoch": epoch,
            "step": self._steps_done(),
            "gradient_evaluations": self._evaluations(),
            "seconds": self._seconds(),
            **values,
        }
        files.append_json_line(self.folder / METRICS, record)
        before = self._records[-1] if self._records and epoch is not None and self._records[-1]["epoch"] == epoch else None
        if before is None:
            self._records.append(record)
        else:
            before.update(record)

    def sharpness(self, model: Any, closure: Any, *, every: int = 1, **options: Any) -> Mapping[str, float]:
        """Measure the curvature of a loss after every k-th epoch and after the last, and log it: the study shows it beside the metric.

        To be called in each epoch (or each step of a run without epochs), where ``log`` is, with the same samples each time. The model is
        left bit for bit as it was, and neither the run's gradient evaluations nor its seconds count the measurement. In JAX log numbers
        yourself: ``run.log(sharpness_largest_eigenvalue=..., sharpness_trace=..., sharpness_trace_error=...)``.

        Args:
            model: a ``torch.nn.Module``.
            closure: returns the loss on a fixed part of the training data, as ``gradreg.sharpness`` takes it; or several closures.
            every: epochs (or steps) from one measurement to the next, ≥ 1.
            options: of ``gradreg.sharpness.summary``: ``measures``, ``rho``, ``vectors``, ``sizes``; ``mode`` is "eval" unless given.

        Returns:
            What was logged, ``sharpness_NAME``; NaN for what could not be measured. Empty if nothing is due.
        """
        checks.whole("every", every, minimum=1)
        length = self._length
        if length is None:
            raise RuntimeError("sharpness is measured within the run's length; got no run.epochs(n) or run.steps(n) so far. Ask first.")
        done = (self._epoch or 0) + 1 if length.unit == "epochs" else length.done + 1
        if done % every and done < length.total:
            return {}
        from gradreg import sharpness

        started = time.perf_counter()
        chosen: dict[str, Any] = {"mode": "eval", **options}
        found = sharpness.summary(model, closure, **chosen)
        self._measuring += time.perf_counter() - started
        self._unmeasured.update({name: str(error) for name, error in found.failures.items() if name not in self._unmeasured})
        numbers = found.record()
        self.log(**numbers)
        return numbers

    def finish(self) -> dict[str, Any]:
        """The run's result, after the function has returned.

        Raises:
            TaskError: the metric was never logged, the run's gradients were not its regularizer's, or its length was never asked for.
        """
        self._check_regularizers()
        return {
            "epochs": self._epochs_done(),
            "steps": self._steps_done(),
            "length": None if self._length is None else self._length.total,
            "gradient_evaluations": self._evaluations(),
            **ending(self._records, self._metric),
            "seconds": self._seconds(),
            "warnings": self._warnings(),
        }

    def _check_regularizers(self) -> None:
        stolen = [made for made, steps in ((ref(), steps) for ref, steps in _ended) if made is not None and made.step != steps]
        for made in self._made():
            _ended.append((weakref.ref(made), made.step))
        _ended[:] = [(ref, made.step) for ref, made in ((ref, ref()) for ref, _ in _ended) if made is not None]
        if stolen:
            raise TaskError(
                "a run must use a regularizer of its own; got one that an earlier run made and this one stepped. Call "
                "run.regularizer(model) inside the function, and keep nothing of it outside."
            )
        if self._length is None:
            raise TaskError(
                "the task must ask how long to train, because a fair baseline trains longer; got neither run.epochs(n) nor run.steps(n). "
                "Write for epoch in run.epochs(20): ..."
            )
        if self._evaluations() == 0:
            raise TaskError(
                "the task must take its gradients from the run; got a function that never called run.regularizer(model).backward(...) or "
                "run.value_and_grad(fun). Inside jax.jit, where calls cannot be seen, declare the steps: for step in run.steps(n). What an "
                "integration trains with, count by run.count(callback)."
            )

    def _warnings(self) -> list[str]:
        length, found = self._length, list[str]()
        if length is not None and self._done() < length.total and length.looped:
            found.append(
                f"returned after {self._done()} of {length.total} {length.unit}, so that compute is not matched. Leave the loop by "
                f"its end, or call run.{length.unit} with the {length.unit} that it trains."
            )
        logged = [record for record in self._records if self._metric.test in record]
        if logged and math.isnan(logged[-1][self._metric.test]) and math.isfinite(logged[-1].get("loss", 0.0)):
            found.append(
                f"logged {self._metric.test}=nan, without a loss that is not finite. Log 0.0, say, where the metric is not defined."
            )
        return [*found, *(f"could not measure {name} each time: {why}" for name, why in self._unmeasured.items())]

    def _done(self) -> int:
        """Epochs or steps done; an epoch that logged counts, though the function returned in it."""
        assert self._length is not None
        logged = [record["epoch"] or 0 for record in self._records] if self._length.unit == "epochs" else []
        return max([self._length.done, *logged])

    def _set_penalized_steps(self, total_steps: int | None) -> None:
        if total_steps is not None:
            self._penalized_steps = checks.whole("total_steps", total_steps, minimum=1)

    def _set_length(self, unit: str, n: int) -> int:
        checks.whole(unit, n, minimum=1, remedy=f"Write run.{unit}(20), say.")
        if self._length is not None:
            raise TaskError(
                f"the run's length must be asked for once; got run.{unit}({n}) after run.{self._length.unit}({self._length.asked}). "
                f"Keep what it returns: {unit} = run.{unit}({n})."
            )
        self._length = _Length(unit, n, math.ceil(n * self._stretch))
        self._started = time.perf_counter()  # imports and the loading of data are over
        return self._length.total

    def _total(self, unit: str) -> int:
        if self._length is None or self._length.unit != unit:
            raise RuntimeError(
                f"total_{unit} is known after run.{unit}(n); got none so far. Write {unit} = run.{unit}(20) before the schedule."
            )
        return self._length.total

    def _seconds(self) -> float:
        return 0.0 if self._started is None else time.perf_counter() - self._started - self._measuring

    def _steps_done(self) -> int:
        counted = sum(made.step for made in self._made()) + sum(made.calls for made in self._functions)
        seen = bool(self._regularizers) or any(steps is not None for _, steps in self._counted)  # 0, before the first step
        return counted or self._plain_steps() or (0 if seen else self._declared)

    def _evaluations(self) -> int | float:
        counted = sum(made.metrics["evaluations"] for made in self._made()) + sum(made.evaluations for made in self._functions)
        if counted == 0 and self._penalty is None:
            counted = self._plain_steps()
        if counted == 0 and self._functions:
            counted = self._declared_evaluations
        return int(counted) if float(counted).is_integer() else counted

    def _epochs_done(self) -> int | None:
        length = self._length
        if length is None or length.unit != "epochs":
            return None
        return self._done() if length.looped else length.total  # an integration loops by itself

    def _made(self) -> list[Any]:
        """The regularizers whose gradients are counted."""
        return [*self._regularizers, *(one for made, _ in self._counted if (one := getattr(made, "regularizer", made)) is not None)]

    def _plain_steps(self) -> int:
        """The steps of plain training in which an integration made no regularizer."""
        return sum(steps() for made, steps in self._counted if steps is not None and getattr(made, "regularizer", made) is None)

    def _begin_loop(self, unit: str) -> None:
        """A loop over the run's own length begins: a return out of it can be seen."""
        if self._length is not None and self._length.unit == unit:
            self._length.done, self._length.looped = 0, True

    def _tick(self, unit: str, done: int, total: int) -> None:
        """An epoch, or a step, was done."""
        if self._length is None or self._length.unit != unit:
            return
        self._length.done, self._length.looped = done, True
        now = time.perf_counter()
        if done == total or now - self._reported > _OFTEN:
            self._reported = now
            self._on_progress(done / total)


class _Length:
    """How long a run trains.

    Args:
        unit: "epochs" or "steps".
        asked: what the function asked for.
        total: what it got.
    """

    def __init__(self, unit: str, asked: int, total: int) -> None:
        self.unit, self.asked, self.total = unit, asked, total
        self.done = 0
        self.looped = False


class Epochs:
    """The epochs of a run: ``range(total)`` that says how far the run is."""

    def __init__(self, run: Run, total: int) -> None:
        self._run, self._total = run, total

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[int]:
        run = self._run
        run._begin_loop("epochs")
        for epoch in range(self._total):
            run._epoch = epoch
            yield epoch
            run._tick("epochs", epoch + 1, self._total)
        # A task may log once more after the loop: that belongs to the last epoch.


class Steps:
    """Optimizer steps: ``range(total)`` that counts them."""

    def __init__(self, run: Run, total: int) -> None:
        self._run, self._total = run, total
        self._counted = False

    def __len__(self) -> int:
        self._declare()
        return self._total

    def __iter__(self) -> Iterator[int]:
        self._declare()
        self._run._begin_loop("steps")
        for step in range(self._total):
            yield step
            self._run._tick("steps", step + 1, self._total)

    def _declare(self) -> None:
        if not self._counted:
            self._counted = True
            run, before = self._run, self._run._declared
            run._declared += self._total
            steps = range(before, run._declared)
            run._declared_evaluations += sum(1 if run.penalty is None else run.penalty.evaluations_at(step) for step in steps)
            length = run._length
            if length is not None and length.unit == "steps":
                length.done = length.total


def _number(name: str, value: Any) -> float:
    if isinstance(value, (bool, str)):
        raise TypeError(f"{name} must be a number; got {checks.describe(value)}. Log what the study compares, and print the rest.")
    try:
        return float(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, or have one element; got {checks.describe(value)}. Take its mean, say.") from error
