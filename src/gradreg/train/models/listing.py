"""``gradreg models [PATTERN]``: the models that a recipe can name, their parameters and the images they are made for."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from gradreg import checks

DESCRIPTION = "List models by name: those that come with gradreg, or, with a pattern, all that match, timm's too."


@dataclass(frozen=True)
class Row:
    """One model as listed.

    Args:
        name: what a recipe writes as ``model.name``.
        parameters: with as many outputs as the model has by default.
        images: (channels, height, width) by default; None where timm does not say.
    """

    name: str
    parameters: int
    images: tuple[int, ...] | None

    def cells(self) -> tuple[str, str, str]:
        """The row as the table shows it."""
        return self.name, f"{self.parameters:,}", "" if self.images is None else " x ".join(map(str, self.images))


def main(argv: Sequence[str]) -> int:
    """Run ``gradreg models``; returns 0."""
    parser = argparse.ArgumentParser(prog="gradreg models", description=DESCRIPTION)
    explanation = "part of a name, or a pattern with * and ? for the whole of it, as in 'vit_*_patch16_224' (quote it for the shell)"
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", help=explanation)
    pattern: str | None = parser.parse_args(argv).pattern

    import timm
    from rich import box
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from gradreg.train.models import OURS

    names = list(OURS) if pattern is None else matching(pattern)
    console = Console()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    for heading, side in (("model", "left"), ("parameters", "right"), ("images", "right")):
        table.add_column(heading, justify=side, no_wrap=True)  # pyright: ignore[reportArgumentType]
    for name in track(names, description="counting", console=console, transient=True, disable=not console.is_terminal):
        table.add_row(*describe(name).cells())
    console.print(table, highlight=False)
    if pattern is None:
        others = len(set(timm.list_models()) - set(OURS))
        console.print(f"timm has {others} more: gradreg models 'vit*', say, lists those that match.", highlight=False, markup=False)
    return 0


def matching(pattern: str) -> list[str]:
    """The names that match, ours first.

    Args:
        pattern: a part of the names, or a pattern for the whole of them if it has one of ``*?[``.

    Raises:
        ValueError: no name matches; the nearest one is named.
    """
    import timm

    from gradreg.train.models import OURS

    known = [*OURS, *(name for name in timm.list_models() if name not in OURS)]
    whole = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    names = [name for name in known if fnmatchcase(name, whole.lower())]
    if not names:
        raise ValueError(checks.unknown("model or pattern", pattern, known))
    return names


def describe(name: str) -> Row:
    """Build the model without memory for its weights and without their values, and count.

    Args:
        name: of a model that timm knows.
    """
    import timm
    import torch
    from torch.overrides import TorchFunctionMode

    class WithoutValues(TorchFunctionMode):
        """Leaves out operations in place, which is what initializations are made of: more than half of the time on the meta device."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            target = args[0] if args else kwargs.get("tensor")  # torch.nn.init passes it by name
            name = getattr(func, "__name__", "")
            in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
            return target if in_place and isinstance(target, torch.Tensor) and target.is_meta else func(*args, **kwargs)

    from gradreg.train.models import registration

    registration.register_with_timm()
    known = timm.get_pretrained_cfg(name)
    with warnings.catch_warnings(), torch.device("meta"), WithoutValues():
        warnings.simplefilter("ignore")  # on its own options, which are the model's author's choice
        model = timm.create_model(name)
    return Row(name, sum(p.numel() for p in model.parameters()), None if known is None else tuple(known.input_size))
