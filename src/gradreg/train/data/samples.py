"""What is done to one image: resizing and cutting it to the size wanted, and in training its geometry and colours; by torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchvision.transforms import v2

from gradreg.train.data.catalogue import known_set
from gradreg.train.data.configuration import AugmentationConfig, DataConfig


def as_it_is(size: int | None, *, kept: float = 1.0) -> v2.Compose:
    """A PIL image, or uint8 (..., channels, height, width), to uint8 with the shorter side resized and the middle cut out.

    Args:
        size: height and width of what comes out, in pixels; None leaves the image as it is.
        kept: share of the resized shorter side that ``size`` is, > 0 and ≤ 1.
    """
    return v2.Compose([*_resize(size, kept), _to_bytes])


def evaluation_crop(config: DataConfig) -> float:
    """Share of the resized shorter side that is kept of an image to evaluate on."""
    known = known_set(config.name)
    usual = 1.0 if known is None else known.evaluation_crop
    return usual if config.evaluation_crop is None else config.evaluation_crop


def augmented(size: int | None, augmentation: AugmentationConfig, *, height: int, width: int) -> v2.Compose:
    """A PIL image to uint8 (channels, height, width), augmented by numbers from PyTorch's default generator."""
    steps: list[Any] = []
    if augmentation.random_resized_crop:
        scale, ratio = (augmentation.scale[0], augmentation.scale[1]), (augmentation.ratio[0], augmentation.ratio[1])
        steps.append(v2.RandomResizedCrop((height, width), scale=scale, ratio=ratio, antialias=True))
    else:
        steps += _resize(size, 1.0)
    if augmentation.crop_padding is not None:
        mode = "constant" if augmentation.padding == "zero" else "reflect"
        steps.append(v2.RandomCrop((height, width), padding=augmentation.crop_padding, padding_mode=mode))
    if augmentation.flip:
        steps.append(v2.RandomHorizontalFlip())
    policy = colour_policy(augmentation)
    return v2.Compose([*steps, *([] if policy is None else [policy]), _to_bytes])


def colour_policy(augmentation: AugmentationConfig) -> v2.AutoAugment | v2.RandAugment | None:
    """torchvision's AutoAugment or RandAugment, as asked for.

    Source: Cubuk et al. 2019, arXiv 1805.09501; Cubuk et al. 2020, arXiv 1909.13719.
    Differs from the paper: what a rotation or shear uncovers is black, as torchvision has it, not grey.
    """
    if augmentation.auto_augment is not None:
        return v2.AutoAugment(v2.AutoAugmentPolicy(augmentation.auto_augment))
    if augmentation.rand_augment is not None:
        return v2.RandAugment(augmentation.rand_augment, augmentation.rand_magnitude)
    return None


def sizes_differ(which: str, image: Tensor, expected: Sequence[int]) -> str:
    """That an image is not of the ``expected`` shape (channels, height, width), and what to do."""
    (_, h, w), (_, height, width) = image.shape, expected
    return (
        f"data.image_size must be given for images that differ in size; got null, and {which} has {h} x {w} pixels where others have "
        f"{height} x {width}. Write 224, say."
    )


def _resize(size: int | None, kept: float) -> list[Any]:
    return [] if size is None else [v2.Resize(round(size / kept), antialias=True), v2.CenterCrop(size)]


def _to_bytes(image: Any) -> Tensor:
    """``image`` as uint8 (channels, height, width), if it is not a tensor already."""
    return image if isinstance(image, Tensor) else v2.functional.pil_to_tensor(image)
