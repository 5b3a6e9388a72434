"""Functions of one's own by name, ``mine:build`` or ``mine.py:build``: where their file is, what it holds, and the function itself.

A name is looked for beside the recipe's file, then in the working directory, then among what Python can import. What is found is recorded
with a digest of its content, so that another process, or a run that resumes, takes the same file or says that it is another.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from gradreg import checks

PREFIX = "_gradreg_task_"
"""Of the names under which files are imported, so that ``if __name__ == "__main__":`` does not run."""

_FORM = re.compile(r"(?P<where>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*|.+\.py):(?P<name>[A-Za-z_]\w*)")

Code = Mapping[str, Mapping[str, str]]
"""Module or file as it is named -> its ``file`` and the ``sha256`` of its content. Installed modules are not in it."""


def is_own(name: object) -> bool:
    """Whether ``name`` names a function in a file or module, and not something of gradreg's, timm's or torchvision's.

    >>> [is_own(name) for name in ("mine:build", "lib/mine.py:build", "torch.nn:Linear", "mlp", "timm:hfds/food101")]
    [True, True, True, False, False]
    """
    return isinstance(name, str) and _FORM.fullmatch(name) is not None and not name.startswith("timm:")


def located(names: Iterable[str], *, beside: Path | None = None, recorded: Code | None = None) -> dict[str, dict[str, str]] | None:
    """Where the files of ``names`` are, with their digests; None if no name is of a file.

    Args:
        names: of functions.
        beside: the folder that is looked into first, the recipe's.
        recorded: what was found earlier, which must still be so.

    Raises:
        ValueError: no such file or module, or a file whose content is not the recorded one any more.
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        where = name.rpartition(":")[0]
        if where in found:
            continue
        before = (recorded or {}).get(where)
        file = find(name, beside) if before is None else _recorded(name, before, beside)
        if file is not None:
            found[where] = {"file": str(file), "sha256": digest(file)}
    return found or None


def find(name: str, beside: Path | None = None) -> Path | None:
    """The file of the function ``name``; None for one of an installed module, whose version says what it holds.

    Raises:
        ValueError: no such file or module; the message says where it was looked for.
    """
    where = name.rpartition(":")[0]
    folders = [folder.resolve() for folder in ([beside] if beside is not None else [])] + [Path.cwd()]
    file = in_folders(where, folders)
    if file is not None:
        return file
    looked = " or ".join(repr(str(folder)) for folder in dict.fromkeys(folders))
    if where.endswith(".py"):
        raise ValueError(
            f"{name!r} must name a function in a file; got no {where} in {looked}. Put it beside the recipe, or write its path."
        )
    try:
        spec = importlib.util.find_spec(where)
    except (ImportError, ValueError):  # of a package around it that is not there, or is a plain module
        spec = None
    if spec is None:
        raise ValueError(
            f"{name!r} must name a function in a file or module; got no {where.replace('.', '/')}.py in {looked}, and no installed module "
            f"{where!r}. Put the file beside the recipe, or start the command where it is."
        )
    if not spec.has_location or spec.origin is None:
        return None
    origin = Path(spec.origin).resolve()
    installed = (Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib", "stdlib"))
    return None if any(origin.is_relative_to(folder) for folder in installed) else origin


def in_folders(where: str, folders: Iterable[Path]) -> Path | None:
    """The first file that the module, or the path that ends with .py, ``where`` is in one of ``folders``."""
    for folder in folders:
        if where.endswith(".py"):
            places = [folder / where]
        else:
            *packages, last = where.split(".")
            places = [folder.joinpath(*packages, f"{last}.py"), folder.joinpath(*packages, last, "__init__.py")]
        for place in places:
            if place.is_file():
                return place.resolve()
    return None


def load(name: str, code: Code | None = None, *, key: str) -> Callable[..., Any]:
    """The function or class that ``name`` names.

    Args:
        name: as a recipe writes it.
        code: where its file is, of ``located``; by default it is looked for.
        key: of the recipe that names it, for errors.

    Raises:
        ValueError: a file that cannot be imported, or without such a function; the nearest one is named.
        TypeError: something that cannot be called.
    """
    where, _, attribute = name.rpartition(":")
    held = (code if code is not None else located([name]) or {}).get(where)
    module: Any = _imported(where, None if held is None else Path(held["file"]))
    if not hasattr(module, attribute):
        known = [called for called in dir(module) if callable(getattr(module, called)) and not called.startswith("_")]
        place = where if held is None else held["file"]
        raise ValueError(checks.unknown(f"function of {place}:", attribute, known) if known else f"{key}: {place} has no {attribute!r}.")
    found = getattr(module, attribute)
    if not callable(found):
        raise TypeError(
            f"{key} must name a function or a class; got {name!r}, which is {checks.describe(found)}. Write def {attribute}(...)."
        )
    return found


def load_file(path: Path) -> Any:
    """The module in a file, imported once as long as its content stays, under a name of its own; its folder is on the path, as when it is
    run.

    Raises:
        ValueError: it cannot be imported; the message has its own error, and the line.
    """
    content = path.read_bytes()
    name = PREFIX + hashlib.sha256(str(path.resolve()).encode() + content).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, (Exception, SystemExit)) and not _of_gradreg(error):
            raise ValueError(_cannot_import(path, error)) from error
        raise
    return module


