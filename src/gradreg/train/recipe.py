"""Recipes, YAML files with a configuration and, under ``variants``, named changes to it: reading, merging and parsing them.

A recipe is read as plain keys. Merging a variant and the command line into them gives plain keys again. These are parsed once, by
``configuration``, into the typed ``Config``.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from gradreg import checks, command_lines, own_code
from gradreg.train.configuration import Config, own_names
from gradreg.train.data.configuration import DataConfig
from gradreg.train.strict_yaml import read_text, read_yaml

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

FREE = ("model", "data.options", "loss", "metric", "penalty", "flooding", "optimizer.options", "schedule.options", "code")
"""The mappings whose keys are defined by models, penalties, timm and functions of one's own. jsonargparse would parse the strings in them
as YAML a second time: the text "1e3" would become a number."""


@dataclass(frozen=True)
class Recipe:
    """A recipe as read: the base configuration's keys, and the changes that each variant makes to them.

    Args:
        name: the shipped name, or the file's.
        description: a description of one or two lines.
        base: the keys of ``Config`` that the recipe sets, nested plain values.
        variants: name -> changed keys; empty if the recipe has none.
        folder: that of its file, where functions of one's own are looked for first; None for a shipped recipe.
    """

    name: str
    description: str
    base: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    folder: Path | None = None

    def settings(self, variant: str | None = None, *, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The nested keys of ``base`` (by default the recipe's own), merged with the changes of ``variant``.

        Raises:
            ValueError: an unknown variant; the nearest known one is named.
        """
        settings = dict(self.base if base is None else base)
        if variant is None:
            return settings
        if not self.variants:
            raise ValueError(f"variant {variant!r} cannot be picked: recipe {self.name!r} has no variants. Leave it out.")
        if variant not in self.variants:
            raise ValueError(checks.unknown(f"variant of recipe {self.name!r}:", variant, self.variants))
        return merge(settings, self.variants[variant])

    def configuration(self, settings: Mapping[str, Any], variant: str | None = None) -> Config:
        """The typed configuration of ``settings``, the keys of ``variant`` with the overrides of a command line.

        Raises:
            ValueError, TypeError: as ``configuration``; if the recipe itself is wrong, the error names it.
        """
        try:
            return configuration(settings, self.folder)
        except (ValueError, TypeError):
            self.check(variant)
            raise

    def check(self, variant: str | None = None) -> None:
        """Parse the recipe's own keys, without those of a command line.

        Raises:
            ValueError, TypeError: naming the recipe, the variant and the key, the rule, the value received and the remedy.
        """
        try:
            configuration(self.settings(variant), self.folder)
        except (ValueError, TypeError) as error:
            where = f"recipe {self.name!r}" + (f", variant {variant!r}" if variant else "")
            raise type(error)(f"{where}: {error}") from error


def shipped() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def load(name_or_path: str) -> Recipe:
    """Read a recipe by its shipped name or by path; its values are checked when a configuration is made from them.

    Raises:
        ValueError: no such recipe, no valid YAML, an empty file, or an unknown key (the nearest known one is named).
    """
    path = Path(name_or_path)
    looks_like_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
    if not looks_like_path and name_or_path in shipped():
        return read_recipe(name_or_path, (_folder() / f"{name_or_path}.yaml").read_text(encoding="utf-8"))
    if path.exists() and not path.is_file() and looks_like_path:
        raise ValueError(f"{name_or_path!r} must be a file with a recipe in YAML; it is a folder, or no plain file. Name the file in it.")
    if not path.is_file():
        raise ValueError(f"{checks.unknown('recipe', name_or_path, shipped())} Or give the path of a YAML file.")
    text = read_text(path)
    try:
        return replace(read_recipe(path.stem, text), folder=path.parent)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error


def read_recipe(name: str, text: str) -> Recipe:
    """The recipe in ``text``, with checked keys and unchecked values."""
    content = read_yaml(f"recipe {name!r}", text)
    if content is None:
        raise ValueError(f"recipe {name!r} must hold a configuration; got an empty file. See gradreg train --help for the keys.")
    if not isinstance(content, dict):
        raise TypeError(f"recipe {name!r} must be a mapping of keys to values; got {checks.describe(content)}.")
    description = content.pop("description", "")
    variants = content.pop("variants", None) or {}
    if not isinstance(variants, dict) or not all(isinstance(v, dict) for v in variants.values()):
        raise TypeError(f"variants of recipe {name!r} must map names to changed keys, as in sam: {{penalty: {{name: sam, rho: 0.1}}}}.")
    own = _name_of_data(content)
    content = _with_options_of_data(content, own)
    _check_keys(f"recipe {name!r}:", content, extra=("description", "variants"))
    variants = {variant: _with_options_of_data(changes, _name_of_data(changes, own)) for variant, changes in variants.items()}
    for variant, changes in variants.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", variant):
            raise ValueError(f"a variant's name must be made of letters, digits, '.', '_' and '-'; got {checks.describe(variant)}.")
        _check_keys(f"variant {variant!r}:", changes)
    return Recipe(name=name, description=str(description).strip(), base=content, variants=variants)


def parse_recipe(name: str, text: str) -> Recipe:
    """The recipe in ``text``, checked with all its variants."""
    recipe = read_recipe(name, text)
    for variant in (None, *recipe.variants):
        recipe.check(variant)
    return recipe


