"""Values over optimizer steps: the schedules that a penalty's strength and radius may follow.

A schedule is immutable, compares by value, pickles, prints readably, and converts to a plain dictionary and back.
It is written once for both engines: ``evaluate(step, ops)`` uses only arithmetic and the functions of ``Operations``, which Python's
``math`` provides for plain numbers and ``jax.numpy`` for traced ones.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar, cast

from gradreg import checks
from gradreg.hashing import masked
from gradreg.serialization import from_plain, to_plain


class Operations(Protocol):
    """The functions a schedule may use besides + − × ÷ and the remainder; ``jax.numpy`` has all of them under these names."""

    @property
    def minimum(self) -> Any: ...
    @property
    def maximum(self) -> Any: ...
    @property
    def where(self) -> Any: ...
    @property
    def cos(self) -> Any: ...
    @property
    def uint32(self) -> Any: ...


class _PythonOperations:
    minimum = staticmethod(min)
    maximum = staticmethod(max)
    cos = staticmethod(math.cos)
    uint32 = staticmethod(masked)

    @staticmethod
    def where(condition: bool, if_true: float, if_false: float) -> float:
        return if_true if condition else if_false


PYTHON: Operations = _PythonOperations()
"""``Operations`` of plain numbers."""


class Schedule(ABC):
    """A value as a function of the optimizer step (an integer ≥ 0). Derive from it, as a frozen dataclass, to add one of your own."""

    needs_step: ClassVar[bool] = True
    """Whether its value at two steps may differ by their number alone."""

    @abstractmethod
    def evaluate(self, step: Any, ops: Operations) -> Any:
        """The value at ``step``, which may be a traced number: no ``if`` on it, only arithmetic and ``ops``."""

    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """The smallest and largest value over all steps ≥ 0 (a pair that contains them, for products)."""

    def __call__(self, step: int) -> float:
        """The value at optimizer step ``step`` (≥ 0), as a float."""
        return float(self.evaluate(step, PYTHON))

    def __mul__(self, other: Value) -> Product:
        return Product(left=self, right=other)

    __rmul__ = __mul__

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary (for YAML and JSON) from which ``schedule_from_dict`` builds an equal schedule."""
        return to_plain(self, "schedule", _NAMED)


class JaxScalar(Protocol):
    """A scalar array of JAX, traced or not, as this module knows it without importing JAX."""

    @property
    def aval(self) -> Any: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


Value: TypeAlias = "float | Schedule | JaxScalar"
"""What a penalty's strength or radius may be. A penalty that is built keeps a ``JaxScalar`` as ``Traced``."""


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


