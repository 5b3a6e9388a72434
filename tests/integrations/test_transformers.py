"""The Hugging Face Trainer with the mixin against the bare loop: a tiny transformer on a real text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import gradreg
from gradreg import GradientPenalty
from gradreg.integrations.transformers import GradientRegularizationMixin, except_embeddings
from gradreg.torch import GradientRegularizer
from tests.torch.cases import PENALTIES

from .digits import assert_equal, values
from .language import lines, tiny_llama, tokenizer

WORDS = len(tokenizer())
BATCH = 2


class RegularizedTrainer(GradientRegularizationMixin, Trainer):
    """What a user writes."""


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
    }
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "use_cpu": True}
    return TrainingArguments(output_dir=str(folder), train_sampling_strategy="sequential", **{**settings, **quiet, **options})


def trained(folder: Path, penalty: GradientPenalty | None, *, model: Any = None, **options: Any) -> RegularizedTrainer:
    model = model if model is not None else tiny_llama(WORDS, attn_implementation="eager")
    trainer = RegularizedTrainer(model=model, args=arguments(folder, **options), train_dataset=lines(), penalty=penalty)
    trainer.train()
    return trainer


def bare(penalty: GradientPenalty | None, *, rows: int, clip: float, steps: int = 3) -> tuple[nn.Module, list[float]]:
    """Plain PyTorch: the whole batch of each step at once."""
    model = tiny_llama(WORDS, attn_implementation="eager").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    regularizer = GradientRegularizer(model, penalty)
    tokens = torch.tensor(lines()["input_ids"][:])
    losses = []
    for step in range(steps):
        batch = tokens[rows * step : rows * (step + 1)]
        optimizer.zero_grad()
        losses.append(float(regularizer.backward(lambda batch=batch: model(input_ids=batch, labels=batch).loss)))  # type: ignore[misc]
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model, losses


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry and "loss" in entry]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", ["none", "sam", "gnp", "fgr-mixing", "bgr", "cgr", "exact", "sam-warming-up"])
def test_it_trains_as_the_bare_loop_does(name: str, parts: int, tmp_path: Path) -> None:
    penalty = PENALTIES.get(name)
    trainer = trained(tmp_path, penalty, gradient_accumulation_steps=parts, max_grad_norm=0.5)
    model, losses = bare(penalty, rows=BATCH * parts, clip=0.5)
    assert_equal(values(trainer.model), values(model), tolerance=2e-5)
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-4)
    assert trainer.regularizer is not None
    assert trainer.regularizer.step == 3


def test_resume_is_bit_for_bit(tmp_path: Path) -> None:
    penalty = gradreg.gnp(r=0.3, alpha=0.8).warmup("radius", steps=5)
    options = {"max_steps": 6, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    straight = trained(tmp_path, penalty, **options)
    again = RegularizedTrainer(
        model=tiny_llama(WORDS, attn_implementation="eager"),
        args=arguments(tmp_path / "again", **options),
        train_dataset=lines(),
        penalty=penalty,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(values(again.model), values(straight.model))


def test_a_loss_scale(tmp_path: Path) -> None:
    class Scaled(RegularizedTrainer):
        def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
            super().create_optimizer_and_scheduler(num_training_steps)
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)  # as fp16 gives on an accelerator

    for name in ("fgr-mixing", "sam"):
        seen: list[float] = []
        model = tiny_llama(WORDS, attn_implementation="eager")
        trainer = Scaled(model=model, args=arguments(tmp_path, max_grad_norm=0), train_dataset=lines(), penalty=PENALTIES[name])
        trainer.train()
        twin = GradientRegularizer(tiny_llama(WORDS, attn_implementation="eager").train(), PENALTIES[name])
        batch = torch.tensor(lines()["input_ids"][:BATCH])
        twin.backward(lambda twin=twin, batch=batch: twin.model(input_ids=batch, labels=batch).loss)  # type: ignore[misc]
        norm = nn.utils.get_total_norm([p.grad for p in twin.model.parameters() if p.grad is not None])
        seen = logged(trainer, "grad_norm")
        assert seen[0] == pytest.approx(float(norm), rel=1e-4) or seen[0] == pytest.approx(256 * float(norm), rel=1e-4)


def test_evaluation_is_left_alone(tmp_path: Path) -> None:
    trainer = trained(tmp_path, gradreg.sam(rho=0.1))
    assert trainer.evaluate(lines())["eval_loss"] > 0
    assert trainer.regularizer is not None
    assert trainer.regularizer.step == 3


def test_embeddings_and_head_may_be_left_out() -> None:
    model = tiny_llama(WORDS)
    select = except_embeddings(model)
    chosen = {n for n, p in model.named_parameters() if select(n, p)}
    assert chosen == {n for n, _ in model.named_parameters()} - {"model.embed_tokens.weight", "lm_head.weight"}


def test_exact_with_fused_attention_names_fgr(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"difference='exact' needs every operation to be twice differentiable; .*Use gradreg\.fgr"):
        trained(tmp_path, gradreg.exact(gamma=0.1), model=tiny_llama(WORDS, attn_implementation="sdpa"))
    trained(tmp_path, gradreg.fgr(gamma=0.1, epsilon=0.1), model=tiny_llama(WORDS, attn_implementation="sdpa"))
