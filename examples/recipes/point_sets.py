"""What point_sets.yaml names: a data set whose samples are dictionaries, how they are batched, a model, a loss and a metric.

    gradreg compare examples/recipes/point_sets.yaml --seeds 5

Each of scikit-learn's digits becomes the set of its dark pixels: from 13 to 45 points, which a network sees in no order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset

SIZES = {"train": 600, "validation": 300, "test": 897}


class PointSets(Dataset[dict[str, Any]]):
    """Digits as sets of points (height, width, darkness).

    Args:
        split: "train", "validation" or "test".
        seed: of the split; gradreg gives it.
        darkest: pixels from this darkness on are points, 1 to 16.
        noise: share of the training labels replaced at random. Validation and test labels are right.
    """

    def __init__(self, split: str, *, seed: int, darkest: int = 4, noise: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(seed)  # the same for every split, so that the splits do not overlap
        images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
        order = torch.randperm(len(labels), generator=generator)
        first = {"train": 0, "validation": SIZES["train"], "test": SIZES["train"] + SIZES["validation"]}[split]
        chosen = order[first : first + SIZES[split]]
        self._images, self._labels, self._darkest = images[chosen].reshape(-1, 8, 8), labels[chosen].clone(), darkest
        if split == "train":
            noisy = torch.rand(len(chosen), generator=generator) < noise
            self._labels[noisy] = torch.randint(10, (int(noisy.sum()),), generator=generator)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self._images[index]
        places = (image >= self._darkest).nonzero()
        darkness = image[places[:, 0], places[:, 1]]
        points = torch.cat([places / 4.0 - 1.0, darkness[:, None] / 8.0 - 1.0], dim=1)
        return {"points": points.float(), "label": int(self._labels[index])}


def collate(samples: Sequence[dict[str, Any]]) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of sets of different sizes: padded points, which of them count, and the labels."""
    points = nn.utils.rnn.pad_sequence([sample["points"] for sample in samples], batch_first=True)
    sizes = torch.tensor([len(sample["points"]) for sample in samples])
    mask = torch.arange(points.shape[1]) < sizes[:, None]
    return {"points": points, "mask": mask}, torch.tensor([sample["label"] for sample in samples])


class SetNetwork(nn.Module):
    """A network for each point, their mean and maximum, and a network for these."""

    def __init__(self, *, width: int = 128) -> None:
        super().__init__()
        self.points = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.whole = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        each, mask = self.points(batch["points"]), batch["mask"][:, :, None]
        mean = (each * mask).sum(dim=1) / mask.sum(dim=1)
        largest = (each * mask).amax(dim=1)  # of values >= 0
        return self.whole(torch.cat([mean, largest], dim=1))


def generalized_cross_entropy(outputs: Tensor, targets: Tensor, *, q: float = 0.5) -> Tensor:
    """(1 − p^q)/q, p being the probability of the label: wrong labels count for less than in cross entropy (q → 0).

    Source: Zhang and Sabuncu 2018, arXiv 1805.07836.
    """
    p = outputs.softmax(dim=1).gather(1, targets[:, None])
    return ((1 - p**q) / q).mean()


def confusion(outputs: Tensor, targets: Tensor) -> Tensor:
    """(100,), the share of the batch that has each pair of a class and the predicted one."""
    pairs = 10 * targets + outputs.argmax(dim=1)
    return torch.bincount(pairs, minlength=100) / len(targets)


def macro_f1(shares: list[float]) -> float:
    """F1, the mean over the classes, from the shares over the whole set: exact, whatever the size of the batches."""
    table = torch.tensor(shares, dtype=torch.float64).reshape(10, 10)
    right = table.diagonal()
    return float((2 * right / (table.sum(dim=0) + table.sum(dim=1)).clamp(min=1e-12)).mean())
