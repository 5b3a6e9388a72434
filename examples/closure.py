"""A loop that insists on ``optimizer.step(closure)``: handwritten digits, F-GR.

python examples/closure.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import gradreg
from gradreg.integrations.closure import regularize_closures
from gradreg.torch import GradientRegularizer

data = load_digits()
x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
regularize_closures(optimizer, GradientRegularizer(model, gradreg.fgr(gamma=0.2, epsilon=0.2)))

for epoch in range(5):
    for rows in torch.randperm(1000).split(100):

        def closure(rows=rows):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            return loss

        loss = optimizer.step(closure)
    accuracy = (model(x[1000:]).argmax(1) == y[1000:]).float().mean()
    print(f"epoch {epoch}: loss {float(loss):.3f}, test accuracy {float(accuracy):.3f}")
