"""TRL's trainers with F-GR on and off: the same completions, counts and logs, and the gradient of one loss."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, RLOOConfig, SFTConfig, SFTTrainer

import gradreg
from gradreg.integrations.transformers import RegularizedTrainerMixin
from gradreg.integrations.trl import (
    RegularizedDPOTrainer,
    RegularizedGRPOTrainer,
    RegularizedKTOTrainer,
    RegularizedRewardTrainer,
    RegularizedRLOOTrainer,
    RegularizedSFTTrainer,
    against_reward_hacking,
    without_embeddings,
)
from gradreg.torch import GradientRegularizer

from .digits import largest_difference, weights
from .text import language_model, text, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated")

STRONG = gradreg.fgr(gamma=1.0, epsilon=2.0)
CLIPPED = gradreg.fgr(gamma=1.0, epsilon=2.0, clip=0.05)
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
}


def different_words(completions: list[str], **_: Any) -> list[float]:
    """A rule: the number of different words that start with a letter before m."""
    return [float(len({w for w in c.split() if w[0] < "m"})) for c in completions]


def prompts() -> Dataset:
    words = text().split()
    return Dataset.from_list([{"prompt": " ".join(words[8 * i : 8 * i + 6])} for i in range(16)])


def grpo(
    folder: Path,
    penalty: Any,
    *,
    steps: int = 2,
    trainer_class: Any = RegularizedGRPOTrainer,
    resume: str | None = None,
    **options: Any,
) -> Any:
    model = language_model(dropout=0.0)
    args = GRPOConfig(str(folder), max_steps=steps, num_generations=4, max_completion_length=8, beta=0.0, **{**COMMON, **options})
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = trainer_class(
        model,
        different_words,
        args=args,
        train_dataset=prompts(),
        processing_class=tokenizer(),
        optimizers=(sgd, torch.optim.lr_scheduler.ConstantLR(sgd, 1.0)),
        penalty=penalty,
        parameters=without_embeddings(model),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Spy(RegularizedGRPOTrainer):
    """Counts generations, and notes of each forward pass whether it repeats one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.passes: list[bool] = []
        self.generations = 0
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.generations += 1
        return super()._generate_and_score_completions(inputs)

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        self.passes.append(self.repeats_pass)
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize("penalty", [STRONG, CLIPPED], ids=["fgr", "clipped"])
def test_a_grpo_step_is_the_hand_written_one(penalty: gradreg.GradientPenalty, tmp_path: Path):
    trainer = grpo(tmp_path, penalty, steps=1)
    batches = trainer._buffered_inputs
    assert len(batches) == 2
    model = language_model(dropout=0.0)
    chosen = without_embeddings(model)
    normalizer = batches[0]["num_items_in_batch"]

    def log_probabilities(b: dict[str, Any]) -> torch.Tensor:
        ids = torch.cat([b["prompt_ids"], b["completion_ids"]], 1)
        mask = torch.cat([b["prompt_mask"], b["completion_mask"]], 1)
        count = b["completion_ids"].size(1)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -count - 1 : -1] / trainer.temperature
        return logits.log_softmax(-1).gather(-1, b["completion_ids"].unsqueeze(-1)).squeeze(-1)

    with torch.no_grad():
        old = [log_probabilities(b) for b in batches]

    def loss(i: int) -> torch.Tensor:
        b = batches[i]
        ratio, advantage = (log_probabilities(b) - old[i]).exp(), b["advantages"].unsqueeze(1)
        surrogate = torch.min(ratio * advantage, ratio.clamp(1 - 0.2, 1 + 0.2) * advantage)
        return -(surrogate * b["completion_mask"]).sum() / normalizer

    model.train()
    GradientRegularizer(model, penalty, parameters=chosen).backward([lambda: loss(0), lambda: loss(1)])
    nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert largest_difference(weights(trainer.model), weights(model)) <= 1e-6
    others = (other for other in (None, STRONG) if other != penalty)
    assert min(largest_difference(weights(model), weights(grpo(tmp_path, other, steps=1).model)) for other in others) > 1e-4


