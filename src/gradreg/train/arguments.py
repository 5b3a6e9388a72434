"""From a command line to plain keys: a command's own options, and overrides of a recipe's keys such as ``--epochs 3``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, NoReturn, get_type_hints

from gradreg import checks, own_code
from gradreg.command_lines import Parser
from gradreg.study.variants import parse_penalty
from gradreg.train.configuration import Config
from gradreg.train.data.configuration import DataConfig
from gradreg.train.recipe import FREE
from gradreg.train.strict_yaml import read_yaml


class CommandParser:
    """A command's own options, the positional ``RECIPE``, and every key of ``Config`` as an option.

    Args:
        command: the command's name, for usage and errors.
        description: what it does, for ``--help``.
        default_recipe: the recipe used when none is named; None makes the argument required.
        positional: name and help of the positional argument, if it is not a recipe.
    """

    def __init__(
        self, command: str, description: str, *, default_recipe: str | None = None, positional: tuple[str, str] | None = None
    ) -> None:
        self._prog, self._description = f"gradreg {command}", description
        self._options: list[tuple[str, dict[str, Any]]] = []
        optional: dict[str, Any] = {} if default_recipe is None else {"nargs": "?", "default": default_recipe}
        name, explanation = positional or ("recipe", "name of a shipped recipe, or path of a YAML file with the keys below")
        self.add(name, metavar=name.upper(), type=str, help=explanation, **optional)

    def add(self, option: str, **keywords: Any) -> None:
        """Add an option to the command, as ``argparse.ArgumentParser.add_argument`` does."""
        self._options.append((option, keywords))

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """The command's own options, without the configuration, as a dictionary.

        Raises:
            ValueError: an unknown option (the nearest known one is named), or an invalid value.
        """
        own, _ = separate(argv, self._taken())
        if {"-h", "--help"} & set(own):
            self._print_help()
        known = [option.removeprefix("--") for option, _ in self._options]
        for word in own:
            option = word.partition("=")[0]
            if word.startswith("--") and option.removeprefix("--") not in ("", *known[1:]):
                keys = [f"--{key}" for key in (*keys_of_configuration(), *known[1:]) if key not in _BLOCKS]
                raise ValueError(checks.unknown("option", option, keys))
        parser = Parser(prog=self._prog, add_help=False, allow_abbrev=False)
        for option, keywords in self._options:
            parser.add_argument(option, **keywords)
        options, left_over = parser.parse_known_args(own)
        if left_over:
            parser.error(f"unrecognized arguments: {', '.join(map(repr, left_over))}")
        return vars(options)

    def settings(self, argv: Sequence[str], base: Mapping[str, Any]) -> dict[str, Any]:
        """The plain keys of ``base``, a recipe's, with those that ``argv`` gives laid over them; ``recipe.configuration`` parses them."""
        settings: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in base.items()}
        _, typed = separate(argv, self._taken())
        before: Any = base.get("data")
        for one in typed:
            if one.mapping in FREE:
                continue
            held = settings.get(one.mapping)
            block = held if isinstance(held, Mapping) else {}
            if one.path:
                settings[one.mapping] = {**block, one.path[0]: one.value}
            else:
                settings[one.mapping] = {**block, **one.value} if isinstance(one.value, Mapping) else one.value
        data = settings.get("data")
        if isinstance(data, dict):
            if isinstance(before, Mapping) and before.get("options") and data.get("name") != before.get("name"):
                settings["data"] = data = {key: value for key, value in data.items() if key != "options" or value != before["options"]}
            self._check_options_of_data(argv, data.get("name"))
        # After the blocks, because a block may contain options too, as in --optimizer '{name: adamw, options: {eps: 1e-6}}'.
        for key in FREE:
            keys = [one for one in typed if one.mapping == key]
            block, _, option = key.rpartition(".")
            inside: Any = settings.setdefault(block, {}) if block and keys else settings
            if keys and isinstance(inside, dict):
                inside[option] = changed(inside.get(option, _DEFAULTS.get(option)), keys)
        return settings

    def _taken(self) -> list[str]:
        return [option for option, _ in self._options if option.startswith("--")]

    def _check_options_of_data(self, argv: Sequence[str], data: Any) -> None:
        """Raise for an option that is no key of ``data``, unless that is a data set of one's own, whose option it may be."""
        for word in argv:
            option = word.partition("=")[0]
            if not own_code.is_own(data) and _is_option_of_data(option.removeprefix("--")):
                raise ValueError(checks.unknown("option", option, [f"--{key}" for key in keys_of_configuration() if key not in _BLOCKS]))

    def _print_help(self) -> NoReturn:
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(prog=self._prog, description=self._description)
        for i, (option, keywords) in enumerate(self._options):
            parser.add_argument(option, **keywords)
            if i == 0:  # but for keys that are options of the command itself, as --penalty of tune is
                keys = set(keys_of_configuration())
                own: set[str | int] = {key for taken in self._taken() if (key := taken.removeprefix("--")) in keys}
                parser.add_class_arguments(Config, skip=own)
        parser.parse_args(["--help"])
        raise AssertionError("--help ends the process")


