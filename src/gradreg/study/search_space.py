"""What a search varies: the strengths of a penalty around its paper's values, and any option of the task beside them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from gradreg import checks
from gradreg.registry import CONSTRUCTORS
from gradreg.study.tasks import Task, Variant
from gradreg.study.variants import BASELINE, parse_penalty

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

SYNTAX = "Write lr=log:1e-3:1 (log-uniform), dropout=0:0.5 (uniform), width=16:256 (whole numbers), or optimizer.name=sgd|adamw (a choice)."


@dataclass(frozen=True)
class Strengths:
    """What is searched of a penalty when nothing else is said.

    Args:
        ranges: argument -> lowest and highest value, between which it is drawn log-uniformly.
        follows: argument -> the one whose value it takes.
        kept: argument -> its value.
    """

    ranges: Mapping[str, tuple[float, float]]
    follows: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, float] = field(default_factory=dict)


_EPSILON_LEADS = {"gamma": "epsilon"}

STRENGTHS: dict[str, Strengths] = {
    "sam": Strengths({"rho": (0.01, 1.0)}),
    "gnp": Strengths({"r": (0.01, 1.0)}, kept={"alpha": 0.8}),
    "fgr": Strengths({"epsilon": (0.01, 1.0)}, follows=_EPSILON_LEADS),
    "bgr": Strengths({"epsilon": (0.003, 0.3)}, follows=_EPSILON_LEADS),
    "cgr": Strengths({"epsilon": (0.003, 0.3)}, follows=_EPSILON_LEADS),
    "exact": Strengths({"gamma": (0.001, 0.3)}),
    "asam": Strengths({"rho": (0.1, 5.0)}),
    "layerwise_sam": Strengths({"rho": (0.001, 0.1)}),
    "le_sam": Strengths({"sigma": (0.02, 2.0)}),
    "unified_sam": Strengths({"rho": (0.01, 1.0)}),
    "mup2_sam": Strengths({"rho": (0.01, 1.0)}),
    "friendly_sam": Strengths({"rho": (0.01, 1.0)}),
    "remembered": Strengths({"epsilon": (0.01, 1.0)}),
    "msam": Strengths({"rho": (0.01, 3.0)}),
    "random_sam": Strengths({"rho": (0.1, 10.0)}),
    "flat_lora": Strengths({"sigma": (0.01, 0.5)}),
    "gsam": Strengths({"rho": (0.01, 1.0)}, kept={"a": 0.2}),
    "wsam": Strengths({"rho": (0.01, 1.0)}, kept={"gamma": 0.9}),
    "looksam": Strengths({"rho": (0.01, 1.0)}),
}
"""Constructor -> its strengths: from a fifth of the smallest value that its paper reports to more than its largest.

F-GR, B-GR and C-GR are searched along γ = ε, which leaves out the plain gradient: the paper finds large ε best, and on the tasks of
docs/choosing.md no other ratio is clearly better. ``--search gamma=log:1e-3:1`` searches both.
"""


@dataclass(frozen=True)
class Arm:
    """One side of a search: plain training, or a penalty, with what is varied of it.

    Args:
        name: of the side, and of its row in the table.
        penalty: the penalty as recipes write it, without what is searched; None for plain training.
        options: changed options of the task.
        space: what is searched: "penalty.rho" for an argument of the penalty, the option's own name for an option; Optuna distributions.
        follows: argument of the penalty -> the one whose value it takes.
    """

    name: str
    penalty: Mapping[str, Any] | None
    options: Mapping[str, Any]
    space: Mapping[str, BaseDistribution]
    follows: Mapping[str, str] = field(default_factory=dict)

    def variant(self, task: Task, values: Mapping[str, Any]) -> Variant:
        """The task with ``values`` for what is searched.

        Raises:
            TypeError, ValueError: a value, or an option, that the task or the penalty refuses.
        """
        arguments = {key.removeprefix(_OF_PENALTY): value for key, value in values.items() if key.startswith(_OF_PENALTY)}
        options = {**self.options, **{key: value for key, value in values.items() if not key.startswith(_OF_PENALTY)}}
        if self.penalty is None:
            return task.variant(None, options)
        block = {**self.penalty, **arguments}
        return task.variant({**block, **{key: block[leader] for key, leader in self.follows.items()}}, options)

    def to_dict(self) -> dict[str, Any]:
        """As in ``search.json``."""
        return {
            "name": self.name,
            "penalty": None if self.penalty is None else dict(self.penalty),
            "options": dict(self.options),
            "space": {key: describe(one) for key, one in self.space.items()},
            "follows": dict(self.follows),
        }


_OF_PENALTY = "penalty."


def arms(task: Task, penalties: Sequence[str], search: Mapping[str, Any]) -> list[Arm]:
    """The sides of a search: plain training first, then each penalty.

    Args:
        task: what is trained.
        penalties: texts such as "fgr" or "sam:every=5@lr=0.05", whose strengths are searched but for those that the text gives.
        search: name of an argument of the penalties, or of an option of the task -> a range as ``SYNTAX`` has it, a list of choices, or an
            Optuna distribution. "penalty.NAME" where both have one of that name.

    Raises:
        TypeError, ValueError: an unknown penalty, name or range; a range that the task refuses; nothing to search.
    """
    if isinstance(penalties, str) or not penalties:
        raise ValueError(f"penalty must name at least one penalty; got {checks.describe(penalties)}. Write --penalty fgr, say.")
    ranges = {name: as_range(name, value) for name, value in search.items()}
    parsed = [(text, *parse_penalty(text)) for text in dict.fromkeys(penalties)]
    found: list[Arm] = []
    used: set[str] = set()
    for text, penalty, options in parsed:
        if penalty is None:
            raise ValueError(f"penalty must be one that is tuned; got {text!r}: plain training is always searched beside it. Leave it out.")
        if penalty["name"] not in CONSTRUCTORS:
            raise ValueError(checks.unknown("penalty", penalty["name"], CONSTRUCTORS))
        arm, of_penalty = _arm(text, penalty, options, ranges)
        used |= of_penalty
        found.append(arm)
    shared = {name: one for name, one in ranges.items() if name not in used}
    names = {arm.name for arm in found}
    plain = Arm(BASELINE if BASELINE not in names else "plain", None, {}, shared)
    both = [plain, *(Arm(arm.name, arm.penalty, arm.options, {**arm.space, **shared}, arm.follows) for arm in found)]
    for arm in both:
        for end in ("low", "high"):
            _try(arm, task, end)
    return both


def _arm(text: str, penalty: dict[str, Any], options: Mapping[str, Any], ranges: Mapping[str, BaseDistribution]) -> tuple[Arm, set[str]]:
    """The side of one penalty without the task's options, and which of ``ranges`` are of its arguments."""
    from optuna.distributions import FloatDistribution

    name = penalty["name"]
    arguments = inspect.signature(CONSTRUCTORS[name]).parameters
    strengths = STRENGTHS.get(name, Strengths({}))
    own = {key: key.removeprefix(_OF_PENALTY) for key in ranges if key.removeprefix(_OF_PENALTY) in arguments}
    given = {*penalty, *own.values()}
    space: dict[str, Any] = {_OF_PENALTY + argument: ranges[key] for key, argument in own.items()}
    for argument, (low, high) in strengths.ranges.items():
        if argument not in given and argument not in strengths.follows:
            space[_OF_PENALTY + argument] = FloatDistribution(low, high, log=True)
    block = {**{key: value for key, value in strengths.kept.items() if key not in given}, **penalty}
    follows = {
        key: leader
        for key, leader in strengths.follows.items()
        if key not in given and (leader in penalty or _OF_PENALTY + leader in space)
    }
    return Arm(text, block, options, space, follows), set(own)


