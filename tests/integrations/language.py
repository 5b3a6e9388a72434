"""A short text, a word-level tokenizer made from it, and a tiny transformer with random weights: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = (Path(__file__).parent / "rules.txt").read_text()


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "<eos>", *sorted(set(TEXT.split()))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def tiny_llama(words: int, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=words, max_position_embeddings=64, **sizes, **special, **options))


def lines(length: int = 12) -> Dataset:
    """Blocks of the text, as token numbers that predict themselves."""
    numbers = tokenizer()(TEXT)["input_ids"]
    blocks = [numbers[i : i + length] for i in range(0, len(numbers) - length, length)]
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})
