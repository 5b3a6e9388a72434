"""A function of one's own as a task: ``@study.task`` on a function that trains a model and logs a metric."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import random
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, get_type_hints

from gradreg import checks, environment, files, own_code
from gradreg.command_lines import convertible
from gradreg.own_code import PREFIX, in_folders, load_file
from gradreg.penalties import GradientPenalty
from gradreg.study.history import METRICS
from gradreg.study.run import Run
from gradreg.study.tasks import Metric, Mode, OnProgress, Task, TaskError, Variant

RESERVED = (
    "task", "penalties", "seeds", "out", "workers", "rivals", "until", "max_seeds", "margin", "fresh", "executor", "partial", "help",
    "penalty", "search", "trials", "confirm", "storage", "probe", "probe_share", "alignment",
    "run_cpus", "run_gpus", "run_memory", "ray_address", "ray_working_dir",
    "slurm_partition", "slurm_time", "slurm_account", "slurm_at_once", "slurm_option",
)  # fmt: skip
"""The options of ``gradreg compare`` and ``gradreg tune`` themselves, which a task's function cannot have."""

CONFIGURATION = "config.json"
RESULT = "result.json"
ERROR = "error.txt"


def task(
    *, metric: str, mode: Mode = "max", percent: bool | None = None, name: str | None = None
) -> Callable[[Callable[..., None]], FunctionTask]:
    """Make a function that trains a model a task, which ``study.compare`` and ``gradreg compare FILE.py`` compare penalties on.

    ::

        @study.task(metric="accuracy")
        def train(run: study.Run, *, lr: float = 0.1) -> None:
            model, data = ...
            regularizer = run.regularizer(model)
            for epoch in run.epochs(20):
                for x, y in data:
                    ...
                run.log(validation_accuracy=..., test_accuracy=...)

    The function is called with a ``Run``, and with its options by name. It can still be called by hand.

    Args:
        metric: m; the function logs ``test_m``, and ``validation_m`` if it holds data out to select by.
        mode: "max" if larger is better, "min" if smaller is.
        percent: whether values are shares, 0 to 1, that tables show in percent; None: for "accuracy" alone.
        name: of the task; by default that of the function.

    Raises:
        TypeError, ValueError: a function without ``run``, options without a default value, or with the name of one of compare's own.
    """
    judged = Metric(metric, mode, metric == "accuracy" if percent is None else percent)

    def decorate(function: Callable[..., None]) -> FunctionTask:
        return FunctionTask(function, judged, name)

    return decorate


