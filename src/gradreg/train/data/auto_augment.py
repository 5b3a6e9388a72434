"""AutoAugment and RandAugment on a whole batch: each image draws its own operations; equal operations are applied together."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

Operation = tuple[str, float]
"""torchvision's name of an operation, and its magnitude."""

_IDENTITY: Operation = ("Identity", 0.0)


class BatchAutoAugment:
    """torchvision's AutoAugment or RandAugment with its own tables and operations, drawn for each image of a batch.

    torchvision's transforms draw once for their whole input, so this class does the drawing, and uses two of their parts: the
    tables, and the function that applies one operation, which accepts batches. Both are private to torchvision;
    ``tests/train/data/test_auto_augment.py`` compares them with its public functions.

    Args:
        transform: the policy.
        height: of the images, in pixels.
        width: of the images.
    """

    def __init__(self, transform: v2.AutoAugment | v2.RandAugment, *, height: int, width: int) -> None:
        self._transform = transform
        # Number every possible pair of an operation and a magnitude: an image then draws one integer, and images with equal
        # integers are transformed by one call.
        self.operations: list[Operation] = [_IDENTITY]
        # For each step: the probability of each choice, (choices,), and the numbers of its operation with either sign, (choices, 2).
        self._steps: list[tuple[Tensor, Tensor]] = []
        space, size = transform._AUGMENTATION_SPACE, (height, width)
        # The two operations of an AutoAugment policy are drawn together as one choice; those of RandAugment one by one.
        self._paired = isinstance(transform, v2.AutoAugment)
        if isinstance(transform, v2.AutoAugment):
            for step in range(2):
                choices = [policy[step] for policy in transform._policies]
                # A policy names one of 10 levels of magnitude, as in the paper.
                signs = [self._both_signs(name, space[name], 10, index, size) for name, _, index in choices]
                self._steps.append((torch.tensor([p for _, p, _ in choices]), torch.tensor(signs)))
        else:
            bins, index = transform.num_magnitude_bins, transform.magnitude
            signs = [self._both_signs(name, entry, bins, index, size) for name, entry in space.items()]
            # RandAugment always applies what it draws: probability 1.
            self._steps = [(torch.ones(len(signs)), torch.tensor(signs))] * transform.num_ops

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """(steps, n) int64: which of ``operations`` each of ``n`` images gets, one after the other."""
        choices = len(self._steps[0][0])
        pairs = torch.randint(choices, (n,), generator=generator) if self._paired else None
        drawn: list[Tensor] = []
        for probability, signs in self._steps:
            choice = torch.randint(choices, (n,), generator=generator) if pairs is None else pairs
            # Draw sign and probability for every image, even where they have no effect, so that one image's numbers do not depend
            # on another's choice.
            sign = torch.randint(2, (n,), generator=generator)
            applied = torch.rand(n, generator=generator) < probability[choice]
            drawn.append(torch.where(applied, signs[choice, sign], 0))  # 0 is the identity
        return torch.stack(drawn)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Apply the operations ``drawn`` (steps, n) to ``images`` (n, 1 or 3, height, width), uint8, in place."""
        for step in drawn:
            # One call per operation that occurs, at most a few dozen, instead of one per image. ``drawn`` is on the CPU, so this
            # loop does not synchronize with the device.
            for number in step.unique().tolist():
                name, magnitude = self.operations[number]
                if name == "Identity":
                    continue
                at = (step == number).nonzero().squeeze(1).to(images.device, non_blocking=True)
                changed = self._transform._apply_image_or_video_transform(
                    images.index_select(0, at), name, magnitude, interpolation=self._transform.interpolation, fill=self._transform._fill
                )
                images.index_copy_(0, at, changed)  # type: ignore[arg-type]
        return images

    def _both_signs(self, name: str, entry: tuple, bins: int, index: int | None, size: tuple[int, int]) -> tuple[int, int]:
        """The numbers of an operation with positive and with negative magnitude: the same number if the operation has no sign."""
        magnitudes, signed = entry
        values = magnitudes(bins, *size)
        magnitude = 0.0 if values is None else float(values[index])
        return self._number((name, magnitude)), self._number((name, -magnitude if signed else magnitude))

    def _number(self, operation: Operation) -> int:
        if operation not in self.operations:
            self.operations.append(operation)
        return self.operations.index(operation)
