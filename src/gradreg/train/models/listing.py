"""``gradreg models [PATTERN]``: the models that a recipe can name, their parameters, and their default image sizes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from gradreg import checks

DESCRIPTION = "List models by name: those that come with gradreg, or, with a pattern, all that match, timm's too."

PARAMETERS = {
    "cait_m24_patch4_32": 184_434_442,
    "cait_m36_patch4_32": 269_513_866,
    "cait_m48_patch4_32": 354_593_290,
    "cait_s12_patch4_32": 24_903_370,
    "cait_s24_patch4_32": 46_207_882,
    "cait_s36_patch4_32": 67_512_394,
    "cait_xs12_patch4_32": 14_032_378,
    "cait_xs24_patch4_32": 26_029_162,
    "cait_xxs12_patch4_32": 6_258_154,
    "cait_xxs24_patch4_32": 11_601_610,
    "cait_xxs36_patch4_32": 16_945_066,
    "cnn_bn": 94_762,
    "cnn_l2": 20_425_210,
    "mlp": 85_002,
    "mlp_fgr": 2_103_818,
    "mlp_l2": 10_020_874,
    "pyramidnet110_270": 28_485_477,
    "pyramidnet110_270_shakedrop": 28_485_477,
    "pyramidnet164_48": 1_715_442,
    "pyramidnet164_48_shakedrop": 1_715_442,
    "pyramidnet164_270": 27_216_021,
    "pyramidnet164_270_shakedrop": 27_216_021,
    "pyramidnet200_240": 26_752_702,
    "pyramidnet200_240_shakedrop": 26_752_702,
    "pyramidnet272_200": 26_210_842,
    "pyramidnet272_200_shakedrop": 26_210_842,
    "resnet18_cifar": 11_173_962,
    "resnet34_cifar": 21_282_122,
    "resnet50_cifar": 23_520_842,
    "resnet101_cifar": 42_512_970,
    "resnet152_cifar": 58_156_618,
    "resnet200_cifar": 62_637_642,
    "shakeshake26_2x96d": 26_192_922,
    "swin_base_patch2_window4_32": 86_701_186,
    "swin_base_patch4_window4_32": 86_693_762,
    "swin_small_patch2_window4_32": 48_805_732,
    "swin_small_patch4_window4_32": 48_800_164,
    "swin_tiny_patch2_window4_32": 27_505_108,
    "swin_tiny_patch4_window4_32": 27_505_300,
    "vgg16_bn_cifar": 33_646_666,
    "vgg16_cifar": 33_638_218,
    "vgg19_bn_cifar": 38_958_922,
    "vgg19_cifar": 38_947_914,
    "vit_base_patch4_32": 85_152_010,
    "vit_large_patch4_32": 302_439_434,
    "vit_small_patch4_32": 21_342_346,
    "vit_tiny_patch4_32": 5_362_762,
    "wrn16_4": 2_748_890,
    "wrn28_10": 36_479_194,
    "wrn40_10": 55_841_754,
}
"""Our models -> their parameters, as ``describe`` counts them, because building all takes longer than importing timm."""


@dataclass(frozen=True)
class Row:
    """One model as listed.

    Args:
        name: its ``model.name`` in a recipe.
        parameters: with the default number of outputs.
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
    from gradreg.command_lines import Parser

    parser = Parser(prog="gradreg models", description=DESCRIPTION)
    explanation = "part of a name, or a pattern with * and ? for the whole of it, as in 'vit_*_patch16_224' (quote it for the shell)"
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", help=explanation)
    pattern: str | None = parser.parse_args(argv).pattern

    import timm
    from rich import box
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from gradreg.train.models import OURS, known

    names = list(OURS) if pattern is None else matching(pattern)
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = max(console.width, 120)  # the longest names are whole in a file
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    for heading, side in (("model", "left"), ("parameters", "right"), ("images", "right")):
        # In a narrow terminal a name takes two lines: half of one is none.
        table.add_column(heading, justify=side, no_wrap=side == "right", overflow="fold")  # pyright: ignore[reportArgumentType]
    for name in track(names, description="counting", console=console, transient=True, disable=not console.is_terminal):
        row = Row(name, PARAMETERS[name], known(name)["input_size"]) if name in OURS else describe(name)
        table.add_row(*row.cells())
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
    """Build the model on the meta device, without initializing it, and count its parameters.

    Args:
        name: of a model that timm knows.
    """
    import timm
    import torch
    from torch.overrides import TorchFunctionMode

    class WithoutValues(TorchFunctionMode):
        """Skips in-place operations, of which initializations consist: they take more than half of the time on the meta device."""

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