@dataclass(frozen=True)
class Typed:
    """One option of a command line that is a key of the configuration, and its value.

    Args:
        mapping: the mapping of ``FREE``, the block or the key that it changes.
        path: the keys inside that lead to the changed one; empty for the whole mapping.
        value: the option's value, parsed as YAML for a mapping, and as text for any other key.
    """

    mapping: str
    path: tuple[str, ...]
    value: Any


def separate(argv: Sequence[str], taken: Sequence[str] = ()) -> tuple[list[str], list[Typed]]:
    """The arguments that are not keys of the configuration, and the overrides of keys with their values, in order.

    Args:
        argv: the arguments.
        taken: options of the command itself, which go before keys of the same name.

    Raises:
        ValueError: an option without a value, or whose value is not YAML.

    >>> separate(["--seeds", "3", "--model.hidden", "[64]", "--epochs=5"])
    (['--seeds', '3'], [Typed(mapping='model', path=('hidden',), value=[64]), Typed(mapping='epochs', path=(), value='5')])
    """
    own: list[str] = []
    found: list[Typed] = []
    waiting = iter(argv)
    for word in waiting:
        option, has_value, text = word.partition("=")
        key = option.removeprefix("--")
        key = key_of(key) if option.startswith("--") else key
        mapping = next((free for free in FREE if f"{key}.".startswith(f"{free}.")), None)
        if not option.startswith("--") or option in taken or (mapping is None and key not in keys_of_configuration()):
            own.append(word)
            continue
        if not has_value:
            text = next(waiting, "--")
        if not has_value and text.startswith("--"):
            raise ValueError(f"{option} must be followed by its value; got {'nothing' if text == '--' else repr(text)}.")
        if mapping is not None:
            value = _penalty(option, text) if key == "penalty" else read_yaml(option, text)
            found.append(Typed(mapping, tuple(key.removeprefix(mapping).split(".")[1:]), value))
            continue
        block, *inside = key.split(".")
        value = text if inside or block not in _BLOCKS else _block(block, read_yaml(option, text))
        found.append(Typed(block, tuple(inside), value))
    return own, found


def changed(before: Mapping[str, Any] | None, typed: Sequence[Typed]) -> Any:
    """The mapping ``before`` with the overrides applied in order; a new ``name`` discards its other keys."""
    named = [one.value for one in typed if one.path == ("name",)]
    result: Any = before if not before or not named or named[-1] == before.get("name") else {}
    for one in typed:
        result = _with(result, one.path, one.value)
    return result


@cache
def keys_of_configuration() -> tuple[str, ...]:
    """Every key of ``Config``, dotted, each block before its keys."""

    def keys(schema: type, prefix: str) -> list[str]:
        found: list[str] = []
        for name, kind in get_type_hints(schema).items():
            found += [prefix + name, *(keys(kind, f"{prefix}{name}.") if is_dataclass(kind) else [])]  # type: ignore[arg-type]
        return found

    return tuple(keys(Config, ""))


def key_of(key: str) -> str:
    """The key of a configuration that ``key`` stands for: what ``data`` does not have is an option of a data set of one's own.

    >>> key_of("data.width"), key_of("data.name")
    ('data.options.width', 'data.name')
    """
    return key.replace("data.", "data.options.", 1) if _is_option_of_data(key) else key


def _is_option_of_data(key: str) -> bool:
    """Whether ``key`` is in the block ``data`` but none of its own: an option of a data set of one's own, or a mistake."""
    return key.startswith("data.") and key.split(".")[1] not in get_type_hints(DataConfig)


_BLOCKS = [name for name, kind in get_type_hints(Config).items() if is_dataclass(kind)]
_DEFAULTS = {f.name: f.default_factory() for f in fields(Config) if f.name == "model" and f.default_factory is not MISSING}
"""The defaults of mappings that are not empty when neither the recipe nor the command line names them."""


def _block(name: str, value: Any) -> Any:
    """The value of a whole block, which is a mapping (or null, which raises when the configuration is made)."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a mapping of keys to values. Write --{name}.KEY VALUE (gradreg train --help explains every key)")
    return value


def _penalty(option: str, text: str) -> Any:
    """The block ``penalty``, in YAML or as ``gradreg compare --penalties`` has it: ``sam:rho=0.1``, or ``none``.

    Raises:
        ValueError: neither, or with options of the task.
    """
    written = text.strip().startswith("{")
    try:
        value = read_yaml(option, text)
    except ValueError:
        if written:
            raise
        value = text
    if not isinstance(value, str):
        return value
    block, changes = parse_penalty(text)
    if changes:
        raise ValueError(
            f"{option} must be a penalty alone; got {text!r}, which changes {', '.join(changes)} too. Write --KEY VALUE for each."
        )
    return block


def _with(before: Any, path: tuple[str, ...], value: Any) -> Any:
    if not path:
        return value
    around = before if isinstance(before, Mapping) else {}
    return {**around, path[0]: _with(around.get(path[0]), path[1:], value)}
