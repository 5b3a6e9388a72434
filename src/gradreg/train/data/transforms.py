"""Transforms of images: of one image when it is decoded, by torchvision, or of a whole batch on its device.

torchvision is imported where a transform needs it: its import takes as long as PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradreg.train.data import crops
from gradreg.train.data.catalogue import Normalization, known_set
from gradreg.train.data.configuration import AugmentationConfig, DataConfig
from gradreg.train.data.sampler import BatchIndices, Purpose

if TYPE_CHECKING:
    from torchvision.transforms import v2

_ERASED_SCALE, _ERASED_RATIO = (0.02, 0.33), (1 / 3.3, 1 / 0.3)
"""Area and width over height of the box that random erasing erases: torchvision's, whose ratio is height over width."""


# One image


def evaluation_transform(size: int | None, *, crop: float = 1.0) -> Callable[..., Tensor]:
    """A PIL image, or uint8 (..., channels, height, width), to uint8 with the shorter side resized, and center-cropped.

    Args:
        size: height and width of the result, in pixels; None leaves the image as it is.
        crop: share of the resized shorter side that ``size`` is, > 0 and ≤ 1.
    """
    if size is None:
        return _to_uint8
    from torchvision.transforms import v2

    return v2.Compose([*_resize(size, crop), _to_uint8])


def evaluation_crop(config: DataConfig) -> float:
    """Share of the resized shorter side that the center-crop keeps in evaluation."""
    known = known_set(config.name)
    usual = 1.0 if known is None else known.evaluation_crop
    return usual if config.evaluation_crop is None else config.evaluation_crop


def training_transform(size: int | None, augmentation: AugmentationConfig, *, height: int, width: int) -> Callable[..., Tensor]:
    """A PIL image to uint8 (channels, height, width), augmented by numbers from PyTorch's default generator."""
    from torchvision.transforms import v2

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
    policy = auto_augment_policy(augmentation)
    return v2.Compose([*steps, *([] if policy is None else [policy]), _to_uint8])


def auto_augment_policy(augmentation: AugmentationConfig) -> v2.AutoAugment | v2.RandAugment | None:
    """torchvision's AutoAugment or RandAugment, or None if neither is asked for.

    Source: Cubuk et al. 2019, arXiv 1805.09501; Cubuk et al. 2020, arXiv 1909.13719.
    Differs from the paper: what a rotation or shear uncovers is black, as in torchvision, not gray.
    """
    if augmentation.auto_augment is not None:
        from torchvision.transforms import v2

        return v2.AutoAugment(v2.AutoAugmentPolicy(augmentation.auto_augment))
    if augmentation.rand_augment is not None:
        from torchvision.transforms import v2

        return v2.RandAugment(augmentation.rand_augment, augmentation.rand_magnitude)
    return None


def _resize(size: int | None, crop: float) -> list[Any]:
    from torchvision.transforms import v2

    return [] if size is None else [v2.Resize(round(size / crop), antialias=True), v2.CenterCrop(size)]


def _to_uint8(image: Any) -> Tensor:
    """``image`` as uint8 (channels, height, width), if it is not a tensor already."""
    if isinstance(image, Tensor):
        return image
    from torchvision.transforms.v2 import functional

    return functional.pil_to_tensor(image)


# A batch


class BatchAugmentation:
    """Crops, flips and AutoAugment of a batch of bytes, each image by its own random numbers.

    Args:
        augmentation: what is asked for.
        height: of the images, in pixels.
        width: of the images.
        seed: of the run. The random numbers follow from it, the epoch and the number of the batch.
    """

    def __init__(self, augmentation: AugmentationConfig, *, height: int, width: int, seed: int) -> None:
        self._augmentation, self._seed, self._size = augmentation, seed, (height, width)
        self._policy = None
        policy = auto_augment_policy(augmentation)
        if policy is not None:
            from gradreg.train.data.auto_augment import BatchAutoAugment

            self._policy = BatchAutoAugment(policy, height=height, width=width)
        chosen = augmentation
        self._changes = chosen.random_resized_crop or chosen.crop_padding is not None or chosen.flip or policy is not None

    def __call__(self, images: Tensor, indices: BatchIndices) -> Tensor:
        """``images`` (m, channels, height, width), uint8, of the rows of ``indices``, augmented."""
        if not self._changes:
            return images
        # Draw for the whole batch on the CPU and take this process's rows, so that the numbers are the same for any number of processes
        # and on any device.
        chosen, n, rows, device = self._augmentation, len(indices.positions), indices.rows, images.device
        generator = indices.generator(self._seed, Purpose.BATCH)
        if chosen.random_resized_crop:
            boxes, _ = crops.random_boxes(n, *self._size, scale=chosen.scale, ratio=chosen.ratio, generator=generator)
            images = crops.resized_crop(images, boxes.take(rows, device))
        if chosen.crop_padding is not None:
            corners = torch.randint(2 * chosen.crop_padding + 1, (2, n), generator=generator)[:, rows]
            tops, lefts = corners.to(device, non_blocking=True)
            images = crops.padded_crop(images, tops, lefts, size=chosen.crop_padding, padding=chosen.padding)
        if chosen.flip:
            flipped = torch.rand(n, generator=generator)[rows] < 0.5
            images = crops.flip(images, flipped.to(device, non_blocking=True))
        if self._policy is not None:
            images = self._policy.apply(images, self._policy.draw(n, generator)[:, rows])
        return images


