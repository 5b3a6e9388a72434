"""AutoAugment and RandAugment on a whole batch: each image its own operations, images with the same operation together."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

Operation = tuple[str, float]
"""torchvision's name of an operation, and its magnitude."""

_NOTHING: Operation = ("Identity", 0.0)


class BatchPolicy:
    """torchvision's AutoAugment or RandAugment with its own tables and operations, drawn for each image of a batch.

    The transforms themselves draw once for all that they are given; their tables and the function that applies one operation, which takes
    batches, are used here. Both are private to torchvision, and ``tests/train/data/test_policies.py`` holds them to its public functions.

    Args:
        transform: the policy.
        height: of the images, in pixels.
        width: of the images.
    """

    def __init__(self, transform: v2.AutoAugment | v2.RandAugment, *, height: int, width: int) -> None:
        self._transform = transform
        self.operations: list[Operation] = [_NOTHING]
        # For each step and each choice: its probability, its operation and the counterpart of the opposite sign.
        self._steps: list[tuple[Tensor, Tensor]] = []
        space, size = transform._AUGMENTATION_SPACE, (height, width)
        if isinstance(transform, v2.AutoAugment):
            for step in range(2):
                choices = [policy[step] for policy in transform._policies]
                signs = [self._both_signs(name, space[name], 10, index, size) for name, _, index in choices]
                self._steps.append((torch.tensor([p for _, p, _ in choices]), torch.tensor(signs)))
        else:
            bins, index = transform.num_magnitude_bins, transform.magnitude
            signs = [self._both_signs(name, entry, bins, index, size) for name, entry in space.items()]
            self._steps = [(torch.ones(len(signs)), torch.tensor(signs))] * transform.num_ops

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """(steps, n) int64: the ``operations`` that ``n`` images get one after the other."""
        choices = len(self._steps[0][0])
        # The two operations of an AutoAugment policy belong together; those of RandAugment are drawn one by one.
        together = torch.randint(choices, (n,), generator=generator) if isinstance(self._transform, v2.AutoAugment) else None
        drawn: list[Tensor] = []
        for chances, signs in self._steps:
            picked = torch.randint(choices, (n,), generator=generator) if together is None else together
            sign = torch.randint(2, (n,), generator=generator)
            applied = torch.rand(n, generator=generator) < chances[picked]
            drawn.append(torch.where(applied, signs[picked, sign], 0))
        return torch.stack(drawn)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """``images`` (n, 1 or 3, height, width), uint8, with the operations ``drawn`` (steps, n) done to them; the tensor is written to."""
        for step in drawn:
            for key in step.unique().tolist():
                name, magnitude = self.operations[key]
                if name == "Identity":
                    continue
                at = (step == key).nonzero().squeeze(1).to(images.device, non_blocking=True)
                changed = self._transform._apply_image_or_video_transform(
                    images.index_select(0, at), name, magnitude, interpolation=self._transform.interpolation, fill=self._transform._fill
                )
                images.index_copy_(0, at, changed)  # type: ignore[arg-type]
        return images

    def _both_signs(self, name: str, entry: tuple, bins: int, index: int | None, size: tuple[int, int]) -> tuple[int, int]:
        """The places in ``operations`` of an operation and of its counterpart of the opposite sign, which may be the same."""
        magnitudes, signed = entry
        values = magnitudes(bins, *size)
        magnitude = 0.0 if values is None else float(values[index])
        return self._place((name, magnitude)), self._place((name, -magnitude if signed else magnitude))

    def _place(self, operation: Operation) -> int:
        if operation not in self.operations:
            self.operations.append(operation)
        return self.operations.index(operation)
