"""Values over optimizer steps: the schedules that a penalty's strength and radius may follow, and the three GR warm-ups.

A schedule is immutable, compares by value, pickles, prints as a person would say it, and turns into a plain dictionary and back.
It is written once for both engines: ``evaluate(step, ops)`` uses only arithmetic and the five functions of ``Operations``, which Python's
``math`` provides for plain numbers and ``jax.numpy`` for traced ones.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeAlias, cast

from gradreg import checks


class Operations(Protocol):
    """The functions a schedule may use beside + − × ÷; ``jax.numpy`` has all of them under these names."""

    @property
    def minimum(self) -> Any: ...
    @property
    def maximum(self) -> Any: ...
    @property
    def where(self) -> Any: ...
    @property
    def cos(self) -> Any: ...


class _PythonOperations:
    minimum = staticmethod(min)
    maximum = staticmethod(max)
    cos = staticmethod(math.cos)

    @staticmethod
    def where(condition: bool, if_true: float, if_false: float) -> float:
        return if_true if condition else if_false


_PYTHON: Operations = _PythonOperations()


class Schedule(ABC):
    """A value as a function of the optimizer step (an integer ≥ 0). Derive from it, as a frozen dataclass, to add one of your own."""

    @abstractmethod
    def evaluate(self, step: Any, ops: Operations) -> Any:
        """The value at ``step``, which may be a traced number: no ``if`` on it, only arithmetic and ``ops``."""

    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """The smallest and largest value over all steps ≥ 0 (a pair that contains them, for products)."""

    def __call__(self, step: int) -> float:
        """The value at optimizer step ``step`` (≥ 0), as a float."""
        return float(self.evaluate(step, _PYTHON))

    def __mul__(self, other: Value) -> Product:
        return Product(left=self, right=other)

    __rmul__ = __mul__

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary (for YAML and JSON) from which ``schedule_from_dict`` builds an equal schedule."""
        name = _NAMES.get(type(self))
        if name is None:
            raise TypeError(
                f"{type(self).__name__} has no name in a dictionary; got {checks.describe(self)}. "
                "Compose it from gradreg.schedules, or keep it in code and out of recipes."
            )
        plain = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]  # every named schedule is a dataclass
        return {"schedule": name, **{k: v.to_dict() if isinstance(v, Schedule) else v for k, v in plain.items()}}


Value: TypeAlias = "float | Schedule"
"""What a penalty's strength or radius may be."""


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """``value`` at every step."""

    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", checks.real("value", self.value))

    def evaluate(self, step: Any, ops: Operations) -> Any:
        return self.value

    def bounds(self) -> tuple[float, float]:
        return self.value, self.value

    def __str__(self) -> str:
        return f"{self.value:g}"


