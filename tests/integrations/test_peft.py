"""Trainers with LoRA: a penalty perturbs the adapters alone, and holds nothing of the size of the frozen model; Flat-LoRA; Bi-LoRA."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, RLOOConfig, SFTConfig

import gradreg
from gradreg.integrations.transformers import RegularizedTrainer
from gradreg.integrations.trl import (
    RegularizedDPOTrainer,
    RegularizedGRPOTrainer,
    RegularizedKTOTrainer,
    RegularizedRewardTrainer,
    RegularizedRLOOTrainer,
    RegularizedSFTTrainer,
)
from gradreg.torch import GradientRegularizer
from gradreg.torch.buffers import _SMALL as SMALL

from .digits import largest_difference
from .test_trl import COMMON, different_words, judge, preferences, prompts
from .text import examples, language_model, text, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated")

STRONG = gradreg.fgr(gamma=1.0, epsilon=2.0)
GENERATES = {"num_generations": 4, "max_completion_length": 8, "beta": 0.0}
KINDS: dict[str, tuple[Any, Any, dict[str, Any], float]] = {
    "trainer": (RegularizedTrainer, TrainingArguments, {"train_sampling_strategy": "sequential"}, 1.0),
    "sft": (RegularizedSFTTrainer, SFTConfig, {"max_length": 32, "packing": False}, 1.0),
    "dpo": (RegularizedDPOTrainer, DPOConfig, {"max_length": 32}, 0.5),
    "kto": (RegularizedKTOTrainer, KTOConfig, {"max_length": 32}, 0.5),
    "reward": (RegularizedRewardTrainer, RewardConfig, {"max_length": 32}, 0.5),
    "rloo": (RegularizedRLOOTrainer, RLOOConfig, GENERATES, 0.5),
    "grpo": (RegularizedGRPOTrainer, GRPOConfig, GENERATES, 1.0),
}
"""Trainer, its configuration, options, and the share of a micro-batch's loss of two that the trainer takes."""


def with_lora(model: Any, *, kind: str = "CAUSAL_LM", **options: Any) -> PeftModel:
    torch.manual_seed(3)
    config = LoraConfig(**{"r": 4, **options}, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type=kind)
    return get_peft_model(model, config)  # type: ignore[return-value]


def data_for(kind: str) -> Any:
    if kind == "trainer":
        return examples(16)
    if kind == "sft":
        return Dataset.from_list([{"text": piece} for piece in text().split("\n\n")[:24]])
    return prompts() if kind in ("grpo", "rloo") else preferences(labelled=kind == "kto")


def built(folder: Path, kind: str, penalty: Any, *, plain: bool = False, model: Any = None, **options: Any) -> Any:
    """A trainer of a model with LoRA in double precision; with ``plain`` the framework's own class."""
    ours, config, own, _ = KINDS[kind]
    base = ours.__mro__[2]
    assert base.__module__.startswith(("trl.", "transformers."))

    class Recording(ours):  # type: ignore[misc, valid-type]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.repeats_pass:
                self.batches = [*getattr(self, "batches", []), (copy.copy(inputs), args, kwargs)]
            return super().compute_loss(model, inputs, *args, **kwargs)

    if model is None:
        model = judge() if kind == "reward" else language_model(dropout=0.0)
        model = with_lora(model, kind="SEQ_CLS" if kind == "reward" else "CAUSAL_LM").double()
    common = {k: v for k, v in COMMON.items() if k != "bf16"} if kind == "trainer" else COMMON
    args = config(str(folder), **{"max_steps": 1, "seed": 1, **common, **own, **options})
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    extra: dict[str, Any] = {"reward_funcs": different_words} if kind in ("grpo", "rloo") else {}
    return (base if plain else Recording)(
        model=model,
        args=args,
        train_dataset=data_for(kind),
        processing_class=tokenizer(),
        optimizers=(sgd, torch.optim.lr_scheduler.ConstantLR(sgd, 1.0)),
        **extra,
        **({} if plain else {"penalty": penalty}),
    )


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_hand_written_one_over_the_adapters(kind: str, tmp_path: Path):
    trainer, twin, off = built(tmp_path, kind, STRONG), built(tmp_path, kind, None, plain=True), built(tmp_path, kind, None)
    before, frozen = trainable(twin.model), {n: p.detach().clone() for n, p in twin.model.named_parameters() if not p.requires_grad}
    trainer.train()
    off.train()
    assert len(trainer.batches) == 2
    model = twin.model
    assert all("lora" in name or "modules_to_save" in name for name in before)
    model.train()
    share = KINDS[kind][3]
    closures = [lambda b=b: share * twin.compute_loss(model, copy.copy(b[0]), *b[1], **b[2]) for b in trainer.batches]
    if kind == "grpo":
        twin.current_gradient_accumulation_steps = 2
        # The policy at θ is the old one in both passes
        for inputs, _, _ in trainer.batches:
            inputs["old_per_token_logps"] = _log_probabilities(twin, model, inputs)
    regularizer = GradientRegularizer(model, STRONG)
    regularizer.backward(closures)
    nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    assert largest_difference(trainable(trainer.model), trainable(model)) <= 1e-6
    assert min(largest_difference(w, trainable(model)) for w in (before, trainable(off.model))) > 1e-4
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.model.named_parameters() if n in frozen)
    copies = trainer.regularizer._perturbation._buffers
    assert sum(c.nbytes for c in copies.values()) == sum(p.nbytes for p in before.values())


