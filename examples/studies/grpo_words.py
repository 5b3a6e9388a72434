"""Does a penalty help GRPO? A tiny Llama, a rule for a reward, and the reward of held-out prompts as the metric.

    gradreg compare examples/studies/grpo_words.py --penalties none fgr:gamma=0.01,epsilon=0.001 sam:rho=0.01

The reward is the share of words that start with a letter before m. The embeddings and the output head are not perturbed.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.utils import logging
from trl import GRPOConfig

from gradreg import study
from gradreg.integrations.trl import RegularizedGRPOTrainer, without_embeddings

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_language import language_model, text, tokenizer

logging.set_verbosity_error()


def early_letters(completions: list[str], **_: Any) -> list[float]:
    """The share of words that start with a letter before m."""
    return [sum(word[0] < "m" for word in c.split()) / max(1, len(c.split())) for c in completions]


@torch.no_grad()
def reward(model: Any, tokens: Any, prompts: list[str], seed: int) -> float:
    """The mean reward of one sampled completion for each prompt."""
    torch.manual_seed(seed)
    batch = tokens(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    written = model.generate(**batch, do_sample=True, max_new_tokens=12, pad_token_id=tokens.pad_token_id)
    completions = tokens.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    found = early_letters(completions)
    return sum(found) / len(found)


@study.task(metric="reward", mode="max")
def train(run: study.Run, *, steps: int = 30, lr: float = 0.01, batch_size: int = 8) -> None:
    """A rule for a reward, a Llama of two layers trained by GRPO."""
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    tokens = tokenizer()
    words = text().split()
    prompts = [" ".join(words[i : i + 6]) for i in range(0, 1024, 8)]
    model = language_model(tokens, seed=run.seed)
    arguments = GRPOConfig(
        str(run.folder / "trainer"),
        max_steps=len(run.steps(steps)),
        per_device_train_batch_size=batch_size,
        num_generations=batch_size,
        max_completion_length=12,
        beta=0.0,
        learning_rate=lr,
        seed=run.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = RegularizedGRPOTrainer(
        model,
        early_letters,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts[:64]]),
        processing_class=tokens,
        penalty=run.penalty,
        parameters=without_embeddings(model),
    )
    run.count(trainer, steps=lambda: trainer.state.global_step)
    trainer.train()
    model.eval()
    with torch.no_grad():
        loss = -torch.log_softmax(model(**tokens(prompts[64], return_tensors="pt", return_token_type_ids=False)).logits, -1).mean()
    run.log(
        loss=loss,
        validation_reward=reward(model, tokens, prompts[64:96], run.seed),
        test_reward=reward(model, tokens, prompts[96:], run.seed),
    )
