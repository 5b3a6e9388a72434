"""A text that is at hand wherever the tests run, a tokenizer made from it on the spot, and a tiny transformer with random weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LENGTH = 32


@cache
def text() -> str:
    """The descriptions of scikit-learn's data sets: about 14,000 characters of English."""
    return "\n".join(str(load()["DESCR"]) for load in (load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine))


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A word tokenizer of 300 entries."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    words.train_from_iterator([text()], trainers.WordLevelTrainer(vocab_size=300, special_tokens=["<pad>", "<eos>", "<unk>"]))  # type: ignore[call-arg]
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left")


@cache
def examples(count: int = 48, *, padded: bool = True) -> list[dict[str, Tensor]]:
    """Pieces of the text of 32 tokens; if ``padded`` their labels end early, each elsewhere, so that token counts differ."""
    ids = torch.tensor(tokenizer()(text())["input_ids"])
    pieces = ids[: count * LENGTH].view(count, LENGTH)
    found = []
    for i, piece in enumerate(pieces):
        labels = piece.clone()
        if padded:
            labels[LENGTH - (5 * i) % 20 :] = -100
        found.append({"input_ids": piece, "labels": labels, "attention_mask": torch.ones_like(piece)})
    return found


def language_model(seed: int = 0, *, dropout: float = 0.1, **options: Any) -> LlamaForCausalLM:
    """A Llama of two layers and 32 dimensions."""
    torch.manual_seed(seed)
    t = tokenizer()
    sizes: dict[str, Any] = {
        "vocab_size": len(t),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "attention_dropout": dropout,
        "pad_token_id": t.pad_token_id,
        "eos_token_id": t.eos_token_id,
        "bos_token_id": t.eos_token_id,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))
