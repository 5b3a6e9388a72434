"""Lightning: the module is as it would be without a penalty, one callback adds it.

python examples/lightning_digits.py
"""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradreg
from gradreg.integrations.lightning import GradientRegularization


class Digits(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.network(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (self.network(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


data = load_digits()
images = TensorDataset(torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target))
train, test = torch.utils.data.Subset(images, range(1000)), torch.utils.data.Subset(images, range(1000, 1797))
pl.seed_everything(0)
trainer = pl.Trainer(
    max_epochs=5,
    accelerator="cpu",
    callbacks=[GradientRegularization(gradreg.gnp(r=0.5, alpha=0.8))],
    logger=False,
    enable_checkpointing=False,
)
trainer.fit(Digits(), DataLoader(train, batch_size=100, shuffle=True), DataLoader(test, batch_size=797))
print(f"test accuracy {float(trainer.callback_metrics['accuracy']):.3f}")
