"""Gradient regularization in Lightning: one callback, no change to the module.

    python examples/lightning_digits.py [--epochs 10]

Trains a small network on scikit-learn's handwritten digits with accumulation and clipping, and prints its test accuracy.
"""

import argparse
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import gradreg
from gradreg.integrations.lightning import GradientRegularization


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self.network(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [sgd], [torch.optim.lr_scheduler.CosineAnnealingLR(sgd, self.trainer.max_epochs or 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs
    warnings.filterwarnings("ignore", message=".*does not have many workers")

    pl.seed_everything(0, verbose=False)
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16.0, dtype=torch.float32), torch.tensor(labels)
    regularization = GradientRegularization(gradreg.gnp(r=0.1, alpha=0.8))
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[regularization],
        accumulate_grad_batches=2,
        gradient_clip_val=5.0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Digits()
    trainer.fit(module, DataLoader(TensorDataset(x[:1000], y[:1000]), batch_size=50, shuffle=True))
    module.eval()
    accuracy = (module.network(x[1000:]).argmax(1) == y[1000:]).float().mean()
    loss = trainer.callback_metrics["train_loss"]
    print(f"train loss {loss:.3f}, test accuracy {accuracy:.3f}, {regularization.state_dict()['evaluations']} gradient evaluations")


if __name__ == "__main__":
    main()
