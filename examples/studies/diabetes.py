"""Tabular regression: the progression of diabetes from ten measurements, in scikit-learn's data; a small network, judged by RMSE.

gradreg compare examples/studies/diabetes.py --penalties none sam:rho=0.1 fgr:gamma=0.5,epsilon=0.1 --seeds 5
"""

import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.nn.functional import mse_loss

from gradreg import study


@study.task(metric="rmse", mode="min")
def train(run: study.Run, *, epochs: int = 60, width: int = 64, lr: float = 0.02, batch_size: int = 32) -> None:
    """Progression of diabetes: 242 patients to train on, 100 to select by, 100 to test on, drawn anew with each seed."""
    inputs, targets = load_diabetes(return_X_y=True)
    rows = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(run.seed))
    x, y = torch.tensor(inputs, dtype=torch.float32)[rows], torch.tensor(targets, dtype=torch.float32)[rows]
    mean, spread, location, scale = x[200:].mean(0), x[200:].std(0), y[200:].mean(), y[200:].std()
    x, y = (x - mean) / spread, (y - location) / scale
    validation, test, training = slice(0, 100), slice(100, 200), rows.new_tensor(range(200, len(x)))

    model = nn.Sequential(nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1), nn.Flatten(0))
    regularizer = run.regularizer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

    def rmse(part: slice) -> float:
        with torch.no_grad():
            return float(scale * mse_loss(model(x[part]), y[part]).sqrt())

    for _ in run.epochs(epochs):
        losses = []
        for batch in training[torch.randperm(len(training))].split(batch_size):
            losses.append(regularizer.backward(lambda batch=batch: mse_loss(model(x[batch]), y[batch])))
            optimizer.step()
            optimizer.zero_grad()
        run.log(loss=torch.stack(losses).mean(), validation_rmse=rmse(validation), test_rmse=rmse(test))
