"""Automatic L2: a coefficient that decays during training (AutoL2), and one predicted from a short run.

The coefficient λ is that of loss + (λ/2)·‖θ‖², PyTorch's ``weight_decay`` in ``torch.optim.SGD``. The authors of both methods write
loss + λ·‖θ‖² and average the cross entropy over the classes too: ``weight_decay_clock.l2_from_authors`` converts.
Fixed schedules are those of ``gradreg.schedules``; ``gradreg.torch.weight_decay`` and ``gradreg.jax.weight_decay`` set either on an
optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

from gradreg import checks

Trigger = Literal["loss", "accuracy", "either", "both"]

_DIVERGED = "Pass a plain number (.item() of a tensor); a run whose loss is not finite has diverged and is best stopped."


class AutoL2:
    """An L2 coefficient that starts large and is reduced whenever training stops improving.

    Every ``measure_every`` steps the loss and the accuracy on the next training minibatch are measured, without L2, before the update.
    With i the step, λ the coefficient and the lowest loss and highest accuracy so far, λ becomes ``factor``·λ if

    - i > refractory / λ + (step of the last decay), and
    - there are more than two measurements, and
    - the two newest losses are both ≥ the lowest, or the two newest accuracies are both ≤ the highest (``trigger``).

    Otherwise, once there are two measurements, the second-newest enters the lowest and the highest, which are never reset.

    Args:
        initial: coefficient at step 0, > 0.
        factor: what a decay multiplies it by, > 0 and < 1.
        refractory: steps × coefficient that must pass after a decay before the next one, > 0: with 0.1, 10 steps at λ = 0.01 and 10,000 at
            1e-5. With ``learning_rate`` given, steps × learning rate × coefficient.
        measure_every: optimizer steps from one measurement to the next, ≥ 1.
        trigger: what triggers a decay: "either" loss or accuracy (the authors'), only the "loss", only the "accuracy", or "both" at once.
        minimum: lower bound of the coefficient, ≥ 0 and ≤ ``initial``.
        smoothing: share of the old value in an exponential average of the measurements, ≥ 0 and < 1; 0 (the authors') averages nothing.
        learning_rate: None counts the refractory time in steps (the authors'); a number > 0 makes it ``refractory / (learning_rate · λ)``
            steps, the timescale of the training dynamics. With momentum μ pass η/(1 − μ).

    Raises:
        ValueError, TypeError: at construction, naming the argument, the rule, the value received and the remedy.

    Cost: one forward pass on one minibatch every ``measure_every`` steps; no extra gradient.
    Source: Lewkowycz and Gur-Ari 2020, arXiv 2006.08643 (AutoL2), after the authors' code.
    Differs from the paper: with the defaults only in λ, which is PyTorch's here and stands for loss + λ·‖θ‖² there. ``minimum``,
    ``smoothing``, ``learning_rate`` and the triggers other than "either" are additions.

    Measurements on minibatches are noisy, so "either" is nearly always satisfied soon after the refractory time. With the defaults the
    coefficient therefore acts almost as a timer: it is divided about 10, 100, 1000, ... steps after the last time. The trigger "both",
    ``smoothing`` and ``learning_rate`` make it depend more on the measurements.

    >>> auto = AutoL2(measure_every=1)
    >>> [auto.update(step, loss=1.0, accuracy=0.5) for step in range(4)]
    [0.1, 0.1, 0.01, 0.01]
    """

    def __init__(
        self,
        initial: float = 0.1,
        factor: float = 0.1,
        refractory: float = 0.1,
        measure_every: int = 10,
        trigger: Trigger = "either",
        minimum: float = 0.0,
        *,
        smoothing: float = 0.0,
        learning_rate: float | None = None,
    ) -> None:
        self.initial: float = checks.positive(
            "initial", initial, remedy="0.1 is the authors' start; use weight decay 0 to train without L2."
        )
        self.factor: float = checks.positive("factor", factor, remedy="0.1 is the authors'.")
        if self.factor >= 1:
            raise ValueError(f"factor must be < 1, so that the coefficient falls; got {factor}. 0.1 is the authors'.")
        self.refractory: float = checks.positive("refractory", refractory, remedy="0.1 is the authors'; a small number reacts sooner.")
        self.measure_every: int = checks.whole("measure_every", measure_every, minimum=1, remedy="10 is the authors'.")
        self.trigger = cast("Trigger", checks.choice("trigger", trigger, get_args(Trigger)))
        self.minimum: float = checks.non_negative("minimum", minimum, remedy="Use 0.0 for no floor.")
        if self.minimum > self.initial:
            raise ValueError(f"minimum must be <= initial, which is {self.initial:g}; got {minimum}. Lower it, or raise initial.")
        self.smoothing: float = checks.non_negative("smoothing", smoothing, remedy="Use 0.0 for none.")
        if self.smoothing >= 1:
            raise ValueError(f"smoothing must be < 1; got {smoothing}. It is the share of the old value: 0.9 averages over about ten.")
        remedy = "Use None for the authors' refractory time in steps."
        self.learning_rate: float | None = None if learning_rate is None else checks.positive("learning_rate", learning_rate, remedy=remedy)
        self._l2 = self.initial
        self._last_decay = 0
        self._last_step = -1
        self._measurements = 0
        # (newest, best so far) by quantity, both as "lower is better": an accuracy enters with its sign reversed.
        self._newest: dict[str, float] = {}
        self._best: dict[str, float] = {}

    @property
    def l2(self) -> float:
        """The coefficient to use now."""
        return self._l2

    def due(self, step: int) -> bool:
        """Whether ``update`` needs a measurement at ``step``; none need be made at other steps."""
        return step % self.measure_every == 0

    def update(self, step: int, loss: float | None = None, accuracy: float | None = None) -> float:
        """The coefficient to use for the update of ``step``, given what was measured just before it.

        Args:
            step: optimizer steps done, ≥ 0, rising. May be called at every step; only those that are ``due`` count.
            loss: loss on the next training minibatch, without L2; needed where ``due``, unless the trigger is "accuracy".
            accuracy: accuracy on it, in any unit; needed where ``due``, unless the trigger is "loss".

        Raises:
            ValueError: a step that was measured already, or a measurement that is not finite; nothing has changed then.
            TypeError: a measurement that is missing or not a number.
        """
        step = checks.whole("step", step, minimum=0, remedy="Count optimizer steps from 0.")
        if not self.due(step):
            return self._l2
        if step <= self._last_step:
            raise ValueError(
                f"step must rise from call to call; got {step} after {self._last_step}. Count on over epochs, and restore a run's state."
            )
        measured: dict[str, float] = {}
        if self.trigger != "accuracy":
            measured["loss"] = checks.real("loss", loss, remedy=_DIVERGED)
        if self.trigger != "loss":
            measured["accuracy"] = -checks.real("accuracy", accuracy, remedy=_DIVERGED)
        before = self._newest
        if before:
            measured = {k: self.smoothing * before[k] + (1 - self.smoothing) * v if self.smoothing else v for k, v in measured.items()}
        self._newest = measured
        self._measurements += 1
        self._last_step = step
        if self._may_decay(step) and self._stalled(before, measured):
            self._l2 = max(self._l2 / (1 / self.factor), self.minimum)
            self._last_decay = step
        else:
            for key, value in before.items():
                self._best[key] = min(value, self._best.get(key, value))
        return self._l2

    def _may_decay(self, step: int) -> bool:
        rate = 1.0 if self.learning_rate is None else self.learning_rate
        return step > self.refractory / (rate * self._l2) + self._last_decay and self._measurements > 2 and self._l2 > self.minimum

    def _stalled(self, before: Mapping[str, float], now: Mapping[str, float]) -> bool:
        quantities = [before[key] >= self._best[key] and now[key] >= self._best[key] for key in now]
        return all(quantities) if self.trigger == "both" else any(quantities)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next ``update`` depends on, as plain JSON values, with the settings that belong to it."""
        return {
            "settings": self._settings(),
            "l2": self._l2,
            "last_decay": self._last_decay,
            "last_step": self._last_step,
            "measurements": self._measurements,
            "newest": dict(self._newest),
            "best": dict(self._best),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state``.

        Raises:
            ValueError: a state of other settings, or one that lacks an entry; nothing has changed then.
        """
        missing = [key for key in self.state_dict() if key not in state]
        if missing:
            raise ValueError(f"state must be what AutoL2.state_dict() returned; got one without {', '.join(missing)}.")
        mine, theirs = self._settings(), dict(state["settings"])
        if mine != theirs:
            different = [f"{key} {theirs.get(key)!r} where this one has {mine.get(key)!r}" for key in mine if mine[key] != theirs.get(key)]
            raise ValueError(f"state must come from an AutoL2 of the same settings; got {', '.join(different)}. Build it with those.")
        self._l2 = float(state["l2"])
        self._last_decay, self._last_step = int(state["last_decay"]), int(state["last_step"])
        self._measurements = int(state["measurements"])
        self._newest, self._best = dict(state["newest"]), dict(state["best"])

    def _settings(self) -> dict[str, Any]:
        names = ("initial", "factor", "refractory", "measure_every", "trigger", "minimum", "smoothing", "learning_rate")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        return f"AutoL2({', '.join(f'{k}={v!r}' for k, v in self._settings().items())})"


def predict_l2(
    learning_rate: float,
    probe_l2: float,
    best_step: int,
    budget_steps: int,
    momentum: float = 0.0,
    *,
    probe_steps: int | None = None,
    budget_learning_rate: float | None = None,
) -> float:
    """The best L2 coefficient for a budget of training, from one short run at a large one.

    The time to the best accuracy is t* ≈ c / (η·λ). The short run (the probe) gives ``c = η·probe_l2·best_step``, with η the learning rate
    over (1 − momentum), and the answer is the λ whose t* is the end of the budget: ``λ = c / (η·budget_steps)``.

    Args:
        learning_rate: constant learning rate of the probe, > 0. It cancels out unless the budget's differs.
        probe_l2: coefficient λ₀ of the probe, large, > 0.
        best_step: step of the probe's best validation accuracy, ≥ 1.
        budget_steps: optimizer steps of the planned run, not fewer than the probe's.
        momentum: momentum μ of SGD, ≥ 0 and < 1, the same in both runs; 0 for decoupled weight decay. It cancels out in the answer.
        probe_steps: optimizer steps of the probe; if given, a ``best_step`` at its end raises ``ValueError``, and so does a shorter budget.
        budget_learning_rate: mean learning rate of the planned run, if it has a schedule, > 0; None is ``learning_rate``.

    Raises:
        ValueError: a probe whose best accuracy is at its end, a budget shorter than the probe, or a value out of range.

    Source: Lewkowycz and Gur-Ari 2020, arXiv 2006.08643. Their probe: λ₀ = 0.01 in their convention, two epochs, constant learning rate,
    measured every 10 steps.
    Differs from the paper: a learning-rate schedule of the budget enters by its mean.

    >>> predict_l2(0.1, probe_l2=0.1, best_step=200, budget_steps=10_000)
    0.002
    """
    rate = checks.positive("learning_rate", learning_rate)
    l2 = checks.positive("probe_l2", probe_l2, remedy="The probe needs a large coefficient, so that its best accuracy comes early.")
    best = checks.whole(
        "best_step", best_step, minimum=1, remedy="A best accuracy at step 0 means that the probe did not learn: lower its L2."
    )
    budget = checks.whole("budget_steps", budget_steps, minimum=1)
    check_momentum(momentum)
    after = rate if budget_learning_rate is None else checks.positive("budget_learning_rate", budget_learning_rate)
    shortest = best
    if probe_steps is not None:
        shortest = checks.whole("probe_steps", probe_steps, minimum=1)
        if best >= shortest:
            raise ValueError(
                f"best_step must be < probe_steps, {shortest}; got {best}. The accuracy still rose when the probe ended: "
                "probe longer, or with a larger probe_l2."
            )
    if budget < shortest:
        raise ValueError(f"budget_steps must not be shorter than the probe, {shortest} steps; got {budget}. Probe a shorter while.")
    return l2 * best / budget * (rate / after)


def check_momentum(momentum: float) -> float:
    """``momentum`` as a float ≥ 0 and < 1."""
    value = checks.non_negative("momentum", momentum)
    if value >= 1:
        raise ValueError(f"momentum must be < 1; got {momentum}. 0.9 is common.")
    return value
