"""One process of a search: Optuna's trials in a storage that many processes share, each trial run with one seed after the other."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gradreg.folders import FolderInUse, locked
from gradreg.study import statistics
from gradreg.study.executors.executor import Executor, Site
from gradreg.study.plan import Job, folder_name, spread
from gradreg.study.results import Record
from gradreg.study.running import OnProgress, run_jobs
from gradreg.study.search import Finding, Search, State, best_of, finite, is_behind
from gradreg.study.search_space import Arm, suggest
from gradreg.study.tasks import TaskError, Variant

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

JOURNAL = "search.journal"
_UNSIGNED = 60.0
"""Seconds after which a trial that no process has signed is taken for one whose process ended before it could."""

_MADE_MEANWHILE = ("already exists", "duplicate key")
"""What a data base says to a process that makes the tables at the moment at which another does."""


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
    attempts = 5
    while True:
        try:
            return RDBStorage(url, engine_kwargs={"connect_args": waits, "pool_pre_ping": True})
        except (SQLAlchemyError, ImportError, ValueError) as error:
            attempts -= 1
            if attempts and any(what in str(error) for what in _MADE_MEANWHILE):
                time.sleep(0.5)
                continue
            reason = " ".join(str(error).split("\n")[0].split())
            raise ValueError(f"storage must be a data base that can be reached; got {_without_password(url)!r}: {reason}") from error


@contextlib.contextmanager
def opened_storage(where: str | None, folder: Path) -> Iterator[BaseStorage]:
    """``open_storage``, whose connections are closed at the end."""
    storage = open_storage(where, folder)
    try:
        yield storage
    finally:
        engine: Any = getattr(storage, "engine", None)  # of a data base
        if engine is not None:
            cast("Any", storage).remove_session()
            engine.dispose()


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

    trials: Path = Path()

    def job(self, seed: int) -> Job:
        """Its run with a seed: trials of equal values share it."""
        held = json.dumps({"values": self.trial.params}, sort_keys=True)
        name = f"{folder_name(self.arm.name)}-{hashlib.sha256(held.encode()).hexdigest()[:10]}"
        within = "" if (self.trials / name).is_dir() else spread(name)  # of an earlier version, which did not spread them
        return Job(name, seed, "epochs", self.variant.evaluations, self.variant, within=within)


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

        self.search: Search = search
        self.folder: Path = folder
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

    def run(self, *, executor: Executor, on_progress: OnProgress = lambda job, share: None) -> None:
        """Run trials until every side has as many as it is to have; those that another process runs are left to it.

        Raises:
            TaskError: the task breaks the rules of a study, or logs no validation metric.
            RuntimeError: a worker died.
        """
        with locked(Path(self._signature["folder"]), purpose="--out"):
            plain = self.search.task.variant(None, {})
            site = Site(self.folder.resolve(), None, plain.code, self.search.task.name, plain.imports)
            wanted = lambda: self._jobs(max(1, executor.at_a_time()))  # noqa: E731
            jobs = run_jobs(wanted, site.folder / "trials", executor=executor, site=site, on_progress=on_progress)
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
        found = record.validation
        score = found if found is not None and not record.diverged and math.isfinite(found) else None
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
        there = finite(active.scores)
        if len(there) < len(active.scores):
            self._end(active, "dropped")
            return True
        if len(there) == len(self.search.seeds):
            self._end(active, "complete")
            return True
        complete = [one for one in self._of(active.arm) if one.state == "complete"]
        best = best_of(complete, self.search.task.metric)
        if best is not None and is_behind(
            there,
            finite(best.scores),
            [finite(one.scores) for one in complete if one is not best],
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
        mean = statistics.mean(list(finite(active.scores).values()))
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
        # Seeded by the trial's place, so that a search that is taken up again proposes what it would have, and two processes differ; and by
        # the first seed of the runs, so that a search repeated with other seeds does not propose the same once more.
        place = sum(one.state.name != "FAIL" for one in study.get_trials(deepcopy=False)[: trial.number])
        seed = int.from_bytes(hashlib.sha256(f"{arm.name} {self.search.seeds[0]} {place}".encode()).digest()[:4], "big")
        study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(3, self.search.trials // 4), constant_liar=True)
        for key, one in arm.space.items():
            suggest(trial, key, one)
        progress = trial.user_attrs.get("progress", {})
        scores = {int(seed): score for seed, score in progress.get("scores", {}).items()}
        variant = arm.variant(self.search.task, trial.params)
        active = _Active(arm, study, trial, variant, scores, progress.get("seconds", 0.0), progress.get("evaluations", 0.0))
        active.trials = self.folder / "trials"
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


def _report(active: _Active) -> None:
    mean = statistics.mean(list(finite(active.scores).values()))
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
            "--out or --storage, or --fresh to keep the old one aside and start again."
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
