"""Numbers of parameters against published ones. All are counted on the meta device, so that no weights are held."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
import torchvision.models as torchvision_models

from gradreg.train import models
from gradreg.train.models import listing
from gradreg.train.models.pyramidnet import PyramidNet
from gradreg.train.models.shake_shake import ShakeShake
from gradreg.train.models.wide_resnet import WideResNet


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


IMGCLSMOB = {  # O. Sémery, "Sandbox for training deep learning networks" (github.com/osmr/imgclsmob), table of CIFAR-10 models
    "pyramidnet110_270": 28_485_477,
    "pyramidnet164_270": 27_216_021,
    "pyramidnet200_240": 26_752_702,
    "pyramidnet272_200": 26_210_842,
    "wrn28_10": 36_479_194,
}

AUTHORS = {  # millions, as the authors print them, and how far ours may be from that
    "wrn28_10": (36.5, 0.002),  # Zagoruyko and Komodakis 2016, arXiv 1605.07146, table 4
    "shakeshake26_2x96d": (26.2, 0.002),  # Gastaldi 2017, arXiv 1705.07485
    "pyramidnet164_48": (1.7, 0.02),  # github.com/jhkim89/PyramidNet, README, as the rest: 0.5 to 0.8 % below what the layers of its own
    "pyramidnet110_270": (28.3, 0.01),  # addpyramidnet.lua have, which are these, and which others count as above
    "pyramidnet164_270": (27.0, 0.01),
    "pyramidnet200_240": (26.6, 0.01),
    "pyramidnet272_200": (26.0, 0.01),
}

TORCHVISION = {  # ours, torchvision's for ImageNet: the stem shrinks from 7 x 7 to 3 x 3, the head from 1,000 classes to 10
    "resnet18_cifar": (torchvision_models.ResNet18_Weights.IMAGENET1K_V1, 512),
    "resnet34_cifar": (torchvision_models.ResNet34_Weights.IMAGENET1K_V1, 512),
    "resnet50_cifar": (torchvision_models.ResNet50_Weights.IMAGENET1K_V1, 2048),
    "resnet101_cifar": (torchvision_models.ResNet101_Weights.IMAGENET1K_V1, 2048),
    "resnet152_cifar": (torchvision_models.ResNet152_Weights.IMAGENET1K_V1, 2048),
}

VGG = {  # the first linear layer shrinks from 7 x 7 pixels to 1
    "vgg16_cifar": torchvision_models.VGG16_Weights.IMAGENET1K_V1,
    "vgg16_bn_cifar": torchvision_models.VGG16_BN_Weights.IMAGENET1K_V1,
    "vgg19_cifar": torchvision_models.VGG19_Weights.IMAGENET1K_V1,
    "vgg19_bn_cifar": torchvision_models.VGG19_BN_Weights.IMAGENET1K_V1,
}

TRANSFORMERS = {  # millions on ImageNet at 224 pixels, as their papers print them: ours: (timm's name, published)
    "vit_tiny_patch4_32": ("vit_tiny_patch16_224", 5.7),  # Touvron et al. 2021, arXiv 2012.12877, table 1 (without distillation: "5M")
    "vit_small_patch4_32": ("vit_small_patch16_224", 22.1),  # the same, "22M"
    "vit_base_patch4_32": ("vit_base_patch16_224", 86.6),  # Dosovitskiy et al. 2021, arXiv 2010.11929, table 1: "86M"
    "vit_large_patch4_32": ("vit_large_patch16_224", 304.3),  # the same; with the pre-logits layer it prints "307M"
    "swin_tiny_patch4_window4_32": ("swin_tiny_patch4_window7_224", 28.3),  # torchvision: 28,288,354
    "cait_xxs24_patch4_32": ("cait_xxs24_224", 12.0),  # Touvron et al. 2021, arXiv 2103.17239, table 3, and the next
    "cait_s24_patch4_32": ("cait_s24_224", 46.9),
}


@pytest.mark.parametrize("name", IMGCLSMOB)
def test_exact_published_counts(name):
    assert listing.describe(name).parameters == IMGCLSMOB[name]


@pytest.mark.parametrize("name", AUTHORS)
def test_counts_that_the_authors_print(name):
    published, tolerance = AUTHORS[name]
    assert listing.describe(name).parameters / 1e6 == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize(
    ("build", "published"),  # further rows of the table of imgclsmob: depths, widths and blocks that have no name here
    [
        (lambda: WideResNet(depth=16, width=10), 17_116_634),
        (lambda: WideResNet(depth=40, width=8), 35_748_314),
        (lambda: PyramidNet(depth=110, alpha=48), 1_772_706),
        (lambda: PyramidNet(depth=110, alpha=84), 3_904_446),
        (lambda: PyramidNet(depth=236, alpha=220, bottleneck=True), 26_969_046),
        (lambda: ShakeShake(depth=20, channels=16), 541_082),
        (lambda: ShakeShake(depth=26, channels=32), 2_923_162),
    ],
)
def test_exact_published_counts_of_other_sizes(build, published):
    with torch.device("meta"):
        assert count(build()) == published


def test_wide_resnets_that_no_table_has_follow_from_their_blocks():
    def by_hand(depth: int, width: int) -> int:
        conv = lambda a, b, k: a * b * k * k  # noqa: E731
        total, channels = conv(3, 16, 3), 16
        for group in (16 * width, 32 * width, 64 * width):
            for block in range((depth - 4) // 6):
                total += 2 * channels + conv(channels, group, 3) + 2 * group + conv(group, group, 3)
                total += 0 if block else conv(channels, group, 1)
                channels = group
        return total + 2 * channels + 10 * channels + 10

    assert by_hand(28, 10) == 36_479_194
    assert listing.describe("wrn16_4").parameters == by_hand(16, 4) == 2_748_890
    assert listing.describe("wrn40_10").parameters == by_hand(40, 10) == 55_841_754


@pytest.mark.parametrize("size", ["110_270", "164_48", "164_270", "200_240", "272_200"])
def test_shakedrop_adds_no_parameters(size):
    assert listing.describe(f"pyramidnet{size}").parameters == listing.describe(f"pyramidnet{size}_shakedrop").parameters


@pytest.mark.parametrize("name", TORCHVISION)
def test_resnets_have_what_torchvision_publishes_but_for_stem_and_head(name):
    weights, features = TORCHVISION[name]
    stem, head = 3 * 64 * (7 * 7 - 3 * 3), (features + 1) * (1000 - 10)
    assert listing.describe(name).parameters == weights.meta["num_params"] - stem - head


def test_resnet200_has_what_timm_has_but_for_stem_and_head():
    imagenet = listing.describe("resnet200").parameters
    assert round(imagenet / 1e6, 1) == 64.7  # He et al. 2016, arXiv 1603.05027: 3, 24, 36 and 3 bottlenecks
    assert listing.describe("resnet200_cifar").parameters == imagenet - 3 * 64 * 40 - 2049 * 990


@pytest.mark.parametrize("name", VGG)
def test_vggs_have_what_torchvision_publishes_but_for_their_linear_layers(name):
    linear, head = 512 * 4096 * (7 * 7 - 1), 4097 * (1000 - 10)
    assert listing.describe(name).parameters == VGG[name].meta["num_params"] - linear - head


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_have_what_their_papers_print_but_for_patches_positions_and_head(name):
    of_timm, published = TRANSFORMERS[name]
    assert round(listing.describe(of_timm).parameters / 1e6, 1) == published
    with torch.device("meta"):
        small, large = timm.create_model(name), timm.create_model(of_timm)
    same = {k: p.shape for k, p in large.named_parameters() if not k.startswith(("patch_embed.", "pos_embed", "head."))}
    shapes = {k: p.shape for k, p in small.named_parameters()}
    assert all(shapes[k] == shape for k, shape in same.items() if "relative_position" not in k)
    assert shapes.keys() == {k for k, _ in large.named_parameters()}


def test_fully_connected_networks_and_the_cnns_are_what_their_docstrings_say():
    sizes = [3072, 512, 512, 512, 10]
    assert listing.describe("mlp_fgr").parameters == sum((a + 1) * b for a, b in pairwise(sizes))
    sizes = [784, 2048, 2048, 2048, 10]
    assert listing.describe("mlp_l2").parameters == sum((a + 1) * b for a, b in pairwise(sizes))
    convolutions = [(3, 300), (300, 300), (300, 500), (500, 500)]
    linear = (8 * 8 * 500 + 1) * 500 + 501 * 10
    assert listing.describe("cnn_l2").parameters == sum((9 * a + 1) * b for a, b in convolutions) + linear
    normalized = [(3, 32), (32, 64), (64, 128)]
    assert listing.describe("cnn_bn").parameters == sum((9 * a + 2) * b for a, b in normalized) + 129 * 10


def test_counting_without_values_counts_the_same():
    with torch.device("meta"):
        assert listing.describe("vit_tiny_patch4_32").parameters == count(timm.create_model("vit_tiny_patch4_32"))
    assert set(IMGCLSMOB) | set(AUTHORS) | set(TORCHVISION) | set(VGG) | set(TRANSFORMERS) <= set(models.OURS)


def test_the_counts_in_the_documentation_are_these():
    text = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
    stated = {name: int(number.replace(",", "")) for name, number in re.findall(r"^\| `(\w+)` \|.*?\| ([\d,]+) \|", text, re.MULTILINE)}
    assert set(stated) == {name for name in models.OURS if not name.endswith(("_32", "_cifar", "_shakedrop"))}
    assert stated == {name: listing.describe(name).parameters for name in stated}
