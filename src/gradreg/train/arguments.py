"""From words on a command line to a checked configuration, by jsonargparse: every key of ``Config`` is an option and explains itself."""

from __future__ import annotations

import copy
import os
import re
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from gradreg import checks
from gradreg.train import free_keys
from gradreg.train.configuration import Config
from gradreg.train.free_keys import FREE

# Pickling asks every module for its attributes, and torch.compile pickles; jsonargparse warns when asked for those that it has deprecated.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


class CommandParser:
    """A command's own options, the positional ``RECIPE``, and every key of ``Config`` as an option.

    Args:
        command: the command's name, for usage and errors.
        description: what it does, for ``--help``.
        default_recipe: the recipe taken when none is named; None makes it obligatory.
        positional: name and explanation of the positional argument, where it is not a recipe.
    """

    def __init__(
        self, command: str, description: str, *, default_recipe: str | None = None, positional: tuple[str, str] | None = None
    ) -> None:
        self.options = ArgumentParser(prog=f"gradreg {command}", description=description, exit_on_error=False, allow_abbrev=False)
        optional: dict[str, Any] = {} if default_recipe is None else {"nargs": "?", "default": default_recipe}
        name, explanation = positional or ("recipe", "name of a shipped recipe, or path of a YAML file with the keys below")
        self.options.add_argument(name, metavar=name.upper(), type=str, help=explanation, **optional)
        self.options.add_class_arguments(Config)

    def parse(self, words: Sequence[str]) -> dict[str, Any]:
        """The command's own options (and nothing of the configuration) as a dictionary."""
        others, _ = free_keys.separate(words)
        return {k: v for k, v in vars(_parse(self.options, others)).items() if k not in _KEYS}

    def settings(self, words: Sequence[str], base: Mapping[str, Any]) -> dict[str, Any]:
        """All keys of the configuration: the defaults, under the recipe's ``base``, under what ``words`` override."""
        below = _typed(base)
        free = {key: below[key] for key in FREE}
        for key in FREE:
            below[key] = {}
        others, typed = free_keys.separate(words)
        for one in typed:
            _check_plain(".".join((one.mapping, *one.path)), one.value)
        values = _parse(self.options, others, base=below)
        for key in FREE:  # options may also have come with their whole block, as in --optimizer '{name: adamw, options: {eps: 1e-6}}'
            before = values[key] or free[key]
            values[key] = free_keys.changed(before, [one for one in typed if one.mapping == key])
        return {k: v for k, v in values.as_dict().items() if k in _KEYS}


def configuration(settings: Mapping[str, Any]) -> Config:
    """The typed, checked configuration of nested plain keys.

    Raises:
        ValueError, TypeError: naming the key, the rule, the value received and the remedy.
    """
    values = _typed(settings)
    free = {key: values[key] for key in FREE}
    for key in FREE:
        values[key] = {}
    built = _plain_parser().instantiate(values)
    for key, value in free.items():
        block, _, option = key.rpartition(".")
        setattr(built[block] if block else built, option, value)
    return Config(**{key: built[key] for key in _KEYS})


_KEYS = [f.name for f in fields(Config)]
_BLOCKS = [name for name, kind in get_type_hints(Config).items() if is_dataclass(kind)]


@cache
def _plain_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(Config)
    return parser


def _typed(settings: Mapping[str, Any]) -> Namespace:
    """All keys of the configuration, those of ``settings`` checked against their types, and the defaults of the others."""
    for key, value in settings.items():
        _check_plain(str(key), value)
    _check_shape(Config, settings)
    typed = {key: dict(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    free: dict[str, Any] = {}
    for key in FREE:
        block, _, option = key.rpartition(".")
        inside = typed.get(block, {}) if block else typed
        if option in inside:
            free[key] = inside.pop(option)
    with _errors_in_words():
        values = _plain_parser().parse_object(typed)
    for key, value in free.items():
        values[key] = copy.deepcopy(value)
    return values


def _check_shape(schema: type, content: Mapping[str, Any], prefix: str = "") -> None:
    """Fail where a mapping or a null is not what it should be: jsonargparse looks into neither."""
    types = get_type_hints(schema)
    for key, value in content.items():
        kind, where = types.get(key), f"{prefix}{key}"
        if kind is None:
            continue
        accepted = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        if value is None and type(None) not in accepted:
            raise TypeError(f"{where} must not be null. Leave it out for its default.")
        mapping = is_dataclass(kind) or any(get_origin(option) is dict for option in accepted)
        if value is None or not mapping:
            continue
        if not isinstance(value, Mapping):
            raise TypeError(f"{where} must be a mapping of keys to values; got {checks.describe(value)}.")
        if is_dataclass(kind):
            _check_shape(kind, value, f"{where}.")  # type: ignore[arg-type]


def _check_plain(where: str, value: object, around: tuple[int, ...] = ()) -> None:
    """Fail on what cannot be written down and read again: YAML also has dates, sets, keys that are no names, and cycles."""
    if isinstance(value, (Mapping, list)):
        if id(value) in around:
            raise ValueError(f"{where} must not be a part of itself. Write out what the alias stands for.")
        if isinstance(value, Mapping) and not all(isinstance(name, str) for name in value):
            raise TypeError(f"{where} must be a mapping of keys to values; got {checks.describe(value)}.")
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, part in parts:
            _check_plain(f"{where}.{name}", part, (*around, id(value)))
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} must be text that UTF-8 can hold; got {value!r}. Rename it.") from error
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise TypeError(
            f"{where} must be made of numbers, texts, lists and mappings; got {checks.describe(value)}. Quote it to make it text."
        )
    elif value != value and not where.startswith("penalty."):  # a penalty speaks for itself
        raise ValueError(f"{where} must be finite; got nan.")


def _parse(parser: ArgumentParser, words: Sequence[str], *, base: Namespace | None = None) -> Namespace:
    spelled = {option[2:].replace("-", "_"): option[2:] for option in parser._option_string_actions if "-" in option[2:]}
    known = [spelled.get(key, key) for key in parser.get_defaults().keys(branches=True)]
    for word in words:
        key = word[2:].partition("=")[0]
        if word.startswith("--") and key not in ("", "help") and key not in known:
            options = [f"--{k}" for k in known if k not in ("recipe", *_BLOCKS)]
            raise ValueError(checks.unknown("option", word.partition("=")[0], options))
    with _errors_in_words(parser.prog):
        return parser.parse_args(list(words), namespace=copy.deepcopy(base))


@contextmanager
def _errors_in_words(command: str = "gradreg train") -> Iterator[None]:
    """What jsonargparse raises, as a ``ValueError`` that a user can read; ``command`` is the one that explains the keys."""
    try:
        yield
    except ArgumentError as error:
        text = " ".join(str(error.message).split()).replace("Parser key", "key")
        text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("a typing.Literal", "one of ")
        text = re.sub(r'key "(\w+)": Unable to load config .*', r"\1 must be a mapping of keys to values. Write --\1.KEY VALUE", text)
        raise ValueError(f"{text} ({command} --help explains every key)") from error
    except RecursionError as error:
        raise ValueError("a key must not be a part of itself; got an alias within what it stands for. Write it out.") from error
    except OverflowError as error:
        raise ValueError("a number must be < 1.8e308; got one that is larger. Write a smaller one, or null.") from error