@dataclass(frozen=True, kw_only=True)
class Ramp(Schedule):
    """A straight line: ``start + (end − start) · min(1, step / steps)``.

    Args:
        start: value at step 0, finite.
        end: value from step ``steps`` on, finite.
        steps: optimizer steps, ≥ 1.

    >>> Ramp(start=0.0, end=1.0, steps=4)(1)
    0.25
    """

    start: float = 0.0
    end: float = 1.0
    steps: int

    def __post_init__(self) -> None:
        _set_from_to(self)

    def evaluate(self, step: Any, ops: Operations) -> Any:
        return self.start + (self.end - self.start) * ops.minimum(1.0, step / self.steps)

    def bounds(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)

    def __str__(self) -> str:
        return f"ramp({self.start:g} -> {self.end:g} over {self.steps} steps)"


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine: ``end + (start − end) · (1 + cos(π · min(1, step / steps))) / 2``.

    Args:
        start: value at step 0, finite.
        end: value from step ``steps`` on, finite.
        steps: optimizer steps, ≥ 1.

    >>> round(Cosine(start=1.0, end=0.0, steps=4)(2), 12)
    0.5
    """

    start: float = 1.0
    end: float = 0.0
    steps: int

    def __post_init__(self) -> None:
        _set_from_to(self)

    def evaluate(self, step: Any, ops: Operations) -> Any:
        share = (1.0 + ops.cos(math.pi * ops.minimum(1.0, step / self.steps))) / 2.0
        return share * self.start + (1.0 - share) * self.end

    def bounds(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)

    def __str__(self) -> str:
        return f"cosine({self.start:g} -> {self.end:g} over {self.steps} steps)"


@dataclass(frozen=True, kw_only=True)
class LogTime(Schedule):
    """Logarithmic time: ``value · t0 / (t0 + step)``, whose integral grows as the logarithm of the step.

    Args:
        value: value at step 0, finite.
        t0: steps after which half of it is left, ≥ 1.

    >>> LogTime(value=0.5, t0=100)(100)
    0.25
    """

    value: float
    t0: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", checks.real("value", self.value))
        object.__setattr__(self, "t0", checks.whole("t0", self.t0, minimum=1))

    def evaluate(self, step: Any, ops: Operations) -> Any:
        return self.value * self.t0 / (self.t0 + step)

    def bounds(self) -> tuple[float, float]:
        return min(self.value, 0.0), max(self.value, 0.0)

    def __str__(self) -> str:
        return f"log-time({self.value:g}, t0 {self.t0} steps)"


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


@dataclass(frozen=True, kw_only=True)
class Product(Schedule):
    """``left · right`` at the same step; each is a number or a schedule. ``schedule * 0.5`` and ``a * b`` build it."""

    left: Value
    right: Value

    def __post_init__(self) -> None:
        object.__setattr__(self, "left", as_schedule(self.left))
        object.__setattr__(self, "right", as_schedule(self.right))

    def evaluate(self, step: Any, ops: Operations) -> Any:
        return as_schedule(self.left).evaluate(step, ops) * as_schedule(self.right).evaluate(step, ops)

    def bounds(self) -> tuple[float, float]:
        corners = [a * b for a in as_schedule(self.left).bounds() for b in as_schedule(self.right).bounds()]
        return min(corners), max(corners)

    def __str__(self) -> str:
        return f"{self.left} x {self.right}"


_NAMED: dict[str, type[Schedule]] = {
    "constant": Constant,
    "ramp": Ramp,
    "cosine": Cosine,
    "log-time": LogTime,
    "delay": Delay,
    "product": Product,
}
_NAMES = {cls: name for name, cls in _NAMED.items()}


def _set_from_to(schedule: Ramp | Cosine) -> None:
    object.__setattr__(schedule, "start", checks.real("start", schedule.start))
    object.__setattr__(schedule, "end", checks.real("end", schedule.end))
    remedy = "Leave the schedule out for a constant value."
    object.__setattr__(schedule, "steps", checks.whole("steps", schedule.steps, minimum=1, remedy=remedy))


def schedule_from_dict(data: Mapping[str, Any]) -> Schedule:
    """The schedule that ``Schedule.to_dict`` described: ``{"schedule": "ramp", "start": 0.0, "end": 1.0, "steps": 100}``.

    Raises:
        ValueError: an unknown schedule or key (the nearest known one is named), or a bad value.
        TypeError: no mapping, a missing key, or a value of the wrong type.
    """
    if not isinstance(cast(object, data), Mapping):
        raise TypeError(f"a schedule must be a mapping with the key 'schedule'; got {checks.describe(data)}.")
    kind = data.get("schedule")
    cls = _NAMED.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ValueError(checks.unknown("schedule", kind, _NAMED))
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    arguments = {k: v for k, v in data.items() if k != "schedule"}
    for key, value in arguments.items():
        if key not in known:
            raise ValueError(checks.unknown(f"key of schedule {kind!r}:", key, known))
        if isinstance(value, Mapping):
            arguments[key] = schedule_from_dict(cast("Mapping[str, Any]", value))
    try:
        return cls(**arguments)
    except TypeError as error:
        if "missing" not in str(error):
            raise
        raise TypeError(f"schedule {kind!r} needs {', '.join(known)}; got only {', '.join(arguments) or 'nothing'}.") from None


def as_schedule(value: Value) -> Schedule:
    """``value`` itself if it is a schedule, else the constant of that value."""
    return value if isinstance(value, Schedule) else Constant(value=value)


def warmup(kind: str, strength: Value, radius: Value | None, *, steps: int) -> tuple[Value, Value | None]:
    """Strength and radius under one of the three GR warm-ups, with s = min(1, step / steps).

    - ``"radius"`` (r-warm-up): the radius is s·radius with strength / radius kept, so the strength is s·strength too.
    - ``"strength"`` (λ-warm-up): the radius is kept, the strength is s·strength.
    - ``"zero"`` (zero-warm-up): the strength is 0 (and no second pass runs) while step < steps, then all of it.

    Args:
        kind: "zero", "radius" or "strength".
        strength: the strength λ or γ at the end of the warm-up, ≥ 0.
        radius: the radius r or ε, > 0; None for the exact difference, which then knows no "radius" warm-up.
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
    if strength == 0.0:  # no penalty has nothing to warm up
        return strength, radius
    ramp = Ramp(start=0.0, end=1.0, steps=steps)
    if kind == "zero":
        return Delay(value=strength, steps=steps), radius
    if kind == "strength" or radius is None:
        return as_schedule(strength) * ramp, radius
    return as_schedule(strength) * ramp, as_schedule(radius) * ramp