def merge(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` merged with ``changes``, block by block; a block that changes its ``name`` is replaced as a whole.

    A block without a name has the default one.
    """
    return _merged(settings, changes, _default_names())


def configuration(settings: Mapping[str, Any], folder: Path | None = None) -> Config:
    """The typed, checked configuration of nested plain keys; strings are parsed as YAML where the key's type is not a string.

    Args:
        settings: the keys.
        folder: where functions of one's own are looked for first; None for the working directory.

    Raises:
        ValueError, TypeError: naming the key, the rule, the value received and the remedy.
    """
    for key, value in settings.items():
        _check_plain(str(key), value)
    settings = _with_options_of_data(settings, _name_of_data(settings))
    _check_shape(Config, settings)
    typed = {key: dict(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    free: dict[str, Any] = {}
    for key in FREE:
        block, _, option = key.rpartition(".")
        inside = typed.get(block, {}) if block else typed
        if option in inside:
            free[key] = copy.deepcopy(inside.pop(option))
    with _readable_errors():
        built = copy.deepcopy(_built(json.dumps(typed)))
    for key, value in free.items():
        block, _, option = key.rpartition(".")
        setattr(built[block] if block else built, option, value)
    found = {f.name: built[f.name] for f in fields(Config)}
    if folder is not None and isinstance(found["model"], Mapping):
        found["code"] = own_code.located(own_names(found), beside=folder, recorded=found["code"])
    return Config(**found)


@lru_cache(maxsize=16)
def _built(keys: str) -> Any:
    """The blocks of these keys, as JSON: the many variants of a study differ in keys that are not parsed here."""
    parser = _parser()
    return parser.instantiate(parser.parse_object(json.loads(keys)))


@contextmanager
def _readable_errors() -> Iterator[None]:
    """A context that turns jsonargparse's errors into a readable ``ValueError``."""
    from argparse import ArgumentError

    try:
        with command_lines.convertible():
            yield
    except ArgumentError as error:
        text = " ".join(str(error.message).split()).replace("Parser key", "key")
        text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("a typing.Literal", "one of ")
        text = re.sub(r'key "(\w+)": Unable to load config .*', r"\1 must be a mapping of keys to values. Write --\1.KEY VALUE", text)
        raise ValueError(f"{text} (gradreg train --help explains every key)") from error


@cache
def _parser() -> ArgumentParser:
    # Pickling asks every module for its attributes, and torch.compile pickles; jsonargparse warns when asked for deprecated ones.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    from jsonargparse import ArgumentParser

    for schema in (Config, *(kind for kind in _types(Config).values() if is_dataclass(kind))):
        # Annotations that are text make jsonargparse run the TYPE_CHECKING blocks of their modules, which import PyTorch.
        schema.__init__.__annotations__ |= _types(schema)
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(Config)
    return parser


def _check_keys(what: str, content: Mapping[str, Any], *, extra: Sequence[str] = (), schema: type = Config) -> None:
    """Raise for a key that ``schema`` does not have, block by block, before the values are checked."""
    types = _types(schema)
    for key, value in content.items():
        if key not in types:
            raise ValueError(checks.unknown(f"key in {what}", key, [*types, *extra]))
        if not is_dataclass(types[key]):
            continue
        if not isinstance(value, Mapping):
            raise TypeError(f"key {key!r} in {what} must be a mapping of keys to values; got {checks.describe(value)}.")
        _check_keys(f"{what.rstrip(':')}, block {key!r}:", value, schema=types[key])


def _check_shape(schema: type, content: Mapping[str, Any], prefix: str = "") -> None:
    """Raise for a mapping or a null where it does not belong, which jsonargparse does not check."""
    types = _types(schema)
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
    """Raise for values that cannot be written and read back: YAML also has dates, sets, keys that are not names, and cycles."""
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
    elif value != value and not where.startswith("penalty."):  # penalties check their own numbers
        raise ValueError(f"{where} must be finite; got nan.")


def _name_of_data(content: Mapping[str, Any], default: Any = None) -> Any:
    block = content.get("data")
    return block.get("name", default) if isinstance(block, Mapping) else default


def _with_options_of_data(content: Mapping[str, Any], name: Any) -> dict[str, Any]:
    """``content`` with those keys of its block ``data`` that are options of a data set of one's own under ``data.options``.

    Raises:
        ValueError: an option that is in both places.
    """
    block = content.get("data")
    own = own_code.is_own(name) and isinstance(block, Mapping)
    further = {key: value for key, value in block.items() if key not in _types(DataConfig)} if own else {}  # type: ignore[union-attr]
    if not further:
        return dict(content)
    options = block.get("options") or {}  # type: ignore[union-attr]
    for key in further:
        if key in options:
            raise ValueError(f"data.{key} must be given once; got it in data and in data.options. Remove one.")
    kept = {key: value for key, value in block.items() if key not in further}  # type: ignore[union-attr]
    return {**content, "data": {**kept, "options": {**options, **further}}}


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(settings))
    for key, value in changes.items():
        before: Any = merged.get(key)
        blocks = isinstance(before, dict) and isinstance(value, Mapping)
        name = before.get("name", names.get(key)) if blocks else None
        merged[key] = _merged(before, value, {}) if blocks and value.get("name", name) == name else copy.deepcopy(value)
    return merged


@cache
def _default_names() -> dict[str, Any]:
    """Block -> its default ``name``."""
    blocks = {name: kind for name, kind in _types(Config).items() if is_dataclass(kind)}
    names = {block: f.default for block, kind in blocks.items() for f in fields(kind) if f.name == "name"}
    return {**names, **{f.name: f.default_factory()["name"] for f in fields(Config) if f.name == "model" and callable(f.default_factory)}}


@cache
def _types(schema: type) -> dict[str, Any]:
    return get_type_hints(schema)


def _folder() -> Any:
    return resources.files("gradreg") / "recipes"
