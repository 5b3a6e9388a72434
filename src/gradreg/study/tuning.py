"""``study.tune``: search both sides, confirm what was chosen with fresh seeds, and say what came out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradreg import checks, files
from gradreg.folders import keep_aside
from gradreg.study.comparison import Comparison, resolve_task, run_study, usable
from gradreg.study.executors.executor import Executor, as_executor
from gradreg.study.executors.local import LocalExecutor, refuse_where_a_worker_imports_it
from gradreg.study.results import Record
from gradreg.study.running import OnProgress
from gradreg.study.search import Finding, Search, at_an_end, winner
from gradreg.study.search_space import Arm, arms, end_of
from gradreg.study.searcher import Searcher, opened_storage
from gradreg.study.tasks import Task
from gradreg.study.urls import is_url

RESULTS = "search.json"
CONFIRMATION, CHOSEN = "confirmation", "chosen.json"
"""The folder of the comparison of what was chosen, and the file there that says what that was."""
SCHEMA = 1


@dataclass(frozen=True)
class Tuning:
    """What a search found.

    Args:
        search: what was searched.
        findings: every trial.
        chosen: side -> its best trial by validation; a side without anything to search has none. Empty while other processes still run
            trials of the search.
        comparison: of what was chosen, with fresh seeds, on test; None meanwhile.
        folder: where ``search.json``, the page and the runs are.
    """

    search: Search
    findings: Sequence[Finding]
    chosen: Mapping[str, Finding]
    comparison: Comparison | None
    folder: Path

    @property
    def warnings(self) -> list[str]:
        """What must be known beside the table."""
        running = sum(one.state == "running" for one in self.findings)
        if running:
            return [
                f"other processes still run {running} trial{'' if running == 1 else 's'} of this search: what is chosen is compared with "
                "fresh seeds by the last of them, or when the command is given again"
            ]
        ends = [text for arm in self.search.arms if arm.name in self.chosen for text in at_an_end(self.chosen[arm.name], arm)]
        return [*ends, *(self.comparison.warnings if self.comparison is not None else [])]

    def to_dict(self) -> dict[str, Any]:
        """The content of ``search.json``."""
        metric = self.search.task.metric
        return {
            "schema": SCHEMA,
            "task": self.search.task.name,
            "metric": {"name": metric.name, "mode": metric.mode, "percent": metric.percent},
            "seeds": list(self.search.seeds),
            "fresh_seeds": list(self.search.fresh),
            "arms": [arm.to_dict() for arm in self.search.arms],
            "trials": [one.to_dict() for one in self.findings],
            "chosen": {name: one.number for name, one in self.chosen.items()},
            "confirmed": self.comparison is not None,
        }

    def to_frame(self) -> Any:
        """The trials as a ``pandas.DataFrame``, a row each.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame(
            [{**one.to_dict(), **one.values, "values": None, "scores": list(one.scores.values())} for one in self.findings]
        ).drop(columns="values")

    def sentences(self) -> list[str]:
        """What was searched and chosen, a sentence for each side; none while other processes still run trials."""
        if self.comparison is None:
            return []
        found: list[str] = []
        metric = self.search.task.metric
        for arm in self.search.arms:
            own = [one for one in self.findings if one.arm == arm.name]
            if arm.name not in self.chosen:
                found.append(f"{arm.name}: nothing to search, taken as it is")
                continue
            best = self.chosen[arm.name]
            complete = sum(one.state == "complete" for one in own)
            runs = sum(len(one.scores) for one in own)
            found.append(
                f"{arm.name}: {best.shown_values()} of {len(own)} trials ({complete} with all {len(self.search.seeds)} seeds, {runs} "
                f"runs), {metric.text(best.mean or 0.0)} on validation"
            )
        return found

    def report(self) -> Path:
        """Write ``search.json`` and the page; returns the page's path."""
        from gradreg.study.search_page import write_search_page

        files.write_json(self.folder / RESULTS, self.to_dict())
        return write_search_page(
            self.search,
            self.findings,
            self.chosen,
            self.folder / "search.html",
            sentences=self.sentences(),
            verdicts=[] if self.comparison is None else self.comparison.sentences(),
            warnings=self.warnings,
            confirmed=self.comparison is not None,
        )

    def __str__(self) -> str:
        return "\n".join([*self.sentences(), *([] if self.comparison is None else [str(self.comparison)])])


