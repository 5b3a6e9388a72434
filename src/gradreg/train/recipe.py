"""Recipes: YAML files, shipped or one's own, that hold a configuration and, under ``variants``, named changes to it."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from gradreg import checks
from gradreg.train import arguments, plain_yaml
from gradreg.train.configuration import Config


@dataclass(frozen=True)
class Recipe:
    """A recipe as read: the base configuration's keys, and the changes that each variant makes to them.

    Args:
        name: the shipped name, or the file's.
        description: what it is, in a line or two.
        base: the keys of ``Config`` that the recipe sets, nested plain values.
        variants: name -> changed keys; empty if the recipe has none.
    """

    name: str
    description: str
    base: dict[str, Any]
    variants: dict[str, dict[str, Any]]

    def settings(self, variant: str | None = None, *, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The nested keys of ``base`` (by default the recipe's own), with the changes of ``variant`` laid over them.

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


def shipped() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def load(name_or_path: str) -> Recipe:
    """Read a recipe by its shipped name or by path.

    Raises:
        ValueError: no such recipe, no valid YAML, an empty file, or an unknown key (the nearest known one is named).
    """
    path = Path(name_or_path)
    looks_like_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
    if not looks_like_path and name_or_path in shipped():
        return parse_recipe(name_or_path, (_folder() / f"{name_or_path}.yaml").read_text(encoding="utf-8"))
    if not path.is_file():
        raise ValueError(f"{checks.unknown('recipe', name_or_path, shipped())} Or give the path of a YAML file.")
    return parse_recipe(path.stem, path.read_text(encoding="utf-8"))


def parse_recipe(name: str, text: str) -> Recipe:
    """The recipe that ``text`` holds."""
    content = plain_yaml.read(f"recipe {name!r}", text)
    if content is None:
        raise ValueError(f"recipe {name!r} must hold a configuration; got an empty file. See gradreg train --help for the keys.")
    if not isinstance(content, dict):
        raise TypeError(f"recipe {name!r} must be a mapping of keys to values; got {checks.describe(content)}.")
    description = content.pop("description", "")
    variants = content.pop("variants", None) or {}
    if not isinstance(variants, dict) or not all(isinstance(v, dict) for v in variants.values()):
        raise TypeError(f"variants of recipe {name!r} must map names to changed keys, as in sam: {{penalty: {{name: sam, rho: 0.1}}}}.")
    _check_keys(f"recipe {name!r}:", content, extra=("description", "variants"))
    for variant, changes in variants.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(variant)):
            raise ValueError(f"a variant's name must be made of letters, digits, '.', '_' and '-'; got {checks.describe(variant)}.")
        _check_keys(f"variant {variant!r}:", changes)
    recipe = Recipe(name=name, description=str(description).strip(), base=content, variants={str(k): v for k, v in variants.items()})
    for variant in (None, *recipe.variants):
        try:
            arguments.configuration(recipe.settings(variant))
        except (ValueError, TypeError) as error:
            where = f"recipe {name!r}" + (f", variant {variant!r}" if variant else "")
            raise type(error)(f"{where}: {error}") from error
    return recipe


def merge(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` with ``changes`` laid over them, block by block; a block that changes its ``name`` is replaced whole."""
    merged = copy.deepcopy(dict(settings))
    for key, value in changes.items():
        before = merged.get(key)
        same_thing = isinstance(before, dict) and isinstance(value, Mapping) and value.get("name", before.get("name")) == before.get("name")
        merged[key] = merge(before, value) if same_thing else copy.deepcopy(value)  # type: ignore[arg-type]
    return merged


def _check_keys(what: str, content: Mapping[str, Any], *, extra: Sequence[str] = (), schema: type = Config) -> None:
    """Fail on a key that ``schema`` does not have, block by block, before the values are looked at."""
    types = get_type_hints(schema)
    for key, value in content.items():
        if key not in types:
            raise ValueError(checks.unknown(f"key in {what}", key, [*types, *extra]))
        if not is_dataclass(types[key]):
            continue
        if not isinstance(value, Mapping):
            raise TypeError(f"key {key!r} in {what} must be a mapping of keys to values; got {checks.describe(value)}.")
        _check_keys(f"{what.rstrip(':')}, block {key!r}:", value, schema=types[key])  # type: ignore[arg-type]


def _folder() -> Any:
    return resources.files("gradreg") / "recipes"
