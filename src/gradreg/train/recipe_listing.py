"""``gradreg recipes``: the recipes that come with the package, what each is, and the command that runs it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from gradreg.train import recipe as recipes

DESCRIPTION = "List the recipes that come with gradreg: what each is, and the command that runs it."


def main(words: Sequence[str]) -> int:
    """Run ``gradreg recipes``; returns 0."""
    argparse.ArgumentParser(prog="gradreg recipes", description=DESCRIPTION).parse_args(words)

    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    for name in recipes.shipped():
        recipe = recipes.load(name)
        console.print(Text(name, style="bold"))
        console.print(Padding(Text(first_sentence(recipe.description)), (0, 0, 0, 2)))
        console.print(Padding(Text(command(recipe)), (0, 0, 0, 2)))
    return 0


def first_sentence(text: str) -> str:
    """What comes before the first full stop that a capital follows: "et al. 2022" ends no sentence.

    >>> first_sentence("SGD of Smith et al. 2020 on digits. Takes a minute.")
    'SGD of Smith et al. 2020 on digits.'
    """
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(text.split()), maxsplit=1)[0]


def command(recipe: recipes.Recipe) -> str:
    """How the recipe is meant to be run: compared if it has several variants, else trained."""
    return f"gradreg {'compare' if len(recipe.variants) > 1 else 'train'} {recipe.name}"
