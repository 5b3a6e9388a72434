"""The interface of executors: a session takes work and says what has ended. Everything else is the study's, the same for all of them."""

from __future__ import annotations

import hashlib
import importlib
import json
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from gradreg import checks

ENTRY_POINTS = "gradreg.executors"
"""The group of entry points in which a package of one's own names its executors."""

BUILT_IN = {
    "local": "gradreg.study.executors.local:LocalExecutor",
    "ray": "gradreg.study.executors.ray:RayExecutor",
    "slurm": "gradreg.study.executors.slurm:SlurmExecutor",
}

OnShare = Callable[[str, float], None]
"""Told of a work, by its key, which share is done."""


class ExecutorError(ValueError):
    """What keeps an executor from carrying out any run: nobody answers, another version on a worker, a folder that cannot be seen."""


@dataclass(frozen=True)
class Work:
    """One thing to be carried out.

    Args:
        key: names it; of a run the folder within the study's.
        call: called with a function that takes the share that is done, 0 to 1, and returns the result. It is pickled.
        configuration: what, beside the key, another process must agree on that takes the work over, in plain values.
    """

    key: str
    call: Callable[[Callable[[float], None]], dict[str, Any]]
    configuration: Callable[[], Any] = field(default=lambda: None, compare=False, repr=False)

    @property
    def identity(self) -> str:
        """A digest of the configuration."""
        return hashlib.sha256(json.dumps(self.configuration(), sort_keys=True, default=str).encode()).hexdigest()[:16]

    def pickled(self) -> bytes:
        """``call`` as another process gets it.

        Raises:
            ExecutorError: it cannot be pickled.
        """
        try:
            return pickle.dumps(self.call)
        except Exception as error:  # pickle raises what the objects raise
            raise ExecutorError(
                f"the run {self.key} must be one that can be pickled, to reach another process; got {type(error).__name__}: {error}. Pass "
                "options that are plain values, and define what they need in a module."
            ) from error


@dataclass(frozen=True)
class Ended:
    """A work that has ended.

    Args:
        key: of the work.
        result: what it returned; None if its process died before.
        died: why it died, in words; None if it did not.
        lines: the last lines that it wrote, as far as they are known.
        own: whether it died by itself; False where its machine was lost, or taken for something else.
    """

    key: str
    result: dict[str, Any] | None = None
    died: str | None = None
    lines: Sequence[str] = ()
    own: bool = True


@dataclass(frozen=True)
class Site:
    """What a session is told of the study.

    Args:
        folder: of the study, on this machine.
        url: where its results are, if that is not the folder.
        code: the folder with the task's own code; None where it has none, or is installed.
        name: of the task.
        imports: a module that every run imports, which workers of one machine may import once for all; "" for none.
    """

    folder: Path
    url: str | None = None
    code: Path | None = None
    name: str = "study"
    imports: str = ""


class Session(ABC):
    """An executor at work, which its context begins and ends."""

    @abstractmethod
    def submit(self, works: Sequence[Work]) -> None:
        """Take works, to be carried out in this order as far as there is room. One that died may be submitted again."""

    @abstractmethod
    def wait(self, seconds: float) -> list[Ended]:
        """What has ended since the last call; waits for it as long, or a little longer."""

    def queued(self) -> int | None:
        """How many works have been taken and have not begun; None if that is not known."""
        return None


class Executor(ABC):
    """How and where runs are carried out. Its fields are its options: each has ``metadata`` with "option" and "help"."""

    name: ClassVar[str]

    @abstractmethod
    def session(self, site: Site, on_share: OnShare) -> AbstractContextManager[Session]:
        """A context with a session; where it ends by an exception, whatever still runs is ended too.

        Raises:
            ExecutorError: in words, within ten seconds, where nothing can be carried out.
        """

    @abstractmethod
    def at_a_time(self) -> int:
        """How many works are carried out at a time; 0 if in this process."""

    @property
    def elsewhere(self) -> bool:
        """Whether another process carries out the work, which must then be able to import the task."""
        return True

    def describe(self, count: int) -> str:
        """How ``count`` works are carried out, in words."""
        return f"on {self.name}"