def digest(file: Path) -> str:
    """The SHA-256 of a file's content. What it imports is not in it."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether ``function`` has a parameter of its own that is called ``name``."""
    found = _signature(function)
    if found is None or name not in found.parameters:
        return False
    return found.parameters[name].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def check_call(
    function: Callable[..., Any],
    name: str,
    *given: str,
    key: str,
    options: Mapping[str, Any],
    supplied: Iterable[str] = (),
    reserved: Iterable[str] = (),
) -> None:
    """Raise unless ``function`` can be called with the arguments ``given`` (their names, for the error) and ``options``.

    Args:
        function: what ``name`` names.
        name: as a recipe writes it.
        given: what it receives by position.
        key: of the recipe, for errors.
        options: what it receives by name.
        supplied: names of further arguments that it may get, if it has them.
        reserved: names that its options cannot have, being keys of the recipe.

    Raises:
        ValueError: naming the option, and the signature.
    """
    found = _signature(function)
    if found is None:
        return
    takes = found.parameters.values()
    named = [p.name for p in takes if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for parameter in named[len(given) :]:
        if parameter in set(reserved):
            raise ValueError(f"{key} {name!r} must have no parameter {parameter!r}, which is a key of the block {key}. Rename it.")
    if not any(p.kind is p.VAR_KEYWORD for p in takes):
        for option in options:
            if option not in named:
                raise ValueError(checks.unknown(f"option of {key} {name!r}:", option, named[len(given) :]))
    arguments = {**dict.fromkeys(set(supplied) & set(named)), **options}
    try:
        found.bind(*given, **arguments)
    except TypeError as error:
        wanted = ", ".join([*given, *(f"{option}=..." for option in options)])
        raise ValueError(
            f"{key} must be callable as {name}({wanted}); got a function of {found}: {error}. Change one of the two."
        ) from error


def _recorded(name: str, before: Any, beside: Path | None) -> Path | None:
    """The file that was recorded for ``name``, or the same content where it would be found today."""
    where = name.rpartition(":")[0]
    held: dict[str, Any] = dict(cast("Mapping[str, Any]", before)) if isinstance(before, Mapping) else {}
    if not all(isinstance(held.get(part), str) for part in ("file", "sha256")):
        raise TypeError(f"code.{where} must be a file and its sha256; got {held}. Leave code out: it is written by gradreg.")
    file: Path | None = Path(held["file"])
    assert file is not None
    if not file.is_file():
        try:
            file = find(name, beside)
        except ValueError as error:
            raise ValueError(f"code.{where} must be a file that is there; got {before['file']!r}, and {error}") from error
    if file is not None and digest(file) != held["sha256"]:
        raise ValueError(
            f"code.{where} must be the file that the run was made with; {str(file)!r} has changed since. Restore it, or start another "
            "run with another --out; of a config.yaml that is used as a recipe, --code null takes the file as it is now."
        )
    return file


def _imported(where: str, file: Path | None) -> Any:
    if file is not None and (where.endswith(".py") or "." not in where):
        return load_file(file)
    if file is not None:
        parts = where.split(".")
        folder = str(file.parents[len(parts) - 1 + (file.name == "__init__.py")])
        if folder not in sys.path:
            sys.path.insert(0, folder)
    try:
        return importlib.import_module(where)
    except Exception as error:
        raise ValueError(_cannot_import(file or Path(where), error)) from error


def _of_gradreg(error: BaseException) -> bool:
    """Whether it is one of gradreg's own errors, which say what to change."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, (ValueError, TypeError)) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


def _cannot_import(file: Path, error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == file.name]
    line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
    what = error.msg if isinstance(error, SyntaxError) else str(error)
    remedy = f"Run: pip install {error.name}" if isinstance(error, ModuleNotFoundError) else "Mend it."
    remedy = 'Put what it runs by itself under if __name__ == "__main__":.' if isinstance(error, SystemExit) else remedy
    return f"{str(file)!r} cannot be imported: {type(error).__name__}{'' if line is None else f' in line {line}'}: {what}. {remedy}"


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # of what is not written in Python
        return None
