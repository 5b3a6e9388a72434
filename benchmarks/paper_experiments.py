"""What is run here of the papers' experiments: comparisons by ``gradreg compare``, and measurements of their own.

A comparison names a shipped recipe and what is changed in it; on two cores every one is shortened, which ``shortened`` says. ``make
results-gpu`` has those of the published size.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import paper_measurements as measurements

DATA = "DATA"
"""Stands for the folder of the data sets in every command that is stored."""


@dataclass(frozen=True)
class Comparison:
    """A comparison by ``gradreg compare``.

    Args:
        name: of the stored result.
        recipe: shipped.
        penalties: what is compared, as on the command line.
        seeds: how many.
        options: keys of the recipe that are changed.
        shortened: how it differs from the paper, in words.
        rivals: what plain training is also given.
        data: whether it needs ``--data.root``.
        hours: about how long, on the machine that it is meant for.
        tiny: what is changed besides to try it on a CPU.
        place: the option that names the folder of the data sets.
    """

    name: str
    recipe: str
    penalties: tuple[str, ...]
    seeds: int
    options: Mapping[str, Any] = field(default_factory=dict)
    shortened: str = ""
    rivals: tuple[str, ...] = ("epochs",)
    data: bool = True
    hours: float = 0.0
    tiny: Mapping[str, Any] = field(default_factory=dict)
    place: str = "--data.root"

    def words(self, root: str, *, seeds: int | None = None) -> list[str]:
        """The arguments of ``gradreg``."""
        words = ["compare", self.recipe, "--penalties", *self.penalties, "--seeds", str(seeds or self.seeds), "--rivals", *self.rivals]
        for key, value in self.options.items():
            words += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
        return [*words, self.place, root] if self.data else words

    def command(self) -> str:
        """As a reader types it."""
        return shlex.join(["gradreg", *self.words(DATA)])


@dataclass(frozen=True)
class Measurement:
    """A measurement by a function.

    Args:
        name: of the stored result.
        function: from the folder of the data sets and what was found so far, what is found next, piece by piece; each is stored.
        data: whether it needs the data sets.
        shortened: how it differs from the paper, in words.
    """

    name: str
    function: Callable[[str, dict[str, Any]], Any]
    data: bool = False
    shortened: str = ""

    def command(self) -> str:
        """As a reader types it."""
        return f"python benchmarks/papers.py --only {self.name}" + (f" --root {DATA}" if self.data else "")


SMALL: Mapping[str, Any] = {"data.image_size": 16, "threads": 1}
MLP = (
    "none",
    "exact:gamma=0.05",
    *(f"fgr:gamma=0.05,epsilon={epsilon}" for epsilon in (0.02, 0.1, 0.5)),
    *(f"bgr:gamma=0.05,epsilon={epsilon}" for epsilon in (0.02, 0.1, 0.5)),
)
WARMED = "gnp:r=0.1,alpha=1.0"
VIT = (
    "none",
    WARMED,
    *(f"{WARMED},warmup={{kind: {kind}, epochs: 3}}" for kind in ("zero", "radius", "strength")),
)
LATE = ("none", "sam:rho=0.2", "sam:rho=0.2,tail=0.125", "sam:rho=0.2,tail=0.25", "sam:rho=0.2,every=8")

EXPERIMENTS: tuple[Comparison | Measurement, ...] = (
    Measurement("diagonal-network", measurements.diagonal_network, shortened="d = 60, n = 30, five random problems, gradient flow"),
    Measurement(
        "kernel-decay", measurements.kernel_decay, shortened="widths 512 and 4096, λ = 0.1, 8 points in 10 dimensions, flow time 7.5"
    ),
    Measurement("flooding", measurements.flooding, shortened="one tanh layer of 32, 32 points, float64"),
    Comparison(
        "m-sharpness",
        "digits-noisy-labels",
        ("none", "sam:rho=0.1", "sam:rho=0.1,m=20", "sam:rho=0.1,m=10"),
        5,
        shortened="MLP, 800 digits with 30 % wrong labels, batch 100",
        data=False,
    ),
    Comparison(
        "late-sam",
        "mnist-noisy-labels",
        LATE,
        5,
        {"data.label_noise": 0, "data.train_size": 2000},
        shortened="MLP, 2,000 images of MNIST, 30 epochs; the last eighth of the steps stands for 25 of 200 epochs",
    ),
    Comparison(
        "fgr-mlp",
        "fgr-mlp-cifar10",
        MLP,
        3,
        {
            **SMALL,
            "data.train_size": 6000,
            "data.validation": 1000,
            "batch_size": 128,
            "optimizer.lr": 0.05,
            "epochs": 60,
            "schedule.decay_epochs": "[18, 36, 48]",
        },
        shortened="16 pixels, 5,000 of 50,000 images, 60 of 200 epochs, batch 128 and lr 0.05 for 256 and 0.01; γ = 0.05, three ε",
    ),
    Measurement(
        "resnet-cost",
        measurements.resnet_cost,
        shortened="ResNet-18 for small images, batch 16 of 32 x 32 for 256, one thread, processor time, interleaved in one process",
    ),
    Comparison(
        "vit-warmups",
        "gr-warmup-vit-tiny",
        VIT,
        3,
        {
            **SMALL,
            "data.train_size": 1500,
            "data.test_size": 2000,
            "model.embed_dim": 64,
            "model.depth": 4,
            "model.num_heads": 2,
            "batch_size": 50,
            "epochs": 12,
            "schedule.warmup_epochs": 3,
        },
        shortened="a ViT of 200,000 weights (width 64, 4 blocks) at 16 pixels, 1,500 of 50,000 images, 12 of 300 epochs, 3 of warm-up",
    ),
    Comparison(
        "gnp-wrn",
        "wideresnet-cifar",
        ("none", "gnp", "sam"),
        3,
        {
            **SMALL,
            "data.train_size": 2000,
            "data.test_size": 2000,
            "model.name": "wrn16_4",
            "model.depth": 10,
            "model.width": 1,
            "batch_size": 64,
            "epochs": 10,
        },
        shortened="WRN-10-1 for WRN-28-10, 16 pixels, 2,000 of 50,000 images, 10 of 200 epochs, batch 64 for 256",
    ),
    Measurement(
        "l2-law-cifar",
        measurements.l2_law_cifar,
        data=True,
        shortened="a fully connected network (768-128-128-10, twice He's scale), 2,000 images at 16 pixels, 3,250 steps for every run",
    ),
    Comparison(
        "l2-cnn",
        "l2-cnn-cifar10",
        ("l2-0", "l2-1e-4", "l2-1e-3", "l2-3e-3", "l2-1e-2", "auto"),
        3,
        {
            **SMALL,
            "data.train_size": 4000,
            "data.validation": 1000,
            "data.test_size": 2000,
            "model.channels": "[16]",
            "model.hidden": 128,
            "batch_size": 50,
            "epochs": 30,
        },
        shortened="one stage of 16 channels, 16 pixels, 3,000 of 50,000 images, 30 of 200 epochs, batch 50",
    ),
)

_WRN, _VIT = ("none", "gnp:r=0.1,alpha=0.8"), ("none", "gnp:r=0.1,alpha=1.0,warmup={kind: zero, steps: 60}")
_TRAINED = "2,000 images of CIFAR-10 at 16 pixels, 10 epochs, batch 100"
FRAMEWORKS: tuple[Comparison, ...] = (
    *(
        Comparison(
            f"jax-{model}",
            "examples/jax_image_task.py",
            penalties,
            2,
            {"model": model, "image_size": 16, **({"warmup_epochs": 3} if model == "vit" else {})},
            f"{network}, {_TRAINED}",
            place="--root",
        )
        for model, penalties, network in (("wrn", _WRN, "WRN-10-1 in Flax NNX"), ("vit", _VIT, "a ViT of width 64 in Flax NNX"))
    ),
    *(
        Comparison(
            f"torch-{model}",
            recipe,
            penalties,
            2,
            {**SMALL, "data.train_size": 2000, "data.test_size": 2000, **options, "batch_size": 100, "epochs": 10},
            f"{network}, {_TRAINED}",
        )
        for model, recipe, penalties, network, options in (
            ("wrn", "wideresnet-cifar", _WRN, "WRN-10-1 in PyTorch", {"model.name": "wrn16_4", "model.depth": 10, "model.width": 1}),
            (
                "vit",
                "vit-cifar-warmup",
                _VIT,
                "a ViT of width 64 in PyTorch",
                {"model.embed_dim": 64, "model.depth": 4, "model.num_heads": 2, "schedule.warmup_epochs": 3},
            ),
        )
    ),
)
"""The same task in JAX and in PyTorch, at equal settings."""

FAST: Mapping[str, Any] = {"precision": "bf16", "channels_last": True, "compile": True}
LATE_LARGE = ("none", "sam:rho=0.05", "sam:rho=0.05,tail=0.125")
WRN_16_8 = {
    "model.name": "wrn16_4",
    "model.width": 8,
    "optimizer.l2_in_loss": 0,
    "optimizer.weight_decay": 5e-4,
    "optimizer.nesterov": False,
    "clip_norm": "null",
    "label_smoothing": 0.1,
    "augmentation.cutout": 16,
    "batch_size": 128,
    "schedule.name": "step",
    "schedule.decay_epochs": "[60, 120, 160]",
    "schedule.decay_rate": 0.2,
}
GPU: tuple[Comparison, ...] = (
    Comparison(
        "wrn-16-8",
        "wideresnet-cifar",
        ("none", "sam:rho=0.05", "asam:rho=2"),
        1,
        {**WRN_16_8, **FAST},
        "davda54/sam's README: WRN-16-8, SGD, SAM and ASAM, 200 epochs",
        hours=0.85,
    ),
    Comparison(
        "wrn-28-10-sam",
        "wideresnet-cifar",
        ("none", *(f"sam:rho={rho}" for rho in (0.1, 0.2, 0.3, 0.4)), "unified_sam:rho=0.1"),
        1,
        {"optimizer.l2_in_loss": 0, "optimizer.weight_decay": 5e-4, **FAST},
        "2503.02225, table 2: WRN-28-10, SGD, SAM over its radius, Unified SAM",
        hours=6,
    ),
    Comparison(
        "late-sam-wrn-16-8",
        "wideresnet-cifar",
        LATE_LARGE,
        1,
        {**WRN_16_8, **FAST},
        "2410.10373, fig. 1a: WRN-16-8, SAM in the last 25 of 200 epochs, all of it, and none",
        hours=0.75,
        tiny={"epochs": 4},  # so that the last eighth is a step
    ),
    *(
        Comparison(
            f"gr-warmup-vit-{size}",
            f"gr-warmup-vit-{size}",
            ("none", "gr", "gr-zero"),
            1,
            FAST,
            f"2406.09723: ViT-{size}/4, AdamW, the penalty from the start and after the warm-up, 300 epochs",
            hours=hours,
            tiny={"model.depth": 1, "epochs": 41},
        )
        for size, hours in (("tiny", 2.0), ("small", 4.0))
    ),
    Comparison(
        "fgr-mlp-cifar10",
        "fgr-mlp-cifar10",
        MLP,
        3,
        {"compile": True},
        "2210.02720, fig. 2: the MLP of width 512, 200 epochs, F-GR, B-GR and double backprop",
        hours=2.0,
    ),
    Comparison(
        "l2-wrn-cifar10",
        "l2-wrn-cifar10",
        ("l2-0", "published-constant", "published-auto"),
        1,
        FAST,
        "2006.08643: WRN-28-10 with mixup, AutoL2 against the constant of its authors and none, 200 epochs",
        hours=3.0,
    ),
)
"""The published sizes, the cheapest reference numbers of the field first."""

TINY: Mapping[str, Any] = {
    "data.train_size": 4,
    "data.test_size": 4,
    "batch_size": 2,
    "epochs": 1,
    "precision": "fp32",
    "channels_last": False,
    "compile": False,
    "threads": 1,
}
"""What makes such a comparison one of two steps."""
