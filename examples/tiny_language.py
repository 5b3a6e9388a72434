"""What the language-model examples share: a text that comes with scikit-learn, a word tokenizer, and a tiny Llama with random weights."""

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def text() -> str:
    """The descriptions of scikit-learn's data sets."""
    return "\n".join(str(load()["DESCR"]) for load in (load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine))


def tokenizer() -> PreTrainedTokenizerFast:
    """The 300 most frequent words."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    words.train_from_iterator([text()], trainers.WordLevelTrainer(vocab_size=300, special_tokens=["<pad>", "<eos>", "<unk>"]))  # type: ignore[call-arg]
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left")


def language_model(tokens: PreTrainedTokenizerFast, *, seed: int = 0) -> LlamaForCausalLM:
    """Two layers of 32 dimensions, initialized from ``seed``."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokens.pad_token_id,
        eos_token_id=tokens.eos_token_id,
        bos_token_id=tokens.eos_token_id,
    )
    return LlamaForCausalLM(config)
