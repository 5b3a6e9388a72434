"""A character language model: a GRU that reads the descriptions of scikit-learn's data sets, judged by perplexity.

gradreg compare examples/studies/characters.py --penalties none sam:rho=0.05 fgr:gamma=0.5,epsilon=0.05 --seeds 3
"""

import math

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradreg import study


class Characters(nn.Module):
    """The next character from those before it."""

    def __init__(self, characters: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        self.memory = nn.GRU(32, width, batch_first=True)
        self.head = nn.Linear(width, characters)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.memory(self.embedding(text))[0])


@study.task(metric="perplexity", mode="min")
def train(run: study.Run, *, epochs: int = 12, width: int = 96, lr: float = 3e-3, batch_size: int = 16, length: int = 48) -> None:
    """Five descriptions of data sets, in pieces of 48 characters: 70 % to train on, 15 % to select by, 15 % to test on."""
    text = "\n".join(str(load()["DESCR"]) for load in (load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine))
    alphabet = sorted(set(text))
    ids = torch.tensor([alphabet.index(character) for character in text])
    pieces = ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)
    pieces = pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(run.seed))]
    validation, test, training = pieces.tensor_split([len(pieces) * 15 // 100, len(pieces) * 30 // 100])

    model = Characters(len(alphabet), width)
    regularizer = run.regularizer(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)

    def loss(part: Tensor) -> Tensor:
        return cross_entropy(model(part[:, :-1]).transpose(1, 2), part[:, 1:])

    @torch.no_grad()
    def perplexity(part: Tensor) -> float:
        return math.exp(loss(part))

    for _ in run.epochs(epochs):
        losses = []
        for batch in training[torch.randperm(len(training))].split(batch_size):
            losses.append(regularizer.backward(lambda batch=batch: loss(batch)))
            optimizer.step()
            optimizer.zero_grad()
        run.log(loss=torch.stack(losses).mean(), validation_perplexity=perplexity(validation), test_perplexity=perplexity(test))
