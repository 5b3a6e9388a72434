"""Does a penalty help a Lightning module? Digits with a third of the training labels at random.

    gradreg compare examples/studies/lightning_digits.py --penalties none sam:rho=0.1 fgr:gamma=0.5,epsilon=0.5

The callback makes its own regularizer from ``run.penalty``, and ``run.count`` counts it. Lightning trains the epochs that
``run.epochs`` allows: more for the longer baselines.
"""

from __future__ import annotations

import logging
import warnings

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from gradreg import study
from gradreg.integrations.lightning import GradientRegularization

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Classifier(lightning.LightningModule):
    """An MLP that logs its accuracy into a study's run after every epoch."""

    def __init__(self, run: study.Run, lr: float, width: int, held_out: dict[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.run, self.lr, self.held_out = run, lr, held_out
        self.layers = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        self.loss = cross_entropy(self.layers(x), y)
        return self.loss

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        accuracy = {name: (self.layers(x).argmax(1) == y).float().mean() for name, (x, y) in self.held_out.items()}
        self.run.log(loss=self.loss, validation_accuracy=accuracy["validation"], test_accuracy=accuracy["test"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


@study.task(metric="accuracy")
def train(run: study.Run, *, epochs: int = 30, lr: float = 0.05, width: int = 128, train_size: int = 1000) -> None:
    """1,797 images of digits, a Lightning module."""
    generator = torch.Generator().manual_seed(run.seed)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=generator)
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    wrong = torch.rand(train_size, generator=generator) < 0.3
    noisy = torch.where(wrong, torch.randint(0, 10, (train_size,), generator=generator), y[:train_size])
    half = (len(y) - train_size) // 2
    held_out = {"validation": (x[train_size:-half], y[train_size:-half]), "test": (x[-half:], y[-half:])}
    data = DataLoader(TensorDataset(x[:train_size], noisy), batch_size=100, shuffle=True, generator=generator)
    module = Classifier(run, lr, width, held_out)
    callback = GradientRegularization(run.penalty)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on the number of workers
        trainer = lightning.Trainer(
            max_epochs=len(run.epochs(epochs)),
            callbacks=[callback],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        run.count(callback, steps=lambda: trainer.global_step)
        trainer.fit(module, data)
