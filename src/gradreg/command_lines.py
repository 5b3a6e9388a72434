"""Command lines that are wrong are answered in a sentence: what argparse ends the process for, and what parsers of YAML raise."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """``argparse``'s, which raises ``ValueError`` where that prints its usage and ends the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help explains every option)")


@contextmanager
def convertible(which: Callable[[], str] = lambda: "a value") -> Generator[None]:
    """A context that turns what PyYAML and the conversion to a type raise beside errors of their own into a readable ``ValueError``.

    Args:
        which: says which value it was, if that can be told; called only where one is wrong.
    """
    try:
        yield
    except (LookupError, AttributeError) as error:  # of values with tags
        told = f"{which()} must be valid YAML; got one that the parser cannot convert: {error}. Quote it, or leave its tag out."
        raise ValueError(told) from error
    except RecursionError as error:
        raise ValueError(
            f"{which()} must not be a part of itself, nor lists nested hundreds deep; got an alias within what it stands for, or as deep a "
            "nesting. Write it out."
        ) from error
    except OverflowError as error:
        raise ValueError(f"{which()} must be < 1.8e308, as every number; got one that is larger. Write a smaller one, or null.") from error