class FunctionTask(Task):
    """A function as a task. Made by ``task``, whose arguments these are."""

    def __init__(
        self, function: Callable[..., None], metric: Metric, name: str | None = None, changed: Mapping[str, Any] | None = None
    ) -> None:
        if not callable(function):
            raise TypeError(f"@study.task must decorate a function; got {checks.describe(function)}. Write it above def train(run): ...")
        self.function = function
        self.metric = metric
        self.name = name or _name_of(function)
        self.description = (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")
        self.__doc__ = function.__doc__
        self._options = _options_of(function)
        self._changed = dict(changed or {})

    def __call__(self, run: Run, **options: Any) -> None:
        self.function(run, **options)

    @property
    def options(self) -> Mapping[str, inspect.Parameter]:
        """The options of the function by name."""
        return self._options

    @cached_property
    def parser(self) -> Any:
        """A jsonargparse parser of the options."""
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
        self.add_options(parser)
        return parser

    def add_options(self, parser: Any) -> None:
        """Add the options of the function to a jsonargparse parser."""
        hints = get_type_hints(self.function)
        for name, option in self._options.items():
            kind = hints.get(name, str if option.default is None else type(option.default))
            parser.add_argument(f"--{name}", type=kind, default=option.default, help=f"option of {self.name}")

    def configured(self, options: Mapping[str, Any]) -> FunctionTask:
        return FunctionTask(self.function, self.metric, self.name, {**self._changed, **options})

    def variant(self, penalty: GradientPenalty | Mapping[str, Any] | None, options: Mapping[str, Any]) -> FunctionVariant:
        options = {**self._changed, **options}
        if isinstance(penalty, Mapping):
            penalty = GradientPenalty.from_dict(dict(penalty))
        if penalty is not None and not isinstance(penalty, GradientPenalty):  # type: ignore[unnecessary-isinstance]
            raise TypeError(f"a penalty must be a GradientPenalty or None; got {checks.describe(penalty)}. Use gradreg.sam(rho=0.05), say.")
        for key in options:
            if key not in self._options:
                raise ValueError(checks.unknown(f"option of task {self.name!r}:", key, self._options))
        return FunctionVariant(self.reference(), self.name, self.metric, penalty, self.typed(options))

    def typed(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All options, with the defaults of those that ``options`` leaves out, checked against their types."""
        given = {key: value for key, value in options.items() if value is not self._options[key].default}  # it need not be of its type
        try:
            with convertible():
                parsed = self.parser.parse_object(given)
        except Exception as error:  # jsonargparse raises errors of several kinds
            text = re.sub(r"<class '(\w+)'>", r"\1", " ".join(str(getattr(error, "message", error)).split()))
            raise ValueError(f"option of task {self.name!r}: {text}") from error
        found = self.parser.instantiate(parsed)
        return {key: found[key] for key in self._options}

    def reference(self) -> Reference:
        """Where another process finds the task.

        A function without a file of its own, as in a notebook, is held by the reference itself: only this process can run it.
        """
        module, qualified = self.function.__module__, self.function.__qualname__
        try:
            file = inspect.getsourcefile(self.function)
        except TypeError:
            file = None
        if file is None or not Path(file).is_file() or "<locals>" in qualified:
            return Reference(None, qualified, held=self)
        if module not in ("__main__", "__mp_main__") and not module.startswith(PREFIX) and module in sys.modules and _is_importable(module):
            return Reference(module, qualified)
        return Reference(str(Path(file).resolve()), qualified)


@dataclass(frozen=True)
class Reference:
    """A task that another process can find.

    Args:
        where: a file's path or a module's name; None for a task that only this process has.
        name: of the function in it.
        held: that task.
    """

    where: str | None
    name: str
    held: FunctionTask | None = field(default=None, compare=False)

    def resolve(self) -> FunctionTask:
        """The task."""
        if self.held is not None:
            return self.held
        assert self.where is not None
        module = load_file(self._file) if self.where.endswith(".py") else importlib.import_module(self.where)
        return getattr(module, self.name)

    @property
    def _file(self) -> Path:
        """The file; on a machine that does not have it there, that of its name in the working directory, where its folder was sent."""
        assert self.where is not None
        file = Path(self.where)
        sent = Path.cwd() / file.name
        return sent if not file.is_file() and sent.is_file() else file

    @property
    def folder(self) -> Path | None:
        """The folder of the task's file, or of its topmost package; None for a task that only this process has, or that is installed."""
        if self.held is not None or self.where is None:
            return None
        if self.where.endswith(".py"):
            return Path(self.where).parent
        file = own_code.find(f"{self.where}:{self.name}")
        return None if file is None else file.parents[len(self.where.split(".")) - (file.name != "__init__.py")]

    def digest(self) -> str | None:
        """A digest of the file that holds the task; None for one without."""
        if self.held is not None or self.where is None:
            return None
        if self.where.endswith(".py"):
            return _digest(self._file)
        file = getattr(sys.modules.get(self.where) or importlib.import_module(self.where), "__file__", None)
        return None if file is None else _digest(Path(file))


def _digest(file: Path) -> str:
    held = file.stat()
    return _digest_of(file, held.st_mtime_ns, held.st_size)


@lru_cache(maxsize=64)
def _digest_of(file: Path, changed: int, size: int) -> str:
    """A digest of the content, which a study of thousands of runs asks for once each."""
    return own_code.digest(file)[:16]


def is_reference(text: str) -> bool:
    """Whether ``text`` is the name of a function's task, ``FILE.py``, ``FILE.py:NAME`` or ``MODULE:NAME``, and not that of a recipe."""
    return re.search(r"\.py(:\w+)?$|^[\w.]+:[A-Za-z_]\w*$", text) is not None


def load_task(reference: str) -> FunctionTask:
    """The task that ``FILE.py``, ``FILE.py:NAME`` or ``MODULE:NAME`` names.

    Raises:
        ValueError: no such file or name, no task in it, or several and no name.
    """
    where, colon, name = reference.rpartition(":") if not reference.endswith(".py") else (reference, "", "")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise ValueError(f"{where!r} must be a file with a task; got none of that name. Give its path.")
        module = load_file(Path(where))
    elif (file := in_folders(where, [Path.cwd()])) is not None and "." not in where:
        module = load_file(file)
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is None or not where.startswith(error.name):
                raise
            raise ValueError(
                f"{where!r} must be a module that can be imported; got none of that name. Or give a file's path: mine.py:train."
            ) from error
    tasks = {key: value for key, value in vars(module).items() if isinstance(value, FunctionTask)}
    if colon:
        if name not in tasks:
            if callable(getattr(module, name, None)):
                raise ValueError(f"{name} in {where} must be a task; got a plain function. Write @study.task(metric=...) above it.")
            raise ValueError(checks.unknown(f"task in {where}:", name, tasks) if tasks else _without_task(where))
        return tasks[name]
    if not tasks:
        raise ValueError(_without_task(where))
    if len({id(value) for value in tasks.values()}) > 1:
        raise ValueError(f"{where} has several tasks, {', '.join(sorted(tasks))}: name one, as in {where}:{min(tasks)}.")
    return next(iter(tasks.values()))


def _without_task(where: str) -> str:
    return (
        f"{where} must have a task; got none. Write from gradreg import study, and @study.task(metric='accuracy') above def train(run): ..."
    )


@dataclass(frozen=True)
class FunctionVariant(Variant):
    """A function with a penalty and options."""

    reference: Reference
    task: str
    metric: Metric
    penalty: GradientPenalty | None
    options: Mapping[str, Any]

    @property
    def method(self) -> str:
        return "no penalty" if self.penalty is None else str(self.penalty)

    @property
    def is_plain(self) -> bool:
        return self.penalty is None

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        return {"task": self.task, "penalty": None if self.penalty is None else self.penalty.to_dict(), **_plain(self.options)}

    @property
    def source(self) -> str | None:
        return self.reference.digest()

    @property
    def place(self) -> str:
        return _line_of(self.reference.resolve().function)

    @property
    def code(self) -> Path | None:
        return self.reference.folder

    def _identity(self, seed: int, stretch: Fraction) -> dict[str, Any]:
        return {**self.settings, "seed": seed, "stretch": str(stretch), "code": self.source}

    def result(self, folder: Path, seed: int, stretch: Fraction) -> dict[str, Any] | None:
        file = folder / RESULT
        if not os.path.lexists(file):
            return None
        remedy = f"Remove the folder {str(folder)!r}, so that the run is repeated."
        held = files.read_json(folder / CONFIGURATION, holds="the configuration of a run", remedy=remedy)
        wanted = self._identity(seed, stretch)
        different = [key for key in {**held, **wanted} if held.get(key) != wanted.get(key)]
        if different:
            what = "its source, which has changed since" if different == ["code"] else ", ".join(different)
            raise ValueError(
                f"{str(folder)!r} holds a run of another configuration; it differs in {what}. Choose another --out, or --fresh to keep the "
                "old runs aside and start again."
            )
        found = files.read_json(file, holds="the result of a run", remedy=remedy)
        files.check_tie(file, found, folder / CONFIGURATION, remedy=remedy)
        return found

    def run(self, folder: Path, seed: int, stretch: Fraction, on_progress: OnProgress) -> dict[str, Any]:
        for stale in (RESULT, ERROR, METRICS):
            try:
                (folder / stale).unlink(missing_ok=True)
            except OSError as error:
                raise TaskError(f"{str(folder / stale)!r} must be a file of an earlier run: {error.strerror}. Remove it.") from error
        files.write_json(folder / CONFIGURATION, self._identity(seed, stretch))
        (folder / METRICS).touch()
        train = self.reference.resolve()
        _seed(seed)
        run = Run(self.penalty, seed, folder, metric=self.metric, stretch=stretch, on_progress=on_progress)
        try:
            train.function(run, **self.options)
            result = run.finish()
        except TaskError as error:
            raise TaskError(f"{error} ({_line_in(train.function, error)})") from error
        result["warnings"] = [f"{text} ({_line_of(train.function)})" for text in result["warnings"]]
        files.write_json(folder / "environment.json", environment.describe())
        files.write_json(folder / RESULT, files.tied(result, folder / CONFIGURATION))
        return result


def describe_failure(error: BaseException) -> str:
    """The last line of an error: its type and message, and where in the task's own code it came from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "gradreg/study" not in f.filename.replace("\\", "/")]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _seed(seed: int) -> None:
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as JSON holds them: what is not plain by its text."""
    return json.loads(json.dumps(dict(options), default=str))


def _options_of(function: Callable[..., None]) -> dict[str, inspect.Parameter]:
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind not in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
        raise TypeError(
            f"a task's function must take the run first; got {function.__name__}{inspect.signature(function)}. "
            "Write def train(run: study.Run): ..."
        )
    options = {parameter.name: parameter for parameter in parameters[1:]}
    for name, parameter in options.items():
        where = f"option {name!r} of task {function.__name__!r} ({_line_of(function)})"
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise TypeError(f"{where} must have a name of its own; got *args or **kwargs. List the options one by one.")
        if parameter.default is inspect.Parameter.empty:
            raise TypeError(f"{where} must have a default value, with which it runs if it is not named. Write {name}: float = 0.1, say.")
        if name in RESERVED:
            raise ValueError(f"{where} must not have the name of an option of gradreg compare; got {name}. Rename it, to task_{name} say.")
    return options


def _name_of(function: Callable[..., None]) -> str:
    """The function's name, or that of its file where the function's says no more than that it trains."""
    code = getattr(function, "__code__", None)
    general = function.__name__ in ("train", "main", "run", "task", "fit")
    return Path(code.co_filename).stem if general and code is not None and code.co_filename.endswith(".py") else function.__name__


def _line_of(function: Callable[..., None]) -> str:
    code = getattr(function, "__code__", None)
    return "?" if code is None else f"{Path(code.co_filename).name}, line {code.co_firstlineno}"


def _line_in(function: Callable[..., None], error: BaseException) -> str:
    """The last line of the task's own file that led to ``error``, or where the function begins."""
    code = getattr(function, "__code__", None)
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if code is not None and frame.filename == code.co_filename]
    return f"{Path(own[-1].filename).name}, line {own[-1].lineno}" if own else _line_of(function)


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):
        return False
