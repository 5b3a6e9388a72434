"""YAML without its surprises: each key once and as text, no word that means another thing elsewhere, no tags, and bounded in size.

PyYAML reads YAML 1.1, in which ``no`` is false, ``1:30`` is 90 and ``010`` is 8, takes the last of two equal keys, and lets a file of a few
lines stand for billions of values. Here all of these are errors, which say where.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode

LONGEST = 100_000
"""Characters of a text; the parser takes about a second for so many."""
_MOST_BYTES = 4 * LONGEST
DEEPEST = 40
"""Lists and mappings within one another."""
MOST_VALUES = 10_000
"""Values of a text, each counted as often as aliases repeat it."""

_BOOLEANS = ("true", "True", "TRUE", "false", "False", "FALSE")
_OLD_NUMBERS = re.compile(r"[-+]?(0[0-7_]*[0-7][0-7_]*|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
"""Numbers of YAML 1.1 alone: octal ones, and those to the base 60."""
_KINDS = {"bool": "true or false", "int": "a number", "float": "a number", "null": "nothing", "timestamp": "a date"}


class _Wrong(ValueError):
    """A text that is YAML, but not taken."""


class _Strict(yaml.SafeLoader):
    """YAML 1.1 with the errors that the module's docstring names, raised while the text is read and before aliases are followed."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = [0]
        """Values so far in each of the nodes that are being read, the outermost first."""
        self._names: dict[str, tuple[Any, int | None]] = {}
        """Anchor -> where it is, and how many values it stands for; None while these are being read."""

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Read one value with all that it holds; PyYAML calls this for each."""
        event = self.peek_event()
        if isinstance(event, AliasEvent):
            self._count(event, self._size_of(event))
            return super().compose_node(parent, index)
        if event.tag not in (None, "!"):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _Wrong(f"{_place(event)} has the tag {_short(tag)}, and tags are not taken. Remove it, and quote a value that is a text.")
        if len(self._values) > DEEPEST:
            raise _Wrong(f"{_place(event)} lies more than {DEEPEST} lists and mappings deep. Write it flatter.")
        if event.anchor is not None:
            self._names[event.anchor] = event, None
        self._values.append(1)
        node = super().compose_node(parent, index)
        size = self._values.pop()
        self._count(event, size)
        if event.anchor is not None:
            self._names[event.anchor] = event, size
        if isinstance(node, ScalarNode) and not (isinstance(parent, MappingNode) and index is None):  # a key has no index
            _check_scalar(node)
        elif isinstance(node, MappingNode):
            _check_keys(node)
        return node

    def _size_of(self, alias: AliasEvent) -> int:
        """The values that an alias stands for."""
        anchor, size = self._names.get(alias.anchor, (None, 0))
        if size is None:
            raise _Wrong(
                f"{_place(alias)} has the alias *{alias.anchor} within &{alias.anchor} of {_place(anchor)}, and nothing must be a part of "
                "itself. Write out what it stands for."
            )
        return size

    def _count(self, event: Any, values: int) -> None:
        self._values[-1] += values
        if self._values[-1] > MOST_VALUES:
            raise _Wrong(
                f"by {_place(event)} there are more than {MOST_VALUES:,} values, counted as often as aliases repeat them. Write fewer."
            )


def _check_scalar(node: ScalarNode) -> None:
    """Raise for a plain word that is something else than it seems."""
    kind, word = node.tag.rpartition(":")[2], _short(node.value)
    if node.style is not None:
        return
    if kind == "bool" and node.value not in _BOOLEANS:
        taken = "true" if node.value.lower() in ("yes", "on") else "false"
        raise _Wrong(f"{_place(node)} has {word} without quotes, which YAML takes for {taken}. Write {taken}, or '{word}' for the text.")
    if kind in ("int", "float") and _OLD_NUMBERS.fullmatch(node.value):
        taken = "an octal number" if ":" not in node.value else "a number to the base 60"
        raise _Wrong(
            f"{_place(node)} has {word} without quotes, which YAML takes for {taken}. Write it as usual, or '{word}' for the text."
        )


def _check_keys(node: MappingNode) -> None:
    """Raise for a key that is not a text, or is there twice."""
    before: dict[str, Node] = {}
    for key, _ in node.value:
        if not isinstance(key, ScalarNode):
            raise _Wrong(f"{_place(key)} has a list or mapping for a key. Write a name, as in name: value.")
        kind = key.tag.rpartition(":")[2]
        if key.style is None and kind in _KINDS:
            raise _Wrong(f"{_place(key)} has the key {_short(key.value)} without quotes, which YAML takes for {_KINDS[kind]}. Quote it.")
        if key.value in before:
            raise _Wrong(
                f"the key {_short(key.value)!r} is in {_place(before[key.value], columns=True)} and again in "
                f"{_place(key, columns=True)}, and the first would be lost. Remove or rename one of them."
            )
        before[key.value] = key


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def _place(at: Any, *, columns: bool = False) -> str:
    mark = at.start_mark
    return f"line {mark.line + 1}" + (f", column {mark.column + 1}" if columns else "")


class _WithExponents(_Strict):
    """The same, in which 1e-3 is a number too, which it is not in YAML 1.1."""


_WithExponents.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$", re.IGNORECASE),
    list("-+0123456789."),
)


def read_text(path: Path) -> str:
    """The text of the file at ``path``.

    Raises:
        ValueError: it is not UTF-8, naming the line; or too long.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"{str(path)!r} must have at most {_MOST_BYTES:,} bytes; it has more. Name a file that was written by hand.")
    try:
        return content.decode("utf-8")  # of which PyYAML skips a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{str(path)!r} must be text in UTF-8; line {line} has the byte {content[error.start]:#04x}, which is none. Save it as UTF-8."
        ) from error


def read_yaml(what: str, text: str, *, exponents: bool = True) -> Any:
    """The content of ``text``.

    Args:
        what: the name of the text in errors.
        text: YAML.
        exponents: whether 1e-3 is a number, as in recipes and on command lines; false for PyYAML's own, which leaves such text unquoted.

    Raises:
        ValueError: the text is not YAML, holds a date that does not exist, or what this module does not take.
    """
    if len(text) > LONGEST:
        raise ValueError(f"{what} must have at most {LONGEST:,} characters; got {len(text):,}.")
    try:
        return yaml.load(text, Loader=_WithExponents if exponents else _Strict)
    except _Wrong as error:
        raise ValueError(f"{what}: {error}") from error
    except (yaml.YAMLError, ValueError, ArithmeticError) as error:  # PyYAML's own errors, and those of its conversions
        raise ValueError(f"{what} must be valid YAML; got this from the parser: {error}") from error
