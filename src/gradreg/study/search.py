"""``study.tune``: search the strength of a penalty, and options beside it, against plain training that is searched as much.

Optuna proposes, by its tree of Parzen estimators, and keeps the trials where many processes share them. A trial is a configuration that is
run with one seed after the other, paired with the best so far: it is dropped as soon as it is behind. What is chosen, by validation, is
run again with fresh seeds and judged on test (``study.compare``), because the best of many trials looks better than it is.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gradreg.study import statistics
from gradreg.study.plan import Plan
from gradreg.study.search_space import Arm, describe, end_of
from gradreg.study.tasks import Metric, Task, Variant

State = Literal["running", "complete", "dropped", "failed"]

LEVEL = 0.1
"""A trial is dropped where the one-sided paired t test, at this level, says that it is behind the best so far."""
_NEAR = 0.05
"""The share of a range within which a value is said to be at its end."""


@dataclass(frozen=True)
class Finding:
    """What is known of one configuration.

    Args:
        arm: the side of the search that it belongs to.
        number: of the trial in its side.
        values: what was searched: name -> value.
        scores: seed -> validation metric, as logged; None where the run diverged.
        state: "complete" with all seeds, "dropped" behind the best or diverged, "failed" if a run raised, or "running".
        seconds: of all its runs.
        evaluations: gradient evaluations of all its runs.
        error: the last line of the error of a failed one.
    """

    arm: str
    number: int
    values: Mapping[str, Any]
    scores: Mapping[int, float | None]
    state: State
    seconds: float
    evaluations: float
    error: str | None = None

    @property
    def mean(self) -> float | None:
        """The mean over its seeds; None if there is none, or one diverged."""
        there = [score for score in self.scores.values() if score is not None]
        return statistics.mean(there) if there and len(there) == len(self.scores) else None

    def shown_values(self) -> str:
        """What was searched, as "epsilon=0.2, lr=0.1"."""
        shown = {key.removeprefix("penalty."): value for key, value in self.values.items()}
        return ", ".join(f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in shown.items())

    def to_dict(self) -> dict[str, Any]:
        """As in ``search.json``."""
        return {
            "arm": self.arm,
            "trial": self.number,
            "values": dict(self.values),
            "scores": {str(seed): score for seed, score in self.scores.items()},
            "mean": self.mean,
            "state": self.state,
            "seconds": self.seconds,
            "gradient_evaluations": self.evaluations,
            **({} if self.error is None else {"error": self.error}),
        }


@dataclass(frozen=True)
class Search:
    """What is searched.

    Args:
        task: what is trained; it logs ``validation_m``.
        arms: the sides, plain training first.
        trials: of each side that has anything to search, ≥ 1.
        seeds: of a complete trial.
        fresh: of the confirmation; none of ``seeds``.
    """

    task: Task
    arms: Sequence[Arm]
    trials: int
    seeds: Sequence[int]
    fresh: Sequence[int]

    @property
    def searched(self) -> list[Arm]:
        """The sides with anything to search."""
        return [arm for arm in self.arms if arm.space]

    def identity(self, arm: Arm) -> dict[str, Any]:
        """What all processes and restarts of a search must agree on."""
        some = arm.variant(self.task, {key: end_of(one) for key, one in arm.space.items()})
        held = json.dumps(dict(some.settings), sort_keys=True, default=str)
        return {
            "task": self.task.name,
            "metric": f"{self.task.metric.name} ({self.task.metric.mode})",
            "seeds": list(self.seeds),
            "searched": {key: str(one) for key, one in arm.space.items()},
            "options": hashlib.sha256(held.encode()).hexdigest()[:16],
            "source": some.source,
        }

    def confirmation(self, chosen: Mapping[str, Variant]) -> Plan:
        """The comparison of the chosen variants with fresh seeds."""
        task = self.task
        return Plan(task.name, task.description, task.metric, self.arms[0].name, dict(chosen), list(self.fresh))


def is_behind(
    scores: Mapping[int, float], best: Mapping[int, float], others: Sequence[Mapping[int, float]], *, mode: Literal["max", "min"]
) -> bool:
    """Whether a trial is behind the best so far over the seeds that both have, so that more seeds would be wasted on it.

    One-sided paired t test at ``LEVEL``. The spread of a difference is taken from the complete trials, pooled, where there are any, so that
    one seed can be enough; before that from the trial's own differences, from two seeds on.

    Args:
        scores: seed -> metric of the trial.
        best: of the best complete trial.
        others: of the other complete trials.
        mode: whether larger ("max") or smaller ("min") is better.
    """
    from scipy import special

    sign = 1.0 if mode == "max" else -1.0
    differences = [sign * (scores[seed] - best[seed]) for seed in scores if seed in best]
    if not differences:
        return False
    mean = statistics.mean(differences) or 0.0
    pooled = [_squares([other[seed] - best[seed] for seed in other if seed in best]) for other in others]
    squares, freedom = math.fsum(one[0] for one in pooled), sum(one[1] for one in pooled)
    if freedom == 0:
        squares, freedom = _squares(differences)
    if freedom == 0:
        return False
    error = math.sqrt(squares / freedom / len(differences))
    return mean < float(special.stdtrit(freedom, LEVEL)) * error


def _squares(values: Sequence[float]) -> tuple[float, int]:
    """The sum of squares about the mean, and its degrees of freedom."""
    spread, freedom = statistics.deviation(values), len(values) - 1
    return (0.0, 0) if spread is None else (freedom * spread**2, freedom)


def winner(findings: Sequence[Finding], arm: Arm, metric: Metric) -> Finding:
    """The complete trial of a side with the best mean.

    Raises:
        RuntimeError: no trial of it is complete.
    """
    best = best_of([one for one in findings if one.arm == arm.name and one.state == "complete"], metric)
    if best is None:
        own = [one for one in findings if one.arm == arm.name]
        failed = [one for one in own if one.error is not None]
        reason = f"the first with {failed[0].error}" if failed else "all diverged at some seed"
        raise RuntimeError(
            f"no trial of {arm.name} is complete, of {len(own)}: {reason}. Search other values, as in "
            "--search rho=log:1e-3:0.1, or correct the task."
        )
    return best


def at_an_end(finding: Finding, arm: Arm) -> list[str]:
    """What lies at an end of its range, where the best may be beyond it, in words."""
    found: list[str] = []
    for key, one in arm.space.items():
        low, high, value = getattr(one, "low", None), getattr(one, "high", None), finding.values.get(key)
        if low is None or high is None or value is None:
            continue
        place = math.log(value / low) / math.log(high / low) if one.log else (value - low) / (high - low)  # type: ignore[attr-defined]
        if min(place, 1 - place) < _NEAR:
            found.append(
                f"{arm.name}: {key}={value:.3g} is at the {'lower' if place < 0.5 else 'upper'} end of its range, "
                f"{describe(one)}; widen it with --search"
            )
    return found


def best_of(complete: Sequence[Finding], metric: Metric) -> Finding | None:
    """The one with the best mean, of equal ones the first; None of none."""
    sign = 1.0 if metric.mode == "max" else -1.0
    judged = [(sign * one.mean, -one.number, one) for one in complete if one.mean is not None]
    return max(judged, key=lambda entry: entry[:2])[2] if judged else None


def finite(scores: Mapping[int, float | None]) -> dict[int, float]:
    """The scores of the runs that did not diverge."""
    return {seed: score for seed, score in scores.items() if score is not None}


def _isfinite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