def test_grpo_generates_and_counts_once_with_the_penalty_on_and_off(tmp_path: Path):
    off, on = grpo(tmp_path, None, trainer_class=Spy), grpo(tmp_path, against_reward_hacking(), trainer_class=Spy)
    assert off.generations == on.generations == 2
    assert off.passes == [False] * 4
    assert on.passes == [False, False, True, True] * 2
    first_off, first_on = off.state.log_history[0], on.state.log_history[0]
    changed = {"grad_norm", "gradient_evaluations", "penalty_strength", "step_time"}
    assert first_off.keys() == first_on.keys()
    for name in first_off.keys() - changed:
        assert first_on[name] == pytest.approx(first_off[name], rel=1e-5, abs=1e-6), name
    assert first_on["reward_std"] > 0
    assert on.state.log_history[1]["num_tokens"] == pytest.approx(off.state.log_history[1]["num_tokens"], abs=16)
    assert on.state.log_history[1]["gradient_evaluations"] == 4
    assert largest_difference(weights(on.model), weights(off.model)) > 0


class RecordingSFT(RegularizedSFTTrainer):
    """Keeps the micro-batches of a step."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.repeats_pass:
            self.batches = [*getattr(self, "batches", []), copy.copy(inputs)]
        return super().compute_loss(model, inputs, *args, **kwargs)


def sft(folder: Path, penalty: Any, *, steps: int) -> Any:
    model = language_model(dropout=0.0).double()  # so that rounding does not decide the comparison
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    args = SFTConfig(str(folder), max_steps=steps, max_length=32, packing=False, **COMMON)
    trainer = RecordingSFT(
        model,
        args=args,
        train_dataset=Dataset.from_list([{"text": piece} for piece in text().split("\n\n")[:24]]),
        processing_class=tokenizer(),
        optimizers=(sgd, torch.optim.lr_scheduler.ConstantLR(sgd, 1.0)),
        penalty=penalty,
    )
    trainer.train()
    return trainer


def test_a_resumed_grpo_run_has_the_state_of_its_penalty(tmp_path: Path):
    penalty, saving = gradreg.looksam(rho=0.3, k=3, a=0.7), {"save_strategy": "steps", "save_steps": 2, "steps": 4}
    whole = grpo(tmp_path / "whole", penalty, **saving)
    resumed = grpo(tmp_path / "again", penalty, resume=str(tmp_path / "whole" / "checkpoint-2"), **saving)
    assert largest_difference(weights(resumed.model), weights(whole.model)) == 0.0
    memory = [trainer.regularizer.state_dict()["memory"]["reused"] for trainer in (whole, resumed)]
    assert largest_difference(*memory) == 0.0
    assert any(tensor.any() for tensor in memory[0].values())


def test_an_sft_step_is_the_hand_written_one(tmp_path: Path):
    trainer = sft(tmp_path, STRONG, steps=1)
    assert len(trainer.batches) == 2
    model = language_model(dropout=0.0).double()
    tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in trainer.batches)

    def loss(b: dict[str, Any]) -> torch.Tensor:
        logits = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), b["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum") / tokens

    model.train()
    value = GradientRegularizer(model, STRONG).backward([lambda b=b: loss(b) for b in trainer.batches])
    nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert largest_difference(weights(trainer.model), weights(model)) <= 1e-6
    assert trainer.state.log_history[0]["loss"] == pytest.approx(value.item(), rel=1e-5)
    assert largest_difference(weights(model), weights(sft(tmp_path, None, steps=1).model)) > 1e-4


def test_sft_logs_and_counts_its_tokens_once(tmp_path: Path):
    off, on = sft(tmp_path, None, steps=2), sft(tmp_path, STRONG, steps=2)
    for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
        assert on.state.log_history[0][name] == pytest.approx(off.state.log_history[0][name], rel=1e-5), name
    assert on.state.log_history[1]["num_tokens"] == off.state.log_history[1]["num_tokens"]
    assert largest_difference(weights(on.model), weights(off.model)) > 1e-4


def preferences(*, labelled: bool = False) -> Dataset:
    """A prompt, its own continuation, and another one; ``labelled`` gives each completion a row of its own."""
    words = text().split()
    rows = []
    for i in range(16):
        piece = words[24 * i : 24 * (i + 1)]
        prompt, chosen, rejected = (" ".join(part) for part in (piece[:6], piece[6 : 12 + i % 3], piece[14:18]))
        if labelled:
            rows += [{"prompt": prompt, "completion": chosen, "label": True}, {"prompt": prompt, "completion": rejected, "label": False}]
        else:
            rows.append({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected})
    return Dataset.from_list(rows)


def judge() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**{**language_model(dropout=0.0).config.to_dict(), "num_labels": 1}))


ALIGNMENT: dict[str, tuple[Any, Any, Any]] = {
    "dpo": (RegularizedDPOTrainer, DPOConfig, preferences),
    "kto": (RegularizedKTOTrainer, KTOConfig, lambda: preferences(labelled=True)),
    "reward": (RegularizedRewardTrainer, RewardConfig, preferences),
    "rloo": (RegularizedRLOOTrainer, RLOOConfig, prompts),
}


def aligned(folder: Path, kind: str, penalty: Any, *, plain: bool = False) -> Any:
    """One step of two micro-batches; with ``plain`` TRL's own trainer, not trained."""
    ours, config, data = ALIGNMENT[kind]
    base = ours.__mro__[2]
    assert base.__module__.startswith("trl.")

    class Recording(ours):  # type: ignore[misc, valid-type]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.repeats_pass:
                self.batches = [*getattr(self, "batches", []), copy.copy(inputs)]
            return super().compute_loss(model, inputs, *args, **kwargs)

    model = (judge() if kind == "reward" else language_model(dropout=0.0)).double()  # so that rounding does not decide the comparison
    options: dict[str, Any] = {"num_generations": 4, "max_completion_length": 8, "beta": 0.0} if kind == "rloo" else {"max_length": 32}
    args = config(str(folder), max_steps=1, seed=1, **COMMON, **options)
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = (base if plain else Recording)(
        model,
        args=args,
        train_dataset=data(),
        processing_class=tokenizer(),
        optimizers=(sgd, torch.optim.lr_scheduler.ConstantLR(sgd, 1.0)),
        **(
            {"reward_funcs": different_words}
            if kind == "rloo"
            else {"ref_model": language_model(1, dropout=0.0).double()}
            if kind != "reward"
            else {}
        ),
        **({} if plain else {"penalty": penalty}),
    )
    if not plain:
        trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ALIGNMENT)
