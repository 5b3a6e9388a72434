"""Hugging Face: a tiny transformer learns the characters of this file, with a penalty made once for four micro-batches.

python examples/transformers_text.py
"""

from pathlib import Path

from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import gradreg
from gradreg.integrations.transformers import GradientRegularizationMixin, except_embeddings


class RegularizedTrainer(GradientRegularizationMixin, Trainer):
    """The Trainer, with three more arguments."""


text = Path(__file__).read_bytes()
blocks = [list(text[i : i + 32]) for i in range(0, len(text) - 32, 8)]
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32
    )
)
trainer = RegularizedTrainer(
    model=model,
    args=TrainingArguments(
        output_dir="runs/transformers_text",
        max_steps=20,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        learning_rate=5e-3,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    ),
    train_dataset=Dataset.from_dict({"input_ids": blocks, "labels": blocks}),
    penalty=gradreg.fgr(gamma=1e-2, epsilon=1e-3),
    parameters=except_embeddings(model),
)
trainer.train()
print(dict(trainer.regularizer.metrics))
