"""Does a penalty help a language model in the Hugging Face Trainer? A tiny Llama on real text, by the perplexity of held-out text.

    gradreg compare examples/studies/trainer_words.py --penalties none sam:rho=0.05 fgr:gamma=0.1,epsilon=0.1

``RegularizedTrainer`` makes its own regularizer from ``run.penalty``, and ``run.count`` counts it.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset, TensorDataset, default_collate
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import logging

from gradreg import study
from gradreg.integrations.transformers import RegularizedTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_language import language_model, text, tokenizer

logging.set_verbosity_error()


class Log(TrainerCallback):
    """Logs the perplexity of both held-out texts after every epoch."""

    def __init__(self, run: study.Run, held_out: dict[str, torch.Tensor]) -> None:
        self.run, self.held_out = run, held_out

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.eval()
        with torch.no_grad():
            loss = {name: model(input_ids=ids, labels=ids).loss for name, ids in self.held_out.items()}
        model.train()
        perplexity = {f"{name}_perplexity": math.exp(value) for name, value in loss.items()}
        self.run.log(loss=loss["validation"], **perplexity)


def collate(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    (ids,) = default_collate(rows)
    return {"input_ids": ids, "labels": ids}


@study.task(metric="perplexity", mode="min")
def train(run: study.Run, *, epochs: int = 6, lr: float = 0.01, batch_size: int = 16) -> None:
    """The descriptions of scikit-learn's data sets, a Llama of two layers in the Trainer."""
    tokens = tokenizer()
    ids = torch.tensor(tokens(text())["input_ids"])
    pieces = ids[: len(ids) // 32 * 32].view(-1, 32)
    pieces = pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(run.seed))]
    held_out = {"validation": pieces[:24], "test": pieces[24:48]}
    arguments = TrainingArguments(
        str(run.folder / "trainer"),
        num_train_epochs=len(run.epochs(epochs)),
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        seed=run.seed,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = TensorDataset(pieces)
    trainer = RegularizedTrainer(
        language_model(tokens, seed=run.seed),
        arguments,
        train_dataset=Subset(data, range(48, len(pieces))),
        data_collator=collate,
        callbacks=[Log(run, held_out)],
        penalty=run.penalty,
    )
    run.count(trainer, steps=lambda: trainer.state.global_step)
    trainer.train()