def test_a_step_is_the_hand_written_one(kind: str, tmp_path: Path):
    trainer, plain, off = aligned(tmp_path, kind, STRONG), aligned(tmp_path, kind, None, plain=True), aligned(tmp_path, kind, None)
    model = plain.model
    before = weights(model)
    assert len(trainer.batches) == 2
    model.train()
    closures = [lambda b=b: plain.compute_loss(model, copy.copy(b)) / 2 for b in trainer.batches]
    loss = GradientRegularizer(model, STRONG).backward(closures)
    nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert largest_difference(weights(trainer.model), weights(model)) <= 1e-6
    assert min(largest_difference(w, weights(model)) for w in (before, weights(off.model))) > 1e-4
    logged, without = trainer.state.log_history[0], off.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert logged["gradient_evaluations"] == 2
    assert logged.keys() == without.keys()
    for name in logged.keys() - {"grad_norm", "gradient_evaluations", "penalty_strength", "step_time"}:
        assert logged[name] == pytest.approx(without[name], rel=1e-5, abs=1e-6), name  # of the first pass, once


def test_a_trainer_that_computes_its_loss_elsewhere_is_an_error(tmp_path: Path):
    class GeneratesPairs(SFTTrainer):
        """As ``trl.experimental.online_dpo`` does: generates, scores and computes its loss in ``training_step``."""

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            loss = model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss
            self.accelerator.backward(loss)
            return loss.detach()

    class Mixed(RegularizedTrainerMixin, GeneratesPairs):
        pass

    args = SFTConfig(str(tmp_path), max_steps=1, max_length=32, packing=False, **COMMON)
    data = Dataset.from_list([{"text": piece} for piece in text().split("\n\n")[:24]])
    trainer = Mixed(language_model(dropout=0.0), args=args, train_dataset=data, processing_class=tokenizer(), penalty=STRONG)
    with pytest.raises(ValueError, match="got one that computes its loss without compute_loss"):
        trainer.train()


def test_the_setting_of_the_paper():
    """``grpo_rlhf_script.py`` and ``gradreg_config.py`` of its code."""
    penalty = against_reward_hacking()
    assert penalty == gradreg.fgr(gamma=1e-2, epsilon=1e-3, clip=10.0)
    assert (penalty.direction, penalty.mixing) == (gradreg.Clipped(max_norm=10.0), gradreg.ClipEach(max_norm=10.0))
    assert penalty.coefficient_at(0) == pytest.approx(10)
    assert penalty.evaluations_at(0) == 2
    assert copy.copy(penalty) == penalty
    assert against_reward_hacking(clip=None) == gradreg.fgr(gamma=1e-2, epsilon=1e-3)