class Normalize:
    """Converts bytes to floats: ``(bytes / max_value − mean) / std``, channel by channel.

    Args:
        max_value: the byte that becomes 1.
        normalization: mean and standard deviation of each channel; None leaves the images between 0 and 1.
    """

    def __init__(self, max_value: int, normalization: Normalization | None) -> None:
        self._max_value = max_value
        self._statistics = None if normalization is None else torch.tensor([normalization.mean, normalization.std])[:, :, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        """``images`` (n, channels, height, width), uint8, as float32."""
        floats = images.to(torch.float32).div_(self._max_value)
        if self._statistics is None:
            return floats
        if self._statistics.device != images.device:
            self._statistics = self._statistics.to(images.device)
        mean, std = self._statistics
        return floats.sub_(mean).div_(std)


class BatchTransform:
    """The last steps of a training batch: normalization, cutout, random erasing, and mixup or CutMix.

    mixup is ``λ x_i + (1 − λ) x_{i−1}`` with one λ for a batch from Beta(α, α). CutMix takes a box of relative area 1 − λ, cut off
    at the border, from image i − 1. The targets get the same weights. A batch is in random order, so the image before is a random one.

    Args:
        normalize: makes floats of bytes.
        augmentation: what is asked for.
        classes: how many.
        seed: of the run. The random numbers follow from it, the epoch and the number of the batch.

    Source: DeVries and Taylor 2017, arXiv 1708.04552 (cutout); Zhong et al. 2017, arXiv 1708.04896, algorithm 1 (random erasing);
        Zhang et al. 2017, arXiv 1710.09412 (mixup); Yun et al. 2019, arXiv 1905.04899, equations 1 and 2 (CutMix).
    Differs from the paper: random erasing fills with 0, the mean color of normalized images, and not with noise.
    """

    def __init__(self, normalize: Normalize, augmentation: AugmentationConfig, *, classes: int, seed: int) -> None:
        self._normalize, self._cutout, self._erasing, self._seed = normalize, augmentation.cutout, augmentation.random_erasing, seed
        self._mix = _mixing(augmentation, classes)

    @property
    def mixes(self) -> bool:
        """Whether an image needs the one before it in the batch."""
        return self._mix is not None

    def __call__(self, pixels: Tensor, labels: Tensor, indices: BatchIndices) -> tuple[Tensor, Tensor]:
        """Images (m, channels, height, width), float32, and targets, (m,) int64 or (m, classes) float32, of the rows of ``indices``."""
        images = self._normalize(pixels)
        if self._cutout is not None or self._erasing is not None:
            self._erase(images, indices)
        if self._mix is None:
            return images, labels
        # torchvision's transforms draw from the default generator, which the run uses too: seed it for them, then restore it.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(indices.seed(self._seed, Purpose.MIXING))
            return self._mix(images, labels)

    def _erase(self, images: Tensor, indices: BatchIndices) -> None:
        n, rows, (height, width) = len(indices.positions), indices.rows, images.shape[2:]
        generator = indices.generator(self._seed, Purpose.ERASING)
        if self._cutout is not None:
            squares = crops.random_squares(n, height, width, side=self._cutout, generator=generator)
            images.masked_fill_(squares.take(rows, images.device).mask(height, width), 0.0)
        if self._erasing is not None:
            boxes, fits = crops.random_boxes(n, height, width, scale=_ERASED_SCALE, ratio=_ERASED_RATIO, generator=generator)
            # A box that did not fit is as large as the image: it would erase all of it, so skip it.
            erased = (fits & (torch.rand(n, generator=generator) < self._erasing))[rows].to(images.device, non_blocking=True)
            mask = boxes.take(rows, images.device).mask(height, width)
            images.masked_fill_(mask & erased[:, None, None, None], 0.0)


def _mixing(augmentation: AugmentationConfig, classes: int) -> v2.Transform | None:
    """mixup, CutMix, or one of the two at random for each batch; None if neither is asked for."""
    if not augmentation.mixes:
        return None
    from torchvision.transforms import v2

    mixes: list[v2.Transform] = []
    if augmentation.mixup is not None:
        mixes.append(v2.MixUp(alpha=augmentation.mixup, num_classes=classes))
    if augmentation.cutmix is not None:
        mixes.append(v2.CutMix(alpha=augmentation.cutmix, num_classes=classes))
    return v2.RandomChoice(mixes)
