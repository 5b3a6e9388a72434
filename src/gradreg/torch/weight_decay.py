"""Weight decay that changes over a run, set on the parameter groups of any torch optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradreg import checks
from gradreg.schedules import Schedule, as_schedule
from gradreg.weight_decay import AutoL2

Decay = float | Schedule | AutoL2


class WeightDecay:
    """Sets the optimizer's ``weight_decay`` before each step: the value of a schedule or of ``AutoL2``.

    The optimizer decides how the coefficient acts: ``SGD`` and ``Adam`` add λθ to the gradient (coupled), ``AdamW`` subtracts η·λ·θ from
    the weights (decoupled). Groups whose ``weight_decay`` is 0 when this is built stay at 0; the others keep their ratio to the
    largest. A group that is added later (``add_param_group``) decays in the ratio of its ``weight_decay`` to that same largest. Only
    ``weight_decay`` is written, so learning-rate schedulers, clipping and ``GradScaler`` are not affected.

    Args:
        optimizer: with parameter groups that have the key ``weight_decay``. Any value > 0 marks a group that decays; it is replaced.
        decay: coefficient λ, ≥ 0: a number, a schedule of the optimizer step (``Cosine``, ``LogTime``, ...), or an ``AutoL2``.
        peak_learning_rate: None, or the largest learning rate η_max of the run, > 0: the coefficient becomes λ·η/η_max with each group's
            current learning rate η, so that the decay of a step, η·λ·η/η_max, follows the learning rate's square.
        scale: factor on every coefficient, > 0: 2·classes turns an ``AutoL2`` in its authors' convention into PyTorch's weight decay.
        cautious: decay only the entries that the optimizer's own update moves towards 0 or leaves unchanged. The optimizer's decay
            is then 0, and after its step η·λ·θ is subtracted from those entries, so that the decay is decoupled for any optimizer.
            A step that a ``GradScaler`` skips decays nothing, also where the optimizer itself skips it (``fused=True``).

    Raises:
        ValueError, TypeError: at construction: a bad coefficient, or an optimizer none of whose groups decays.

    Cost: none; cautious decay one copy of the decayed parameters, and three passes over them.
    Source: decay following the square of the learning rate: AdamC (Defazio 2025, arXiv 2506.02285), which does so for normalized layers
    only. Cautious: Chen et al. 2025, arXiv 2510.12402.

    >>> from gradreg import Cosine
    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([weight], lr=0.5, weight_decay=1.0)
    >>> decay = WeightDecay(optimizer, Cosine(start=0.2, end=0.0, steps=4))
    >>> [round(decay.set(step), 12) for step in (0, 2, 4)]
    [0.2, 0.1, 0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        decay: Decay,
        *,
        peak_learning_rate: float | None = None,
        scale: float = 1.0,
        cautious: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.auto: AutoL2 | None = decay if isinstance(decay, AutoL2) else None
        self.schedule: Schedule | None = None if isinstance(decay, AutoL2) else _checked(decay)
        self.peak_learning_rate: float | None = (
            None if peak_learning_rate is None else checks.positive("peak_learning_rate", peak_learning_rate)
        )
        self.scale: float = checks.positive("scale", scale)
        marks = [self._mark(i) for i in range(len(optimizer.param_groups))]
        if max(marks) <= 0:
            raise ValueError(
                "optimizer must have a parameter group with weight_decay > 0, which marks it as one that decays; got none. "
                "Build it with any, say weight_decay=1.0: the value is replaced."
            )
        self._largest = max(marks)
        self._shares = [mark / self._largest for mark in marks]
        self.cautious = cautious
        self._l2 = 0.0
        self._coefficients = [0.0] * len(marks)
        self._before: list[tuple[float, list[Tensor], list[Tensor]]] = []
        optimizer.register_step_pre_hook(self._before_step)
        if cautious:
            optimizer.register_step_post_hook(self._decay_cautiously)
        self._apply(self.schedule(0) if self.auto is None else self.auto.l2)  # type: ignore[misc]  # one of the two is there

    @property
    def value(self) -> float:
        """The coefficient of the groups that decay most, as last set."""
        return max(self._coefficients)

    def due(self, step: int) -> bool:
        """Whether ``set`` needs a loss and an accuracy at ``step``: those on the next training minibatch, without L2."""
        return self.auto is not None and self.auto.due(step)

    def set(self, step: int, *, loss: float | None = None, accuracy: float | None = None) -> float:
        """Set the coefficient for the update of ``step``; call it before ``optimizer.step()``.

        Args:
            step: optimizer steps done, ≥ 0.
            loss: what ``AutoL2.update`` takes; needed where ``due``.
            accuracy: likewise.

        Returns:
            The coefficient of the groups that decay most.
        """
        if self.auto is not None:
            return self._apply(self.auto.update(step, loss, accuracy))
        assert self.schedule is not None
        return self._apply(self.schedule(checks.whole("step", step, minimum=0, remedy="Count optimizer steps from 0.")))

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, as plain values: which groups decay, and the state of ``AutoL2``. Schedules depend on the step alone."""
        self._join()
        return {"shares": list(self._shares), "largest": self._largest, "auto": None if self.auto is None else self.auto.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state``; before or after the optimizer's own ``load_state_dict``.

        Raises:
            ValueError: a state of an optimizer with another number of groups, or of another kind of decay.
        """
        groups = len(self.optimizer.param_groups)
        if len(state["shares"]) != groups:
            raise ValueError(
                f"state must come from an optimizer with {groups} parameter groups; got one of {len(state['shares'])}. "
                "Group the parameters as before."
            )
        if (state["auto"] is None) != (self.auto is None):
            kinds = ("a schedule", "AutoL2")
            raise ValueError(
                f"state must come from {kinds[self.auto is not None]}; got one of {kinds[state['auto'] is not None]}. Build it as before."
            )
        if self.auto is not None:
            self.auto.load_state_dict(state["auto"])
        self._shares = [float(share) for share in state["shares"]]
        self._largest = float(state.get("largest", self._largest))  # states of earlier versions lack it
        self._coefficients = [0.0] * groups

    def _mark(self, i: int) -> float:
        """The ``weight_decay`` with which group ``i`` was made."""
        if "weight_decay" not in self.optimizer.param_groups[i]:
            raise ValueError(
                f"optimizer must know weight decay; got {type(self.optimizer).__name__}, whose group {i} has no key 'weight_decay'. "
                "Choose one that does, as torch.optim.SGD or AdamW."
            )
        return float(self.optimizer.param_groups[i]["weight_decay"])

    def _join(self) -> bool:
        """Take in groups that were added since; returns whether there are any."""
        known, now = len(self._shares), len(self.optimizer.param_groups)
        if now < known:
            raise ValueError(
                f"optimizer must keep its parameter groups; got {now}, of {known}. Build WeightDecay again from the optimizer as it is now."
            )
        self._shares += [self._mark(i) / self._largest for i in range(known, now)]
        self._coefficients += [0.0] * (now - known)
        return now > known

    def _apply(self, l2: float) -> float:
        self._join()
        self._l2 = l2
        for i, (group, share) in enumerate(zip(self.optimizer.param_groups, self._shares, strict=True)):
            rate = 1.0 if self.peak_learning_rate is None else float(group["lr"]) / self.peak_learning_rate
            self._coefficients[i] = l2 * self.scale * share * rate
            group["weight_decay"] = 0.0 if self.cautious else self._coefficients[i]
        return self.value

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        if self._join():
            self._apply(self._l2)  # so that a new group's mark never acts as its coefficient
        if not self.cautious:
            return
        self._before = []
        for group, coefficient in zip(self.optimizer.param_groups, self._coefficients, strict=True):
            weights = [p for p in group["params"] if p.requires_grad] if coefficient else []  # a closure may yet give them gradients
            self._before.append((float(group["lr"]) * coefficient, weights, [w.clone() for w in weights]))

    @torch.no_grad()
    def _decay_cautiously(self, *_: Any) -> None:
        overflow = getattr(self.optimizer, "found_inf", None)  # a GradScaler's, for an optimizer that skips its step by itself
        skipped = overflow is not None and bool(overflow.any())
        for share, weights, before in [] if skipped else self._before:
            for weight, old in zip(weights, before, strict=True):
                if weight.grad is not None:
                    towards_zero = (old - weight) * old >= 0
                    weight.sub_(old * towards_zero, alpha=share)
        self._before = []


def _checked(decay: float | Schedule) -> Schedule:
    remedy = "Leave WeightDecay out to train without weight decay."
    schedule = decay if isinstance(decay, Schedule) else as_schedule(checks.non_negative("decay", decay, remedy=remedy))
    low, high = schedule.bounds()
    if low < 0:
        raise ValueError(f"decay must be >= 0 at every step; got the schedule {schedule}, which spans [{low:g}, {high:g}].")
    return schedule
