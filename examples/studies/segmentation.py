"""Semantic segmentation: which digit each pixel belongs to, in scenes made of scikit-learn's digits; judged by the mean IoU.

gradreg compare examples/studies/segmentation.py --penalties none sam:rho=0.1 fgr:gamma=0.5,epsilon=0.1 --seeds 3
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradreg import study

CLASSES = 11
"""Ten digits and, last, the background."""


def scenes(digits: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images of 20 by 20 pixels with two digits on a noisy ground, and the class of every pixel."""
    images, classes = 0.3 * torch.rand(count, 1, 20, 20, generator=generator), torch.full((count, 20, 20), CLASSES - 1)
    for image, mask in zip(images, classes, strict=True):
        for top, left in ((0, 0), (10, 10)):
            which = int(torch.randint(len(digits), (), generator=generator))
            down, right = torch.randint(3, (2,), generator=generator).tolist()
            place = slice(top + down, top + down + 8), slice(left + right, left + right + 8)
            image[0][place] = torch.maximum(image[0][place], digits[which])
            mask[place][digits[which] > 0.25] = labels[which]
    return images, classes


def mean_iou(predicted: Tensor, classes: Tensor) -> float:
    """The mean over the classes of the shared share of the pixels that are of this class or were taken for it."""
    pairs = torch.bincount(CLASSES * classes.flatten() + predicted.flatten(), minlength=CLASSES**2).view(CLASSES, CLASSES)
    union = pairs.sum(0) + pairs.sum(1) - pairs.diag()
    return float((pairs.diag() / union)[union > 0].mean())


@study.task(metric="miou", percent=True)
def train(run: study.Run, *, epochs: int = 15, width: int = 24, lr: float = 0.1, batch_size: int = 20, images: int = 300) -> None:
    """Scenes with two digits each: 300 to train on, 150 to select by, 300 to test on, of digits that no other part has."""
    generator = torch.Generator().manual_seed(run.seed)
    pixels, targets = load_digits(return_X_y=True)
    rows = torch.randperm(len(pixels), generator=generator)
    digits, labels = torch.tensor(pixels / 16.0, dtype=torch.float32).view(-1, 8, 8)[rows], torch.tensor(targets)[rows]
    training = scenes(digits[:800], labels[:800], images, generator)
    validation = scenes(digits[800:1100], labels[800:1100], 150, generator)
    test = scenes(digits[1100:], labels[1100:], 300, generator)

    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=2, dilation=2),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=3, dilation=3),
        nn.ReLU(),
        nn.Conv2d(width, CLASSES, 1),
    )
    regularizer = run.regularizer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

    @torch.no_grad()
    def miou(part: tuple[Tensor, Tensor]) -> float:
        model.eval()
        predicted = model(part[0]).argmax(1)
        model.train()
        return mean_iou(predicted, part[1])

    for _ in run.epochs(epochs):
        losses = []
        for rows in torch.randperm(images).split(batch_size):
            x, y = training[0][rows], training[1][rows]
            losses.append(regularizer.backward(lambda x=x, y=y: cross_entropy(model(x), y)))
            optimizer.step()
            optimizer.zero_grad()
        run.log(loss=torch.stack(losses).mean(), validation_miou=miou(validation), test_miou=miou(test))