def test_a_step_of_flat_lora_in_a_trainer_is_the_hand_written_one(tmp_path: Path):
    penalty = gradreg.flat_lora(sigma=0.5)
    trainer, twin, off = built(tmp_path, "trainer", penalty), built(tmp_path, "trainer", None, plain=True), built(tmp_path, "trainer", None)
    trainer.train()
    off.train()
    model = twin.model.train()
    GradientRegularizer(model, penalty).backward(
        [lambda b=b: twin.compute_loss(model, copy.copy(b[0]), *b[1], **b[2]) for b in trainer.batches]
    )
    nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    assert trainer.regularizer.metrics.evaluations == 1
    assert largest_difference(trainable(trainer.model), trainable(model)) <= 1e-6
    assert largest_difference(trainable(off.model), trainable(model)) > 1e-4


def _log_probabilities(twin: Any, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -inputs["completion_ids"].size(1) - 1 : -1] / twin.temperature
    return logits.log_softmax(-1).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)


def live_bytes() -> int:
    """Of all tensors that exist, each storage counted once."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.layout is torch.strided]
    # A compiled function of an earlier test may have left tensors that have no memory.
    real = [t for t in tensors if type(t) in (torch.Tensor, nn.Parameter) and not torch._is_functional_tensor(t)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in real}.values())


@pytest.mark.parametrize("penalty", [gradreg.sam(rho=0.3), STRONG, gradreg.flat_lora(sigma=0.1)], ids=["sam", "fgr", "flat-lora"])
def test_the_last_pass_holds_the_trainable_parameters_once_more_and_nothing_of_the_frozen_ones(penalty: gradreg.GradientPenalty):
    """Counted inside the last forward pass, when the copy exists and, for c ≠ 1 only, the first gradient."""

    def at_the_last_pass(penalty: Any) -> tuple[int, int, int]:
        config = LlamaConfig(
            **{**language_model(dropout=0.0).config.to_dict(), "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
        )
        model = with_lora(LlamaForCausalLM(config), r=32)
        own = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        batch = {name: torch.stack([e[name] for e in examples(4)]) for name in examples(1)[0]}
        regularizer, found = GradientRegularizer(model, penalty), [0]

        def closure() -> torch.Tensor:
            found.append(live_bytes())
            return model(**batch).loss

        for _ in range(2):
            model.zero_grad()
            regularizer.backward(closure)
        return found[-1], own, frozen

    plain, own, frozen = at_the_last_pass(None)
    held, _, _ = at_the_last_pass(penalty)
    gradients = 1 if penalty == STRONG else 0
    expected = 0 if penalty.direction.perturbs_adapted_layers else (1 + gradients) * own
    assert expected <= held - plain <= expected + 2 * SMALL + 4096  # small tensors that a forward pass might write, before and after it
    assert 2 * SMALL + 4096 < own < frozen / 10
