"""When a penalty acts: schedules that are exactly 0 at some steps, where no second pass is made, and the three GR warm-ups.

Like all schedules they are written once for both engines (``gradreg.schedules``).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, cast

from gradreg import checks
from gradreg.hashing import hashed
from gradreg.schedules import Operations, Product, Ramp, Schedule, Value, as_schedule, inside, register


@register("delay")
@dataclass(frozen=True, kw_only=True)
class Delay(Schedule):
    """Exactly 0 while ``step < steps``, afterwards ``value`` at the same step (its clock is not shifted).

    Args:
        value: a number or a schedule; kept as a schedule.
        steps: optimizer steps, ≥ 1.

    >>> late = Delay(value=0.1, steps=3)
    >>> late(2), late(3)
    (0.0, 0.1)
    """

    value: Value
    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", as_schedule(self.value))
        object.__setattr__(self, "steps", checks.whole("steps", self.steps, minimum=1))

    def evaluate(self, step: Any, ops: Operations) -> Any:
        return ops.where(step < self.steps, 0.0, as_schedule(self.value).evaluate(step, ops))

    def bounds(self) -> tuple[float, float]:
        low, high = as_schedule(self.value).bounds()
        return min(low, 0.0), max(high, 0.0)

    def __str__(self) -> str:
        return f"{self.value} from step {self.steps}"


@register("tail")
@dataclass(frozen=True, kw_only=True)
class Tail(Schedule):
    """``value`` in the last ``share`` of a run whose length is not known yet, and exactly 0 before: ``over`` makes a ``Delay`` of it.

    Args:
        value: a number or a schedule; kept as a schedule.
        share: of the run's optimizer steps, in (0, 1].
    """

    value: Value
    share: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", as_schedule(self.value))
        object.__setattr__(self, "share", checks.probability("share", self.share))

    def evaluate(self, step: Any, ops: Operations) -> Any:
        raise ValueError(
            f"total_steps must be known where a penalty acts in the tail of a run; got {self}. Write penalty.over(total_steps=...); in "
            "a task of a study run.regularizer(model, total_steps=...)."
        )

    def bounds(self) -> tuple[float, float]:
        low, high = as_schedule(self.value).bounds()
        return min(low, 0.0), max(high, 0.0)

    def __str__(self) -> str:
        return f"{self.value} in the last {100 * self.share:g} % of the steps"


@register("every")
@dataclass(frozen=True, kw_only=True)
class Every(Schedule):
    """``value`` at steps that are multiples of ``k``, and exactly 0 between them.

    Args:
        k: optimizer steps, ≥ 1.
        value: what it is there, > 0.

    >>> [Every(k=3)(step) for step in range(5)]
    [1.0, 0.0, 0.0, 1.0, 0.0]
    """

    k: int
    value: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", checks.whole("k", self.k, minimum=1))
        object.__setattr__(self, "value", checks.positive("value", self.value))

    def evaluate(self, step: Any, ops: Operations) -> Any:
        return ops.where(step % self.k == 0, self.value, 0.0)

    def bounds(self) -> tuple[float, float]:
        return 0.0 if self.k > 1 else self.value, self.value

    def __str__(self) -> str:
        return f"{self.value:g} every {self.k} steps"


@register("chance")
@dataclass(frozen=True, kw_only=True)
class Chance(Schedule):
    """``value`` with probability ``p``, else exactly 0: drawn for each step from the seed and the step alone (``gradreg.hashing``).

    Args:
        p: probability, in (0, 1].
        seed: a whole number from 0 to 2³² − 1.
        value: what it is then, > 0.

    >>> [Chance(p=0.5)(step) for step in range(6)]
    [1.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    """

    p: float
    seed: int = 0
    value: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", checks.probability("p", self.p))
        object.__setattr__(self, "seed", checks.seed(self.seed))
        object.__setattr__(self, "value", checks.positive("value", self.value))

    def evaluate(self, step: Any, ops: Operations) -> Any:
        if self.p == 1.0:  # 2³² itself would not fit into 32 bits
            return self.value
        threshold = ops.uint32(min(round(self.p * 2**32), 2**32 - 1))
        return ops.where(hashed(self.seed, step, ops.uint32) < threshold, self.value, 0.0)

    def bounds(self) -> tuple[float, float]:
        return 0.0 if self.p < 1.0 else self.value, self.value

    def __str__(self) -> str:
        return f"{self.value:g} with probability {self.p:g} (seed {self.seed})"


def over(value: Value, total_steps: int) -> Value:
    """``value`` in a run of ``total_steps`` optimizer steps (≥ 1): each ``Tail``, at any depth, becomes a ``Delay``.

    The tail has ``share · total_steps`` steps, rounded to a whole number; one of all steps is no delay.

    >>> over(Tail(value=0.1, share=0.3), total_steps=10)(6), over(Tail(value=0.1, share=0.3), total_steps=10)(7)
    (0.0, 0.1)
    """
    if not isinstance(value, Schedule) or not any(isinstance(schedule, Tail) for schedule in inside(value)):
        return value
    held = [field.name for field in fields(cast(Any, value)) if isinstance(getattr(value, field.name), Schedule)]
    if not isinstance(value, Tail):
        return replace(cast(Any, value), **{name: over(getattr(value, name), total_steps) for name in held})
    inner, start = over(value.value, total_steps), total_steps - round(value.share * total_steps)
    return Delay(value=inner, steps=start) if start else inner


def where_it_acts(value: Value) -> Schedule:
    """``value`` without the factors that only switch it off at some steps; two values with equal results are equal wherever both act.

    >>> from gradreg.schedules import Constant
    >>> where_it_acts(Delay(value=Constant(value=0.1) * Every(k=3), steps=5))
    Constant(value=0.1)
    """
    schedule = as_schedule(value)
    if isinstance(schedule, (Delay, Tail)):
        return where_it_acts(schedule.value)
    if isinstance(schedule, Product) and isinstance(schedule.right, (Every, Chance)) and schedule.right.value == 1.0:
        return where_it_acts(schedule.left)
    return schedule


def warmup(kind: str, strength: Value, radius: Value | None, *, steps: int) -> tuple[Value, Value | None]:
    """Strength and radius under one of the three GR warm-ups, with s = min(1, step / steps).

    - ``"radius"`` (r-warm-up): the radius is s·radius with strength / radius kept, so the strength is s·strength too.
    - ``"strength"`` (λ-warm-up): the radius is kept, the strength is s·strength.
    - ``"zero"`` (zero-warm-up): the strength is 0 (and no second pass runs) while step < steps, then all of it.

    Args:
        kind: "zero", "radius" or "strength".
        strength: the strength λ or γ at the end of the warm-up, ≥ 0.
        radius: the radius r or ε, > 0; None for the exact difference, which has no "radius" warm-up.
        steps: optimizer steps of the warm-up, ≥ 1.

    Source: Zhao et al. 2024, arXiv 2406.09723, section 4.
    Differs from the paper: the three are defined for power 2 (γ, ε) as well, by the same factors.
    """
    checks.choice("warm-up", kind, ("zero", "radius", "strength"))
    steps = checks.whole("steps", steps, minimum=1, remedy="Leave .warmup() out to have the whole penalty from the first step.")
    if kind == "radius" and radius is None:
        raise ValueError(
            "warm-up 'radius' needs a finite-difference radius; got an exact penalty, which has none. Use 'strength' or 'zero'."
        )
    if strength == 0.0:  # without a penalty there is nothing to warm up
        return strength, radius
    ramp = Ramp(start=0.0, end=1.0, steps=steps)
    if kind == "zero":
        return Delay(value=strength, steps=steps), radius
    if kind == "strength" or radius is None:
        return as_schedule(strength) * ramp, radius
    return as_schedule(strength) * ramp, as_schedule(radius) * ramp