def option(text: str, help: str, *, default: Any = None, kind: type = str) -> Any:
    """A field of an executor that the command line sets by the option ``text``."""
    return field(default=default, metadata={"option": text, "help": help, "type": kind})


@cache
def known() -> dict[str, str]:
    """The executors by name, each as "module:class"; those of other packages by their entry points."""
    return {**{point.name: point.value for point in metadata.entry_points(group=ENTRY_POINTS)}, **BUILT_IN}


def executor_class(name: str) -> type[Executor]:
    """The class of an executor.

    Raises:
        ValueError: an unknown name, or an entry point that names no executor.
    """
    if name not in known():
        raise ValueError(checks.unknown("executor", name, known()))
    module, _, attribute = known()[name].partition(":")
    found = getattr(importlib.import_module(module), attribute, None)
    if not (isinstance(found, type) and issubclass(found, Executor)):
        raise ValueError(f"the entry point {name!r} must name a subclass of Executor; got {known()[name]!r}. Correct that package.")
    return found


def _importable() -> list[type[Executor]]:
    """The classes of all executors, but for those of other packages that cannot be imported: naming them says why."""
    found: list[type[Executor]] = []
    for name in known():
        try:
            found.append(executor_class(name))
        except (ImportError, ValueError):
            if name in BUILT_IN:
                raise
    return found


def options_of(kind: type[Executor]) -> dict[str, Any]:
    """The options of an executor: its field -> that field's metadata."""
    return {one.name: one.metadata for one in fields(kind) if "option" in one.metadata}  # type: ignore[arg-type]


def command_options(*, leave_out: Sequence[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """``--executor`` and the options of all executors, as commands take them."""
    found: dict[str, dict[str, Any]] = {
        "--executor": {
            "type": str,
            "default": "local",
            "help": f"where runs are carried out: {', '.join(known())} (docs/many-machines.md)",
        }
    }
    for kind in _importable():
        for one in options_of(kind).values():
            found.setdefault(one["option"], {"type": one["type"], "help": one["help"]})
    return [(text, keywords) for text, keywords in found.items() if text not in leave_out]


def from_command(options: Mapping[str, Any]) -> Executor:
    """The executor that the options of a command ask for; they are taken as parsed, by name.

    Raises:
        ValueError: an unknown executor, an option of another one, or a value that does not fit.
    """
    kind = executor_class(options["executor"])
    own = options_of(kind)
    for name in known():
        for one in options_of(executor_class(name)).values():
            text = one["option"]
            if options.get(_key(text)) is not None and text not in {mine["option"] for mine in own.values()}:
                raise ValueError(
                    f"{text} must go with --executor {name}; got --executor {options['executor']}. Leave it out, or change it."
                )
    given = {key: options.get(_key(one["option"])) for key, one in own.items()}
    try:
        return kind(**{key: value for key, value in given.items() if value is not None})
    except (TypeError, ValueError) as error:
        field, _, rest = str(error).partition(" ")
        raise type(error)(f"{own[field]['option']} {rest}" if field in own else str(error)) from error


def as_executor(executor: Executor | str | None, workers: int | None = None) -> Executor:
    """The executor that an argument means: one, or a name. ``workers`` is of the local one.

    Raises:
        TypeError, ValueError: something else, or ``workers`` beside another executor.
    """
    if executor is None or executor == "local":
        return executor_class("local")(**({} if workers is None else {"workers": workers}))
    if isinstance(executor, str):
        executor = executor_class(executor)()
    if not isinstance(executor, Executor):  # type: ignore[unnecessary-isinstance]
        raise TypeError(
            f"executor must be 'local', 'ray', 'slurm' or an Executor; got {checks.describe(executor)}. Write executor='ray', say."
        )
    if workers is not None:
        raise ValueError(
            f"workers must be left out with executor={executor.name!r}, whose own options say how many runs go on at a time; got {workers}."
        )
    return executor


def _key(text: str) -> str:
    """``--run-cpus`` as its value is called: ``run_cpus``."""
    return text.removeprefix("--").replace("-", "_")