def tune(
    task: Task | Callable[..., Any] | str,
    *,
    penalty: str | Sequence[str] = "fgr",
    search: Mapping[str, Any] | None = None,
    trials: int = 20,
    seeds: int = 3,
    confirm: int = 5,
    storage: str | None = None,
    out: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    workers: int | None = None,
    executor: Executor | str | None = None,
) -> Tuning:
    """Search the strength of a penalty, and plain training as much; then compare the two winners with fresh seeds, on test.

    Trials are kept in ``storage``: an interrupted search resumes, and any number of processes can share one.

    Args:
        task: as of ``compare``; it logs its metric on validation.
        penalty: one or several texts such as "fgr" or "sam:every=2". The strengths that the text leaves open are searched.
        search: what is searched beside them, of both sides: option -> "log:1e-3:1", "0:0.5", "16:256", "sgd|adamw", a list of choices, or
            an Optuna distribution. An argument of the penalty replaces its own range.
        trials: of each side, ≥ 1.
        seeds: of a complete trial, ≥ 1; one that is behind is dropped earlier.
        confirm: fresh seeds of the comparison at the end, ≥ 2.
        storage: None keeps a journal file in ``out``; "memory", "journal:FILE", or a data base's URL.
        out: the folder; ``runs/NAME-search`` by default.
        options: options of the task that all runs share.
        workers: processes at a time: one a core by default. 0 runs in this process.
        executor: as of ``compare``; as many trials go on at a time as it carries out runs.

    Raises:
        TypeError, ValueError: bad arguments, or a task that breaks the rules of a study (``TaskError``).
        RuntimeError: a worker died, or no trial of a side is complete; or the call stands in a script without
            ``if __name__ == "__main__":``.

    Cost: at most ``trials * seeds`` runs a side, and ``confirm`` runs of each winner and of plain training at as many gradients.
    Source: trials by Optuna's tree of Parzen estimators (Akiba et al. 2019, arXiv 1907.10902); dropping by paired tests as in F-Race
    (Birattari et al. 2002).
    """
    refuse_where_a_worker_imports_it("study.tune")
    resolved = resolve_task(task).configured(options or {})
    texts = [penalty] if isinstance(penalty, str) else list(penalty)
    planned = plan_search(resolved, arms(resolved, texts, search or {}), trials=trials, seeds=seeds, confirm=confirm)
    return run_search(planned, search_folder(out, resolved), storage=storage, executor=as_executor(executor, workers))


def search_folder(out: str | Path | None, task: Task) -> Path:
    """The folder of a search.

    Raises:
        ValueError: a URL.
    """
    if out is not None and is_url(str(out)):
        raise ValueError(
            f"--out of a search must be a folder, whose runs its processes share; got {str(out)!r}. Name one on a shared disk."
        )
    return Path("runs") / f"{task.name}-search" if out is None else Path(out)


def plan_search(task: Task, sides: Sequence[Arm], *, trials: int, seeds: int, confirm: int) -> Search:
    """A search of ``sides``; seeds of the trials from the task's first on, those of the confirmation after them."""
    checks.whole("trials", trials, minimum=1, remedy="20 is the default.")
    checks.whole("seeds", seeds, minimum=1, remedy="3 is the default.")
    checks.whole("confirm", confirm, minimum=2, remedy="A paired interval needs 2; 5 is the default.")
    if not any(arm.space for arm in sides):
        raise ValueError(
            "search must name something to search, since all strengths are given; got nothing. Leave a strength out, or add "
            "--search lr=log:1e-3:1, say."
        )
    first = task.variant(None, {}).seed
    return Search(task, sides, trials, range(first, first + seeds), range(first + seeds, first + seeds + confirm))


def run_search(
    search: Search,
    folder: Path,
    *,
    storage: str | None = None,
    executor: Executor | None = None,
    command: str = "",
    on_trial: Callable[[Finding], None] = lambda one: None,
    on_progress: OnProgress = lambda job, share: None,
    on_record: Callable[[Record, int], None] = lambda record, planned: None,
) -> Tuning:
    """Run what is missing of a search in ``folder``, confirm what it chose, and report.

    Args:
        search: what is searched.
        folder: for ``search.json``, the page and the runs.
        storage: as of ``tune``.
        executor: what carries the runs out; None takes one process a core.
        command: the command line that asked for it.
        on_trial: told of every trial that ends here.
        on_progress: told which share of a run is done.
        on_record: told of every run of the confirmation, and how many are planned.
    """
    some = [arm.variant(search.task, {key: end_of(one) for key, one in arm.space.items()}) for arm in search.arms]
    executor = usable(search.task.name, some, executor or LocalExecutor())
    files.make_directory(folder, purpose="--out")
    with opened_storage(storage, folder) as opened:
        searcher = Searcher(search, folder, opened, on_trial=on_trial)
        searcher.run(executor=executor, on_progress=on_progress)
        findings = searcher.findings()
    if any(one.state == "running" for one in findings):
        found = Tuning(search, findings, {}, None, folder)
        found.report()
        return found
    chosen = {arm.name: winner(findings, arm, search.task.metric) for arm in search.searched}
    variants = {arm.name: arm.variant(search.task, chosen[arm.name].values if arm.space else {}) for arm in search.arms}
    confirmation = _confirmation(folder, {name: dict(one.values) for name, one in chosen.items()})
    comparison = run_study(search.confirmation(variants), confirmation, executor=executor, command=command, on_record=on_record)
    found = Tuning(search, findings, chosen, comparison, folder)
    found.report()
    return found


def _confirmation(folder: Path, chosen: Mapping[str, Any]) -> Path:
    """The folder in which these choices are compared; one with others, made before trials were added, is kept aside."""
    confirmation = folder / CONFIRMATION
    held, text = confirmation / CHOSEN, json.dumps(chosen, indent=2, sort_keys=True) + "\n"
    if confirmation.exists() and not (held.is_file() and held.read_text(encoding="utf-8", errors="replace") == text):
        keep_aside(confirmation, purpose="--out")
    files.make_directory(confirmation, purpose="--out")
    files.write_text(held, text)
    return confirmation
