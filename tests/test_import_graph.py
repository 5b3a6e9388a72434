"""Imports point inward and in no circle, counting those inside functions and those for the type checker alone."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

import gradreg

SOURCE = Path(gradreg.__file__).parent

MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "torch": {"core"},
    "jax": {"core"},
    "integrations": {"core", "torch"},
    "sharpness": {"core", "torch", "jax"},
    "evaluation": {"core", "torch"},
    "theory": {"core", "torch", "sharpness", "files"},
    "train": {"core", "torch", "sharpness", "files", "folders", "environment", "study"},
    "study": {"core", "torch", "jax", "sharpness", "train", "files", "folders", "environment"},
    "files": set(),
    "folders": {"files"},
    "environment": set(),
    "cli": {"core"},
    "__main__": {"cli"},
}
"""Part of the package -> the parts that it may import beside itself. Every top-level module but those named here is the core, circle 1."""

FRAMEWORKS: dict[str, set[str]] = {
    "core": set(),
    "files": set(),
    "folders": set(),
    "environment": set(),
    "cli": set(),
    "__main__": set(),
    "torch": {"torch"},
    "jax": {"jax", "numpy", "optax"},
}
"""Part -> the packages beside the standard library that it may import. The parts of circle 3 may import what their extras install."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found: dict[str, Path] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(("gradreg", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def imported_names(text: str, *, package: str) -> set[str]:
    """Dotted names of all that ``text`` imports, wherever it does: ``a.b`` for ``import a.b``, ``a.b`` for ``from a import b``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            around = package.split(".")
            base = ".".join(
                [*around[: len(around) - node.level + 1], *([node.module] if node.module else [])] if node.level else [node.module or ""]
            )
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def import_graph() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports: the longest that each imported name begins with."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        targets = {_longest(name, known) for name in imported_names(path.read_text(encoding="utf-8"), package=package)}
        graph[module] = {target for target in targets if target is not None and target != module}
    return graph


def _longest(name: str, known: Iterable[str]) -> str | None:
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in known), None)


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """A shortest circle through each module that is on one, each circle once."""
    found: dict[frozenset[str], list[str]] = {}
    for start in graph:
        reached: dict[str, str | None] = {start: None}
        front = [start]
        while front:
            module = front.pop(0)
            if start in graph.get(module, set()):
                path = [start]
                while module != start:
                    path.insert(1, module)
                    module = reached[module] or start
                found.setdefault(frozenset(path), path)
                break
            for target in sorted(graph.get(module, set()) - reached.keys()):
                reached[target] = module
                front.append(target)
    return list(found.values())


def part_of(module: str) -> str:
    """The part of the package in which a module lies, one of ``MAY_IMPORT``."""
    inside = module.removeprefix("gradreg").lstrip(".").split(".")[0]
    return inside if inside in MAY_IMPORT or ((SOURCE / inside).is_dir() and inside) else "core"


def test_no_module_imports_itself_by_way_of_others():
    found = circles(import_graph())
    assert not found, "circles of imports:\n" + "\n".join(" -> ".join([*circle, circle[0]]) for circle in found)


def test_every_part_imports_only_those_further_in():
    wrong = [
        f"{module} imports {target}"
        for module, targets in import_graph().items()
        for target in sorted(targets)
        if part_of(target) != part_of(module) and part_of(target) not in MAY_IMPORT[part_of(module)]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", FRAMEWORKS)
def test_the_core_imports_no_framework_and_each_engine_its_own(part):
    wrong = []
    for module, path in modules().items():
        if part_of(module) != part:
            continue
        packages = {name.split(".")[0] for name in imported_names(path.read_text(encoding="utf-8"), package=module.rpartition(".")[0])}
        wrong += [f"{module} imports {name}" for name in sorted(packages - sys.stdlib_module_names - {"gradreg"} - FRAMEWORKS[part])]
    assert not wrong, "\n".join(wrong)


def test_circles_are_found_however_they_are_written():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set(), "e": {"e2"}, "e2": {"e"}}
    assert sorted(map(sorted, circles(graph))) == [["a", "b", "c"], ["e", "e2"]]
    text = (
        "import os.path\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from gradreg.penalties import GradientPenalty\n"
        "def f():\n    from gradreg.train import models\n    from . import near\n    from ..far import thing\n"
    )
    assert imported_names(text, package="gradreg.study") == {
        "os.path",
        "typing.TYPE_CHECKING",
        "gradreg.penalties.GradientPenalty",
        "gradreg.train.models",
        "gradreg.study.near",
        "gradreg.far.thing",
    }
