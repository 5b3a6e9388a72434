"""Code that insists on ``optimizer.step(closure)``: the usual closure, a schedule, clipping, and gradient regularization.

    python examples/closure_optimizer.py [--epochs 20]

Trains a small network on scikit-learn's handwritten digits and prints its test accuracy.
"""

import argparse
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradreg
from gradreg.integrations.closure import RegularizedOptimizer
from gradreg.torch import GradientRegularizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args().epochs

    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16.0, dtype=torch.float32), torch.tensor(labels)
    train, test = slice(0, 1000), slice(1000, None)

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = RegularizedOptimizer(sgd, GradientRegularizer(model, gradreg.sam(rho=0.1)))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)

    optimizer.register_step_pre_hook(clip)

    for _ in range(epochs):
        for rows in torch.randperm(1000).split(100):

            def closure(rows: Tensor = rows) -> Tensor:
                optimizer.zero_grad()
                loss = cross_entropy(model(x[train][rows]), y[train][rows])
                loss.backward()
                return loss

            optimizer.step(closure)
        schedule.step()

    model.eval()
    accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
    print(f"test accuracy {accuracy:.3f} after {optimizer.regularizer.metrics.evaluations:.0f} gradient evaluations")


if __name__ == "__main__":
    main()
