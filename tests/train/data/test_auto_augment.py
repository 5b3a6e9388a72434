"""AutoAugment and RandAugment on a batch: each operation is torchvision's on each image, and each image draws its own."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from gradreg.train.data.auto_augment import BatchAutoAugment

POLICIES = {
    "cifar10": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    "svhn": v2.AutoAugment(v2.AutoAugmentPolicy.SVHN),
    "imagenet": v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET),
    "rand": v2.RandAugment(3, 12),
}


def expected(image: torch.Tensor, name: str, m: float) -> torch.Tensor:
    """The operation by torchvision's public functions, as the AutoAugment and RandAugment papers name them."""

    def affine(image, translate=(0, 0), shear=(0.0, 0.0), center=None):
        return F.affine(image, 0.0, list(translate), 1.0, list(shear), interpolation=InterpolationMode.NEAREST, center=center)

    operations = {
        "Identity": lambda: image,
        "ShearX": lambda: affine(image, shear=(math.degrees(math.atan(m)), 0.0), center=[0, 0]),
        "ShearY": lambda: affine(image, shear=(0.0, math.degrees(math.atan(m))), center=[0, 0]),
        "TranslateX": lambda: affine(image, translate=(int(m), 0)),
        "TranslateY": lambda: affine(image, translate=(0, int(m))),
        "Rotate": lambda: F.rotate(image, m, interpolation=InterpolationMode.NEAREST),
        "Brightness": lambda: F.adjust_brightness(image, 1 + m),
        "Color": lambda: F.adjust_saturation(image, 1 + m),
        "Contrast": lambda: F.adjust_contrast(image, 1 + m),
        "Sharpness": lambda: F.adjust_sharpness(image, 1 + m),
        "Posterize": lambda: F.posterize(image, int(m)),
        "Solarize": lambda: F.solarize(image, 255 * m),
        "AutoContrast": lambda: F.autocontrast(image),
        "Equalize": lambda: F.equalize(image),
        "Invert": lambda: F.invert(image),
    }
    return operations[name]()


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28)])
@pytest.mark.parametrize("name", POLICIES)
def test_every_operation_is_torchvisions_on_each_image(name, shape):
    policy = BatchAutoAugment(POLICIES[name], height=shape[1], width=shape[2])
    generator = torch.Generator().manual_seed(0)
    # Two of each operation, in a random order, each with its own range of levels: autocontrast and equalize look at the whole image.
    drawn = torch.arange(len(policy.operations)).repeat(2)[torch.randperm(2 * len(policy.operations), generator=generator)]
    images = (torch.rand(len(drawn), *shape, generator=generator) * torch.linspace(20, 255, len(drawn))[:, None, None, None]).to(
        torch.uint8
    )
    found = policy.apply(images.clone(), drawn[None])
    for image, key, changed in zip(images, drawn.tolist(), found, strict=True):
        assert torch.equal(changed, expected(image, *policy.operations[key])), policy.operations[key]


def test_steps_follow_one_another():
    policy = BatchAutoAugment(POLICIES["rand"], height=8, width=8)
    images = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawn = policy.draw(20, torch.Generator().manual_seed(1))
    found = policy.apply(images.clone(), drawn)
    for image, keys, changed in zip(images, drawn.T.tolist(), found, strict=True):
        one_by_one = image
        for key in keys:
            one_by_one = expected(one_by_one, *policy.operations[key])
        assert torch.equal(changed, one_by_one)


@pytest.mark.parametrize("name", ["cifar10", "svhn", "imagenet"])
def test_autoaugment_draws_its_25_policies_evenly_with_their_probabilities(name):
    policy, n = BatchAutoAugment(POLICIES[name], height=32, width=32), 100_000
    drawn = policy.draw(n, torch.Generator().manual_seed(0))
    for step in range(2):
        counts: dict[tuple[str, float], float] = {}
        for pair in POLICIES[name]._policies:
            operation, probability, index = pair[step]
            magnitudes, signed = POLICIES[name]._AUGMENTATION_SPACE[operation]
            values = magnitudes(10, 32, 32)
            magnitude = 0.0 if values is None else float(values[index])
            for sign in ((1, -1) if signed else (1, 1)) if probability else ():
                counts[operation, sign * magnitude] = counts.get((operation, sign * magnitude), 0.0) + n / 25 * probability / 2
        assert {policy.operations[key] for key in drawn[step].unique().tolist()} - {("Identity", 0.0)} == counts.keys()
        for operation, count in counts.items():
            seen = (drawn[step] == policy.operations.index(operation)).sum().item()
            assert abs(seen - count) < 5 * math.sqrt(count)
    # The two operations come from the same policy: there are no other pairs of names.
    names = [[policy.operations[key][0] for key in step.tolist()] for step in drawn]
    allowed = {(a[0], b[0]) for a, b in POLICIES[name]._policies}
    assert {pair for pair in zip(*names, strict=True) if "Identity" not in pair} <= allowed


def test_randaugment_draws_each_operation_evenly_and_independently():
    policy, n = BatchAutoAugment(POLICIES["rand"], height=32, width=32), 60_000
    drawn = policy.draw(n, torch.Generator().manual_seed(0))
    kinds = torch.tensor([list(v2.RandAugment._AUGMENTATION_SPACE).index(name) for name, _ in policy.operations])[drawn]
    assert drawn.shape == (3, n)
    for step in kinds:
        assert ((step.bincount(minlength=14) - n / 14).abs() < 5 * math.sqrt(n / 14)).all()
    pairs = (kinds[0] * 14 + kinds[1]).bincount(minlength=196)
    assert ((pairs - n / 196).abs() < 5 * math.sqrt(n / 196)).all()
    signs = torch.tensor([magnitude for _, magnitude in policy.operations])[drawn[0][kinds[0] == 1]].sign()
    assert abs(signs.mean().item()) < 0.1