@dataclass(frozen=True, eq=False)
class Traced(Schedule):
    """A scalar array of JAX at every step: a number that a program receives when it runs, so that ``vmap`` over it works.

    Equal to itself and to another one of the same array, never to a number. It has no form as a dictionary.

    Args:
        value: a real scalar array, traced or not. It must be ≥ 0; where it turns out negative, the gradient is not finite.
    """

    value: Any

    needs_step: ClassVar[bool] = False

    def evaluate(self, step: Any, ops: Operations) -> Any:
        return self.value

    def bounds(self) -> tuple[float, float]:
        return 0.0, sys.float_info.max

    def to_dict(self) -> dict[str, Any]:
        raise TypeError(f"a traced value has no form as a dictionary; got {self.value}. Convert it to a number first: float(value).")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Traced) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __str__(self) -> str:
        return "traced"


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
class Anneal(Schedule):
    """``value`` until step ``start``, then half a cosine to 0 at ``start + steps``, and 0 from there on.

    Args:
        value: finite.
        start: the last step with the whole of it, ≥ 0.
        steps: optimizer steps of the fall, ≥ 1.

    >>> end = Anneal(value=0.5, start=8, steps=2)
    >>> end(8), round(end(9), 12), end(10)
    (0.5, 0.25, 0.0)
    """

    value: float
    start: int
    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", checks.real("value", self.value))
        object.__setattr__(self, "start", checks.whole("start", self.start, minimum=0))
        remedy = "Leave the schedule out for a constant value."
        object.__setattr__(self, "steps", checks.whole("steps", self.steps, minimum=1, remedy=remedy))

    def evaluate(self, step: Any, ops: Operations) -> Any:
        share = ops.minimum(1.0, ops.maximum(0.0, (step - self.start) / self.steps))
        # Of a traced step the cosine of π may round to a little more than −1, which must not leave a radius of 1e-8.
        return ops.where(share == 1.0, 0.0, self.value * (1.0 + ops.cos(math.pi * share)) / 2.0)

    def bounds(self) -> tuple[float, float]:
        return min(self.value, 0.0), max(self.value, 0.0)

    def __str__(self) -> str:
        return f"{self.value:g} annealed to 0 (steps {self.start} to {self.start + self.steps})"


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
        # Whole numbers divided by 1 are floats: JAX's strict promotion refuses to divide a float by an array of integers.
        return self.value * self.t0 / ((self.t0 + step) / 1)

    def bounds(self) -> tuple[float, float]:
        return min(self.value, 0.0), max(self.value, 0.0)

    def __str__(self) -> str:
        return f"log-time({self.value:g}, t0 {self.t0} steps)"


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
        pairs = [(a, b) for a in as_schedule(self.left).bounds() for b in as_schedule(self.right).bounds()]
        corners = [a * b if a and b else 0.0 for a, b in pairs]  # 0·∞ is 0
        return min(corners), max(corners)

    def __str__(self) -> str:
        return f"{self.left} x {self.right}"


_NAMED: dict[str, type[Schedule]] = {
    "constant": Constant,
    "ramp": Ramp,
    "cosine": Cosine,
    "anneal": Anneal,
    "log-time": LogTime,
    "product": Product,
}


S = TypeVar("S", bound=type[Schedule])


def register(name: str) -> Callable[[S], S]:
    """Let dictionaries know the class of schedules that this decorates as ``name``."""

    def named(cls: S) -> S:
        _NAMED[name] = cls
        return cls

    return named


def inside(schedule: Schedule) -> Iterator[Schedule]:
    """``schedule`` and all schedules that its fields hold, at any depth."""
    yield schedule
    for field in fields(cast(Any, schedule)) if hasattr(schedule, "__dataclass_fields__") else ():
        held = getattr(schedule, field.name)
        if isinstance(held, Schedule):
            yield from inside(held)


def _set_from_to(schedule: Ramp | Cosine) -> None:
    object.__setattr__(schedule, "start", checks.real("start", schedule.start))
    object.__setattr__(schedule, "end", checks.real("end", schedule.end))
    remedy = "Leave the schedule out for a constant value."
    object.__setattr__(schedule, "steps", checks.whole("steps", schedule.steps, minimum=1, remedy=remedy))


def schedule_from_dict(data: Mapping[str, Any]) -> Schedule:
    """The schedule that ``Schedule.to_dict`` described: ``{"schedule": "ramp", "start": 0.0, "end": 1.0, "steps": 100}``.

    Raises:
        ValueError: an unknown schedule or key (the nearest known one is named), or a bad value.
        TypeError: not a mapping, a missing key, or a value of the wrong type.
    """
    return from_plain(data, "schedule", _NAMED, nested=schedule_from_dict)


def as_schedule(value: Value) -> Schedule:
    """``value`` itself if it is a schedule, else the constant of that value."""
    if isinstance(value, Schedule):
        return value
    return Traced(value) if is_jax_scalar(value) else Constant(value=cast(float, value))


def is_jax_scalar(value: object) -> bool:
    """Whether ``value`` is an array of JAX of shape (), traced or not."""
    return hasattr(value, "aval") and getattr(value, "shape", None) == ()


def is_constant(value: Value | None) -> bool:
    """Whether ``value`` is the same at every step."""
    if isinstance(value, Product):
        return is_constant(value.left) and is_constant(value.right)
    if not isinstance(value, Schedule) or not value.needs_step:
        return True
    low, high = value.bounds()
    return low == high
