"""Does a penalty help a GRU that tells what a sentence is about? Sentences of the standard library's documentation, by their subject.

    gradreg compare examples/studies/gru_text.py --penalties none sam:rho=0.05 fgr:gamma=0.2,epsilon=0.2

The text ships with Python: sentences of docstrings on numbers, files, networks and concurrency. What occurs under two subjects is left
out, and each sentence counts once, so that none is in two of the splits.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradreg import study

SUBJECTS = {
    "numbers": ("math", "cmath", "statistics", "decimal", "fractions", "random", "numbers"),
    "files": ("os", "shutil", "pathlib", "tempfile", "glob", "io", "zipfile", "tarfile"),
    "networks": ("socket", "ssl", "http.client", "urllib.request", "smtplib", "email.message", "ftplib", "http.cookiejar"),
    "concurrency": (
        "threading",
        "asyncio",
        "multiprocessing.pool",
        "concurrent.futures",
        "queue",
        "subprocess",
        "multiprocessing.managers",
    ),
}
LENGTH = 24
"""Words of a sentence that are read."""


@cache
def sentences() -> tuple[tuple[str, int], ...]:
    """Sentences of at least five words with the number of their subject."""
    found: dict[str, set[int]] = {}
    for label, modules in enumerate(SUBJECTS.values()):
        for name in modules:
            module = importlib.import_module(name)
            members = [value for _, value in inspect.getmembers(module) if callable(value)]
            methods = [value for member in members if inspect.isclass(member) for value in vars(member).values()]
            for thing in (module, *members, *methods):
                text = " ".join((getattr(thing, "__doc__", None) or "").split()) if isinstance(getattr(thing, "__doc__", None), str) else ""
                for sentence in re.split(r"(?<=[.!?])\s", text):
                    if len(sentence.split()) >= 5:
                        found.setdefault(sentence.lower(), set()).add(label)
    return tuple(sorted((sentence, min(labels)) for sentence, labels in found.items() if len(labels) == 1))


class Classifier(nn.Module):
    """Embedding, GRU and a linear layer on the mean of its outputs."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, len(SUBJECTS))

    def forward(self, tokens: Tensor) -> Tensor:
        outputs, _ = self.gru(self.embedding(tokens))
        return self.head(outputs.mean(dim=1))


@study.task(metric="accuracy")
def train(run: study.Run, *, epochs: int = 12, lr: float = 0.01, width: int = 48, words: int = 2000, train_size: int = 2000) -> None:
    """Sentences of Python's own documentation by their subject, a GRU."""
    generator = torch.Generator().manual_seed(run.seed)
    texts = sentences()
    order = torch.randperm(len(texts), generator=generator).tolist()
    split = [[re.findall(r"[a-z_]+", texts[i][0])[:LENGTH] for i in order], [texts[i][1] for i in order]]
    known = Counter(word for sentence in split[0][:train_size] for word in sentence)
    number = {word: i + 2 for i, (word, _) in enumerate(known.most_common(words - 2))}  # 0 pads, 1 is any other word
    x = torch.tensor([[number.get(word, 1) for word in sentence] + [0] * (LENGTH - len(sentence)) for sentence in split[0]])
    y = torch.tensor(split[1])
    half = (len(y) - train_size) // 2
    held_out = {"validation": slice(train_size, train_size + half), "test": slice(train_size + half, None)}

    model = Classifier(words, width)
    regularizer = run.regularizer(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in run.epochs(epochs):
        model.train()
        for batch in torch.randperm(train_size, generator=generator).split(50):
            optimizer.zero_grad()
            loss = regularizer.backward(lambda batch=batch: cross_entropy(model(x[batch]), y[batch]))
            optimizer.step()
        model.eval()
        with torch.no_grad():
            right = {name: (model(x[rows]).argmax(1) == y[rows]).float().mean() for name, rows in held_out.items()}
        run.log(loss=loss, validation_accuracy=right["validation"], test_accuracy=right["test"])
