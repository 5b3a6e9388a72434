"""What a study compares: a task with its metric, and the task's variants, each of which can run with any seed.

A recipe is a task (``gradreg.train.task``), and so is a function of one's own (``gradreg.study.functions``). The study knows them by these
two interfaces alone.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from gradreg import checks
from gradreg.penalties import GradientPenalty

Mode = Literal["max", "min"]

OnProgress = Callable[[float], None]
"""Told which share of a run is done, 0 to 1."""


@dataclass(frozen=True)
class Metric:
    """What a study judges by.

    Args:
        name: m; a run logs it as ``test_m`` and, on data held out to select by, as ``validation_m``.
        mode: whether larger ("max") or smaller ("min") is better.
        percent: whether values are shares, 0 to 1, that tables show in percent.
    """

    name: str
    mode: Mode = "max"
    percent: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.name):  # type: ignore[unnecessary-isinstance]
            raise ValueError(
                f"metric must be a name of letters, digits and _; got {checks.describe(self.name)}. "
                "Write metric='rmse', say, and log test_rmse."
            )
        if self.name.startswith(("test_", "validation_")):
            raise ValueError(
                f"metric must be named without test_ or validation_, which say on which data it is taken; got {self.name!r}. "
                f"Write metric={self.name.partition('_')[2]!r}."
            )
        checks.choice("mode", self.mode, ("max", "min"))
        checks.flag("percent", self.percent)

    @property
    def test(self) -> str:
        """The key of its test values."""
        return f"test_{self.name}"

    @property
    def validation(self) -> str:
        """The key of its validation values."""
        return f"validation_{self.name}"

    @property
    def unit(self) -> str:
        """Appended to the metric's name: ", %" or nothing."""
        return ", %" if self.percent else ""

    @property
    def difference_unit(self) -> str:
        """Appended to differences in sentences: " points" or nothing."""
        return " points" if self.percent else ""

    @property
    def title(self) -> str:
        """The metric's name in sentences."""
        return self.name.replace("_", " ")

    def shown(self, value: float) -> float:
        """``value`` in the unit of tables."""
        return 100.0 * value if self.percent else value

    def text(self, value: float) -> str:
        """The metric's name and ``value``: ``accuracy 93.80 %``, ``rmse 58.12``."""
        return f"{self.title} {self.shown(value):.2f} %" if self.percent else f"{self.title} {value:.5g}"

    def is_better(self, value: float, than: float) -> bool:
        """Whether ``value`` is better."""
        return value > than if self.mode == "max" else value < than


class Variant(ABC):
    """One configuration of a task. It is pickled to be run in another process."""

    @property
    @abstractmethod
    def method(self) -> str:
        """A description of its penalty and of what else it changes."""

    @property
    @abstractmethod
    def is_plain(self) -> bool:
        """Whether it trains without a penalty."""

    @cached_property
    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """Its configuration in plain values."""

    @property
    def source(self) -> str | None:
        """A digest of the code that is the task's own; None if it has none."""
        return None

    @property
    def place(self) -> str:
        """The file and line of the task's function, which warnings name: ``mine.py, line 7``; empty if it has none."""
        return ""

    @property
    def code(self) -> Path | None:
        """The folder with the code that is the task's own, which workers must have; None if it has none."""
        return None

    @property
    def imports(self) -> str:
        """A module that every run imports, which raises nothing where it cannot be; "" for none."""
        return ""

    @property
    def seed(self) -> int:
        """The first seed of a study."""
        return 0

    @property
    def epochs(self) -> int | None:
        """How long it trains, in epochs or else in steps; None if only a run tells."""
        return None

    @cached_property
    def evaluations(self) -> int | None:
        """Gradient evaluations that a whole run spends; None if only a run tells."""
        return None

    @abstractmethod
    def result(self, folder: Path, seed: int, stretch: Fraction) -> dict[str, Any] | None:
        """The result of the complete run in ``folder``; None if it is not complete.

        Raises:
            ValueError: the folder holds a run of another configuration.
        """

    @abstractmethod
    def run(self, folder: Path, seed: int, stretch: Fraction, on_progress: OnProgress) -> dict[str, Any]:
        """Train, and return the result: the content of ``result.json``.

        Args:
            folder: the run's folder; its ``metrics.jsonl`` has a line for every epoch.
            seed: the run's seed.
            stretch: how many times as long it trains as it otherwise would, for baselines that may spend more, ≥ 1.
            on_progress: told how far it is.
        """


class Task(ABC):
    """What a study asks about."""

    name: str
    """For titles and the default folder."""
    description: str
    metric: Metric

    @cached_property
    def variants(self) -> Mapping[str, Variant]:
        """The variants that the task itself names."""
        return {}

    @abstractmethod
    def configured(self, options: Mapping[str, Any]) -> Task:
        """The task with ``options`` changed for all its variants.

        Raises:
            TypeError, ValueError: as ``variant``.
        """

    @abstractmethod
    def variant(self, penalty: GradientPenalty | Mapping[str, Any] | None, options: Mapping[str, Any]) -> Variant:
        """The task with ``penalty`` (as an object, or as recipes write it) and changed ``options``.

        Raises:
            TypeError, ValueError: an unknown option, or a value that does not fit.
        """


class TaskError(ValueError):
    """A task that breaks the rules of a study, which no other seed would mend."""
