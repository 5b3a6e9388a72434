"""From words on a command line to a checked configuration, by jsonargparse: every key of ``Config`` is an option and explains itself."""

from __future__ import annotations

import re
from argparse import SUPPRESS, ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from gradreg import checks
from gradreg.train.configuration import Config


class CommandParser:
    """A command's own options, the positional ``RECIPE``, and every key of ``Config`` as an option.

    Args:
        command: the command's name, for usage and errors.
        description: what it does, for ``--help``.
        default_recipe: the recipe taken when none is named; None makes it obligatory.
    """

    def __init__(self, command: str, description: str, *, default_recipe: str | None = None) -> None:
        self.options = ArgumentParser(prog=f"gradreg {command}", description=description, exit_on_error=False, allow_abbrev=False)
        optional: dict[str, Any] = {} if default_recipe is None else {"nargs": "?", "default": default_recipe}
        explanation = "name of a shipped recipe, or path of a YAML file with the keys below"
        self.options.add_argument("recipe", metavar="RECIPE", type=str, help=explanation, **optional)
        _add_configuration(self.options)

    def parse(self, words: Sequence[str]) -> dict[str, Any]:
        """The command's own options (and nothing of the configuration) as a dictionary."""
        values = _parse(self.options, words)
        return {k: v for k, v in values.items() if k not in _KEYS}

    def settings(self, words: Sequence[str], base: Mapping[str, Any]) -> dict[str, Any]:
        """All keys of the configuration: the defaults, under the recipe's ``base``, under what ``words`` override."""
        values = _parse(self.options, [f"--config={yaml.safe_dump(dict(base))}", *words])
        return {k: v for k, v in values.items() if k in _KEYS}


def configuration(settings: Mapping[str, Any]) -> Config:
    """The typed, checked configuration of nested plain keys.

    Raises:
        ValueError, TypeError: naming the key, the rule, the value received and the remedy.
    """
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    _add_configuration(parser)
    try:
        built = parser.instantiate(parser.parse_args([f"--config={yaml.safe_dump(dict(settings))}"]))
    except ArgumentError as error:
        raise ValueError(_message(error)) from error
    return Config(**{key: built[key] for key in _KEYS})


_KEYS = [f.name for f in fields(Config)]


def _add_configuration(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help=SUPPRESS)
    parser.add_class_arguments(Config)


def _parse(parser: ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    spelled = {option[2:].replace("-", "_"): option[2:] for option in parser._option_string_actions if "-" in option[2:]}
    known = [spelled.get(key, key) for key in parser.get_defaults().keys(branches=True) if key != "config"]
    for word in words:
        key = word[2:].partition("=")[0]
        free = key.startswith(("model.", "penalty.", "optimizer.options."))
        if word.startswith("--") and key not in ("", "help", "config", "print_config") and key not in known and not free:
            options = [f"--{k}" for k in known if k not in ("recipe", "data", "augmentation", "optimizer", "schedule", "weight_decay")]
            raise ValueError(checks.unknown("option", word.partition("=")[0], options))
    try:
        values = parser.parse_args(list(words)).as_dict()
    except ArgumentError as error:
        raise ValueError(_message(error)) from error
    return {k: v for k, v in values.items() if k != "config"}


def _message(error: ArgumentError) -> str:
    text = " ".join(str(error.message).split()).replace("Parser key", "key")
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.Literal", "one of ")
    return f"{text} (gradreg train --help explains every key)"
