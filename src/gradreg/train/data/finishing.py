"""The last steps of a training batch, on the device: floats, what is cut out of them, and the mixing of neighbours."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

from gradreg.train.data import draws, rectangles
from gradreg.train.data.colours import ColourScale
from gradreg.train.data.configuration import AugmentationConfig
from gradreg.train.data.requests import Request

_ERASED_SCALE, _ERASED_RATIO = (0.02, 0.33), (1 / 3.3, 1 / 0.3)
"""Area and width over height of what random erasing erases: torchvision's, whose ratio is height over width."""


class Finish:
    """Floats from bytes, then cutout, random erasing, and mixup or CutMix.

    mixup is ``λ x_i + (1 − λ) x_{i−1}`` with one λ a batch from Beta(α, α); CutMix takes a rectangle of relative area 1 − λ, cut off at the
    border, from image i − 1. The targets are weighted alike. Images come in random order, so that the one before is a random one.

    Args:
        scale: what makes floats of bytes.
        augmentation: what is asked for.
        classes: how many.
        seed: of the random numbers, which follow from it, the epoch and the batch alone.

    Source: DeVries and Taylor 2017, arXiv 1708.04552 (cutout); Zhong et al. 2017, arXiv 1708.04896, algorithm 1 (random erasing);
        Zhang et al. 2017, arXiv 1710.09412 (mixup); Yun et al. 2019, arXiv 1905.04899, equations 1 and 2 (CutMix).
    Differs from the paper: random erasing fills with 0, the mean colour of normalised images, and not with noise.
    """

    def __init__(self, scale: ColourScale, augmentation: AugmentationConfig, *, classes: int, seed: int) -> None:
        self._scale, self._cutout, self._erasing, self._seed = scale, augmentation.cutout, augmentation.random_erasing, seed
        mixes: list[v2.Transform] = []
        if augmentation.mixup is not None:
            mixes.append(v2.MixUp(alpha=augmentation.mixup, num_classes=classes))
        if augmentation.cutmix is not None:
            mixes.append(v2.CutMix(alpha=augmentation.cutmix, num_classes=classes))
        self._mix = v2.RandomChoice(mixes) if mixes else None

    @property
    def mixes(self) -> bool:
        """Whether an image needs the one before it in the batch."""
        return self._mix is not None

    def __call__(self, pixels: Tensor, labels: Tensor, request: Request) -> tuple[Tensor, Tensor]:
        """Images (m, channels, height, width), float32, and targets, (m,) int64 or (m, classes) float32, of the rows of ``request``."""
        images = self._scale(pixels)
        if self._cutout is not None or self._erasing is not None:
            self._cut(images, request)
        if self._mix is None:
            return images, labels
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draws.seed_of(self._seed, request.epoch, request.number, draws.Purpose.MIXING))
            return self._mix(images, labels)

    def _cut(self, images: Tensor, request: Request) -> None:
        n, (height, width) = len(request.positions), images.shape[2:]
        generator = draws.generator(self._seed, request.epoch, request.number, draws.Purpose.CUTTING)
        if self._cutout is not None:
            cut = rectangles.squares(n, height, width, side=self._cutout, generator=generator)
            images.masked_fill_(cut.take(request.rows, images.device).mask(height, width), 0.0)
        if self._erasing is not None:
            erased, fits = rectangles.draw(n, height, width, scale=_ERASED_SCALE, ratio=_ERASED_RATIO, generator=generator)
            chosen = (fits & (torch.rand(n, generator=generator) < self._erasing))[request.rows].to(images.device, non_blocking=True)
            mask = erased.take(request.rows, images.device).mask(height, width)
            images.masked_fill_(mask & chosen[:, None, None, None], 0.0)
