"""``gradreg recipes``: the shipped recipes, what each trains, and the command that runs it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gradreg.command_lines import Parser
from gradreg.train import recipe as recipes
from gradreg.train.configuration import Config
from gradreg.train.data.configuration import DataConfig

DESCRIPTION = "List the recipes that come with gradreg: what each trains, and the command that runs it."
MOST_VARIANTS = 6
"""How many variants are named at most."""


def main(argv: Sequence[str]) -> int:
    """Run ``gradreg recipes``; returns 0."""
    Parser(prog="gradreg recipes", description=DESCRIPTION).parse_args(argv)

    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    for name in recipes.shipped():
        recipe = recipes.load(name)
        console.print(Text(name, style="bold"))
        for line in (first_sentence(recipe.description), outline(recipe), command(recipe)):
            console.print(Padding(Text(line), (0, 0, 0, 2)))
    return 0


def first_sentence(text: str) -> str:
    """The text up to the first full stop that is followed by a capital: "et al. 2022" does not end a sentence.

    >>> first_sentence("SGD of Smith et al. 2020 on digits. Takes a minute.")
    'SGD of Smith et al. 2020 on digits.'
    """
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(text.split()), maxsplit=1)[0]


def outline(recipe: recipes.Recipe) -> str:
    """Model, data and length of the recipe's base, and its variants."""
    keys = {key: recipe.base[key] for key in ("model", "epochs", "batch_size") if key in recipe.base}
    config = Config(**keys, data=DataConfig(**recipe.base.get("data", {})))  # only the listed keys, without parsing the rest
    text = f"{config.model['name']} on {config.data.name}, {config.epochs} epochs of {config.steps_per_epoch():,} steps"
    if not recipe.variants:
        return text
    names = list(recipe.variants)
    more = f" and {len(names) - MOST_VARIANTS} more" if len(names) > MOST_VARIANTS else ""
    return f"{text}; variants {', '.join(names[:MOST_VARIANTS])}{more}"


def command(recipe: recipes.Recipe) -> str:
    """The command for the recipe: compare if it has several variants, else train."""
    needs_files = recipe.base.get("data", {}).get("name", "digits") != "digits"
    return f"gradreg {'compare' if len(recipe.variants) > 1 else 'train'} {recipe.name}" + (" --data.root DATA" if needs_files else "")
