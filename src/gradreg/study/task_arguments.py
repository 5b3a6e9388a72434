"""The command lines of ``gradreg compare`` and ``gradreg tune``: a task, the command's own options, and those of the task itself."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gradreg import checks
from gradreg.command_lines import convertible
from gradreg.study.functions import FunctionTask, is_reference, load_task
from gradreg.study.tasks import Task

Options = Sequence[tuple[str, Mapping[str, Any]]]
"""Option -> the keywords of ``argparse.ArgumentParser.add_argument``."""

DEFAULT_RECIPE = "digits-noisy-labels"


def parse(command: str, description: str, options: Options, argv: Sequence[str]) -> tuple[dict[str, Any], Task]:
    """The command's own options, and the task with its own options set as given.

    A file's task decides which options there are, so it is looked for before they are parsed.

    Raises:
        ValueError: an unknown task or option, or a value that does not fit.
    """
    place = next((i for i, word in enumerate(argv) if is_reference(word) and (i == 0 or ".py" in word)), None)
    if place is None:
        return _recipe(command, description, options, argv)
    task = load_task(argv[place])
    parsed = _parse(command, description, options, task, argv[place], [*argv[:place], *argv[place + 1 :]])
    given = {key: parsed.pop(key) for key in task.options}
    return parsed, task.configured(given)


def _recipe(command: str, description: str, options: Options, argv: Sequence[str]) -> tuple[dict[str, Any], Task]:
    from gradreg.train import recipe as recipes
    from gradreg.train.arguments import CommandParser
    from gradreg.train.task import RecipeTask

    for package in ("torch", "safetensors"):
        if importlib.util.find_spec(package) is None:  # else every run would fail on it
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    parser = CommandParser(command, description, default_recipe=DEFAULT_RECIPE)
    for option, keywords in options:
        parser.add(option, **keywords)
    parsed = parser.parse(argv)
    recipe = recipes.load(parsed["recipe"])
    return parsed, RecipeTask(recipe, parser.settings(argv, recipe.base))


def _parse(command: str, description: str, options: Options, task: FunctionTask, reference: str, argv: Sequence[str]) -> dict[str, Any]:
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"gradreg {command} {reference}", description=task.description or description, exit_on_error=False, allow_abbrev=False
    )
    for option, keywords in options:
        parser.add_argument(option, **keywords)
    task.add_options(parser)
    known = [*(option for option, _ in options), *(f"--{name}" for name in task.options), "--help"]
    for word in argv:
        option = word.partition("=")[0]
        if word.startswith("--") and option.split(".")[0] not in known:
            raise ValueError(checks.unknown("option", option, known))
    try:
        with convertible(lambda: _culprit(parser, argv)):
            parsed = parser.instantiate(parser.parse_args(list(argv)))
    except ArgumentError as error:
        text = re.sub(r"<class '(\w+)'>", r"\1", " ".join(str(error.message).split()).replace("Parser key", "option"))
        raise ValueError(f"{text} (gradreg {command} {reference} --help explains every option)") from error
    return {
        **{_key(option): parsed[_key(option)] for option, _ in options},
        **{name: parsed[name] for name in task.options},
    }


def _culprit(parser: Any, argv: Sequence[str]) -> str:
    """The first option whose value cannot even be converted, with what it was given."""
    from argparse import ArgumentError

    for i, word in enumerate(argv):
        option, joined, value = word.partition("=")
        if not option.startswith("--") or option == "--help":
            continue
        try:
            parser.parse_args([word] if joined else [*argv[i : i + 2]])
        except (LookupError, AttributeError, RecursionError, OverflowError):
            return f"{option} {checks.describe(value if joined else argv[i + 1])}"
        except ArgumentError:
            continue
    return "a value"


def _key(option: str) -> str:
    """``--max-seeds`` as its value is called: ``max_seeds``."""
    return option.removeprefix("--").replace("-", "_")