def _try(arm: Arm, task: Task, end: Literal["low", "high"]) -> None:
    """Build the variant at an end of the ranges, so that what the task refuses is said before anything is trained."""
    values = {key: end_of(one, end) for key, one in arm.space.items()}
    try:
        arm.variant(task, values)
    except (TypeError, ValueError) as error:
        told = ", ".join(f"{key}={value}" for key, value in values.items())
        raise type(error)(f"{arm.name}, searched at {told or 'its own values'}: {error}") from error


def as_range(name: str, value: Any) -> BaseDistribution:
    """The Optuna distribution that ``value`` describes, as ``SYNTAX`` has it.

    Raises:
        TypeError, ValueError: another form, ends that are not numbers or not in order, or a logarithm of what is not positive.
    """
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(value, BaseDistribution):
        return value
    if isinstance(value, (list, tuple)) and value:
        return CategoricalDistribution(list(value))
    if not isinstance(value, str):
        raise TypeError(f"search must give {name} a range or a list of choices; got {checks.describe(value)}. {SYNTAX}")
    if "|" in value:
        return CategoricalDistribution([_scalar(one) for one in value.split("|")])
    kind, *ends = value.split(":")
    log = kind == "log"
    low, high = (_scalar(one) for one in (ends if log else [kind, *ends])[:2]) if len(ends) == (2 if log else 1) else (None, None)
    if not all(isinstance(end, (int, float)) and not isinstance(end, bool) and math.isfinite(end) for end in (low, high)):
        raise ValueError(f"search must give {name} a range or choices; got {value!r}. {SYNTAX}")
    assert isinstance(low, (int, float))
    assert isinstance(high, (int, float))
    if not low < high:
        raise ValueError(f"the range of {name} must rise; got {value!r}. Put the lower end first.")
    if log and low <= 0:
        raise ValueError(f"a log-uniform range must lie above 0; got {value!r} for {name}. Raise its lower end, or leave out log:.")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)


def suggest(trial: Any, name: str, one: BaseDistribution) -> Any:
    """A value for ``name`` from the range ``one``, as the sampler of the trial's study proposes it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(one, FloatDistribution):
        return trial.suggest_float(name, one.low, one.high, log=one.log, step=one.step)
    if isinstance(one, IntDistribution):
        return trial.suggest_int(name, one.low, one.high, log=one.log, step=one.step)
    assert isinstance(one, CategoricalDistribution)
    return trial.suggest_categorical(name, one.choices)


def parse_search(texts: Sequence[str]) -> dict[str, str]:
    """``["lr=log:1e-3:1", ...]`` as a dictionary.

    Raises:
        ValueError: no ``=``, or a name twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or not value:
            raise ValueError(f"--search must be written NAME=RANGE; got {text!r}. {SYNTAX}")
        if name.strip() in found:
            raise ValueError(f"--search must name each option once; got {name.strip()!r} twice. Remove one.")
        found[name.strip()] = value
    return found


def describe(one: BaseDistribution) -> str:
    """A range in the words of ``SYNTAX``."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(one, CategoricalDistribution):
        return "|".join(map(str, one.choices))
    if isinstance(one, (FloatDistribution, IntDistribution)):
        return f"{'log:' if one.log else ''}{one.low:g}:{one.high:g}"
    return str(one)


def end_of(one: Any, end: Literal["low", "high"] = "low") -> Any:
    """The lowest or highest value of a range; the first or last choice."""
    choices = getattr(one, "choices", None)
    return getattr(one, end) if choices is None else choices[0 if end == "low" else -1]


def _scalar(text: str) -> Any:
    text = text.strip()
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)
