"""``study.tune``: search the strength of a penalty, and options beside it, against plain training that is searched as much.

Optuna proposes, by its tree of Parzen estimators, and keeps the trials where many processes share them. A trial is a configuration that is
run with one seed after the other, paired with the best so far: it is dropped as soon as it is behind. What is chosen, by validation, is
run again with fresh seeds and judged on test (``study.compare``), because the best of many trials looks better than it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gradreg.folders import FolderInUse, locked
from gradreg.study import statistics
from gradreg.study.plan import Job, Plan, folder_name
from gradreg.study.results import Record
from gradreg.study.search_space import Arm, describe, end_of, suggest
from gradreg.study.tasks import Metric, Task, TaskError, Variant
from gradreg.study.workers import OnProgress, run_jobs

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

State = Literal["running", "complete", "dropped", "failed"]

LEVEL = 0.1
"""A trial is dropped where the one-sided paired t test, at this level, says that it is behind the best so far."""
JOURNAL = "search.journal"
_UNSIGNED = 60.0
"""Seconds after which a trial that no process has signed is taken for one whose process ended before it could."""


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
    mean = math.fsum(differences) / len(differences)
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
    if len(values) < 2:
        return 0.0, 0
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values), len(values) - 1


def open_storage(where: str | None, folder: Path) -> BaseStorage:
    """Where trials are kept and shared: a journal file in the search's folder by default.

    Args:
        where: None; "memory"; "journal:FILE", a file on a disk that all processes see; or a URL as SQLAlchemy has it
            ("sqlite:///FILE", "postgresql://USER@HOST/NAME").
        folder: of the search.

    Raises:
        ValueError: another form, or a data base that cannot be reached.
    """
    import optuna
    from optuna.storages import InMemoryStorage, JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if where == "memory":
        return InMemoryStorage()
    kind, colon, rest = (where or "").partition(":")
    if where is None or (kind == "journal" and rest):
        file = folder / JOURNAL if where is None else Path(rest)
        file.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(file)))
    if not colon or not rest.startswith("//"):
        raise ValueError(
            f"storage must be memory, journal:FILE, or a URL such as sqlite:///search.db or postgresql://user@host/name; got {where!r}."
        )
    return _data_base(where)


def _data_base(url: str) -> BaseStorage:
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import SQLAlchemyError

    waits = {"timeout": 60} if url.startswith("sqlite") else {"connect_timeout": 10} if url.startswith("postgresql") else {}
    try:
        return RDBStorage(url, engine_kwargs={"connect_args": waits, "pool_pre_ping": True})
    except (SQLAlchemyError, ImportError, ValueError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise ValueError(f"storage must be a data base that can be reached; got {_without_password(url)!r}: {reason}") from error


def _without_password(url: str) -> str:
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url.partition("://")[0] + "://..."


@dataclass
class _Active:
    """A trial that this process runs."""

    arm: Arm
    study: Study
    trial: Trial
    variant: Variant
    scores: dict[int, float | None]
    seconds: float = 0.0
    evaluations: float = 0.0

    def job(self, seed: int) -> Job:
        """Its run with a seed: trials of equal values share it."""
        held = json.dumps({"values": self.trial.params}, sort_keys=True)
        name = f"{folder_name(self.arm.name)}-{hashlib.sha256(held.encode()).hexdigest()[:10]}"
        return Job(name, seed, "epochs", self.variant.evaluations, self.variant)


class Searcher:
    """One process of a search, which may share its storage with others; within it, trials run in worker processes.

    Args:
        search: what is searched.
        folder: for the runs.
        storage: of the trials.
        on_trial: told of every trial that ends here.
    """

    def __init__(
        self, search: Search, folder: Path, storage: BaseStorage, *, on_trial: Callable[[Finding], None] = lambda one: None
    ) -> None:
        import optuna

        self.search, self.folder = search, folder
        self._on_trial = on_trial
        self._active: list[_Active] = []
        self._signature = {"host": socket.gethostname(), "folder": str((folder / "processes" / uuid.uuid4().hex[:12]).resolve())}
        direction = "maximize" if search.task.metric.mode == "max" else "minimize"
        self._studies: dict[str, Study] = {}
        for arm in search.searched:
            study = optuna.create_study(
                storage=storage, study_name=f"{search.task.name}: {arm.name}", direction=direction, load_if_exists=True
            )
            _agree(study, search.identity(arm))
            self._studies[arm.name] = study

    def run(self, *, workers: int, on_progress: OnProgress = lambda job, share: None) -> None:
        """Run trials until every side has as many as it is to have; those that another process runs are left to it.

        Raises:
            TaskError: the task breaks the rules of a study, or logs no validation metric.
            RuntimeError: a worker died.
        """
        with locked(Path(self._signature["folder"]), purpose="--out"):
            jobs = run_jobs(lambda: self._jobs(max(1, workers)), self.folder / "trials", workers=workers, on_progress=on_progress)
            with contextlib.closing(jobs) as ended:
                for job, result in ended:
                    self._take(job, result)

    def findings(self) -> list[Finding]:
        """All trials, of all processes, in the order in which they began."""
        return [
            _finding(arm, trial)
            for arm in self.search.searched
            for trial in self._studies[arm.name].get_trials(deepcopy=False)
            if trial.state.name not in ("FAIL", "WAITING")
        ]

    def _jobs(self, slots: int) -> list[Job]:
        """The runs that are wanted now: the next seed of each active trial; trials begin while there are fewer than ``slots``."""
        jobs: dict[str, Job] = {}
        while True:
            for active in [*self._active]:
                job = self._next(active)
                if job is not None:
                    jobs.setdefault(job.folder, job)
            if len(self._active) >= slots or not self._begin():
                return list(jobs.values())

    def _next(self, active: _Active) -> Job | None:
        """The next run of a trial; None if it has ended, which the results of earlier runs may show."""
        while True:
            if self._ended(active):
                return None
            seed = next(seed for seed in self.search.seeds if seed not in active.scores)
            job = active.job(seed)
            place = self.folder / "trials" / job.folder
            result = active.variant.result(place, seed, job.stretch) if place.is_dir() else None
            if result is None:
                return job
            self._score(active, job, result)

    def _take(self, job: Job, result: Mapping[str, Any]) -> None:
        for active in [*self._active]:
            if job.seed not in active.scores and active.job(job.seed).folder == job.folder:
                self._score(active, job, result)

    def _score(self, active: _Active, job: Job, result: Mapping[str, Any]) -> None:
        record = Record.of(job, result, self.search.task.metric)
        if record.error is not None:
            self._end(active, "failed", error=record.error)
            return
        if record.validation is None and not record.diverged:
            metric = self.search.task.metric
            raise TaskError(
                f"a search selects by {metric.validation}, which {self.search.task.name} does not log: test is for the verdict. Hold data "
                f"out and write run.log({metric.validation}=...); in a recipe, --data.validation 0.1."
            )
        score = record.validation if not record.diverged and _is_finite(record.validation) else None
        active.scores[job.seed] = score
        active.seconds += record.seconds
        active.evaluations += record.gradient_evaluations
        told = {"scores": {str(seed): one for seed, one in active.scores.items()}, "seconds": active.seconds}
        active.trial.set_user_attr("progress", {**told, "evaluations": active.evaluations})
        _report(active)

    def _ended(self, active: _Active) -> bool:
        """End a trial that is complete, has diverged or is behind; whether it has ended."""
        if active not in self._active:
            return True
        there = {seed: score for seed, score in active.scores.items() if score is not None}
        if len(there) < len(active.scores):
            self._end(active, "dropped")
            return True
        if len(there) == len(self.search.seeds):
            self._end(active, "complete")
            return True
        complete = [one for one in self._of(active.arm) if one.state == "complete"]
        best = _best(complete, self.search.task.metric)
        if best is not None and is_behind(
            there,
            _finite(best.scores),
            [_finite(one.scores) for one in complete if one is not best],
            mode=self.search.task.metric.mode,
        ):
            self._end(active, "dropped")
            return True
        return False

    def _end(self, active: _Active, state: State, error: str | None = None) -> None:
        from optuna.trial import TrialState

        active.trial.set_user_attr("state", state)
        if error is not None:
            active.trial.set_user_attr("error", error)
        mean = statistics.mean([score for score in active.scores.values() if score is not None])
        if state == "complete":
            active.study.tell(active.trial, mean)
        else:
            active.study.tell(active.trial, state=TrialState.PRUNED)
        self._active.remove(active)
        self._on_trial(_finding(active.arm, active.study.trials[active.trial.number]))

    def _of(self, arm: Arm) -> list[Finding]:
        return [one for one in self.findings() if one.arm == arm.name]

    def _begin(self) -> bool:
        """Begin a trial, of the side that has the fewest; False if all have as many as they are to have."""
        counts = {arm.name: len(self._of(arm)) for arm in self.search.searched}
        for arm in sorted(self.search.searched, key=lambda arm: counts[arm.name]):
            if self._take_over(arm) or counts[arm.name] < self.search.trials:
                self._ask(arm)
                return True
        return False

    def _ask(self, arm: Arm) -> None:
        import optuna

        study = self._studies[arm.name]
        trial = study.ask()
        trial.set_user_attr("process", self._signature)
        # Seeded by the trial's place, so that a search that is taken up again proposes what it would have, and two processes differ.
        place = sum(one.state.name != "FAIL" for one in study.get_trials(deepcopy=False)[: trial.number])
        seed = int.from_bytes(hashlib.sha256(f"{arm.name} {place}".encode()).digest()[:4], "big")
        study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(3, self.search.trials // 4), constant_liar=True)
        for key, one in arm.space.items():
            suggest(trial, key, one)
        progress = trial.user_attrs.get("progress", {})
        scores = {int(seed): score for seed, score in progress.get("scores", {}).items()}
        variant = arm.variant(self.search.task, trial.params)
        active = _Active(arm, study, trial, variant, scores, progress.get("seconds", 0.0), progress.get("evaluations", 0.0))
        _report(active)
        self._active.append(active)

    def _take_over(self, arm: Arm) -> bool:
        """Queue a trial whose process has ended, with what it has found; False if there is none."""
        from optuna.trial import TrialState

        study = self._studies[arm.name]
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            with _ended_process(trial) as ended:  # for as long as this holds no other process takes it over
                if not ended:
                    continue
                trials = study.get_trials(deepcopy=False)
                if trials[trial.number].state != TrialState.RUNNING:
                    continue
                if not any(one.user_attrs.get("continues") == trial.number for one in trials):
                    kept = {key: value for key, value in trials[trial.number].user_attrs.items() if key == "progress"}
                    study.enqueue_trial(trial.params, user_attrs={**kept, "continues": trial.number})
                study.tell(trial.number, state=TrialState.FAIL)
                return True
        return any(trial.state == TrialState.WAITING for trial in study.get_trials(deepcopy=False))


def winner(findings: Sequence[Finding], arm: Arm, metric: Metric) -> Finding:
    """The complete trial of a side with the best mean.

    Raises:
        RuntimeError: no trial of it is complete.
    """
    best = _best([one for one in findings if one.arm == arm.name and one.state == "complete"], metric)
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


_NEAR = 0.05


def _best(complete: Sequence[Finding], metric: Metric) -> Finding | None:
    sign = 1.0 if metric.mode == "max" else -1.0
    judged = [(sign * one.mean, -one.number, one) for one in complete if one.mean is not None]
    return max(judged, key=lambda entry: entry[:2])[2] if judged else None


def _finite(scores: Mapping[int, float | None]) -> dict[int, float]:
    return {seed: score for seed, score in scores.items() if score is not None}


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _report(active: _Active) -> None:
    mean = statistics.mean([score for score in active.scores.values() if score is not None])
    if mean is not None:
        active.trial.report(mean, len(active.scores))


def _finding(arm: Arm, trial: FrozenTrial) -> Finding:
    progress = trial.user_attrs.get("progress", {})
    return Finding(
        arm.name,
        trial.number,
        dict(trial.params),
        {int(seed): score for seed, score in progress.get("scores", {}).items()},
        trial.user_attrs.get("state", "running"),
        progress.get("seconds", 0.0),
        progress.get("evaluations", 0.0),
        trial.user_attrs.get("error"),
    )


def _agree(study: Study, identity: Mapping[str, Any]) -> None:
    """Raise if the storage holds another search under this name; write down what this one is if it holds none."""
    held = study.user_attrs.get("search")
    if held is None:
        study.set_user_attr("search", dict(identity))
        return
    different = [key for key in {**held, **identity} if held.get(key) != json.loads(json.dumps(identity.get(key)))]
    if different:
        raise ValueError(
            f"the storage holds a search of another kind for {study.study_name!r}; it differs in {', '.join(different)}. Choose another "
            "--out or --storage, or --fresh to keep the old one aside and start anew."
        )


@contextlib.contextmanager
def _ended_process(trial: FrozenTrial) -> Iterator[bool]:
    """Whether the process of a running trial has ended, however it did; its lock is held meanwhile."""
    signature = trial.user_attrs.get("process")
    if signature is None:  # asked for, and not signed yet
        started = trial.datetime_start
        yield started is not None and time.time() - started.timestamp() > _UNSIGNED
        return
    folder = Path(signature["folder"])
    if signature["host"] != socket.gethostname() and not folder.parent.is_dir():  # on a disk that cannot be seen from here
        yield False
        return
    try:
        with locked(folder, purpose="--out"):
            yield True
    except FolderInUse:
        yield False
