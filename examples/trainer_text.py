"""Gradient regularization in the Hugging Face ``Trainer``: a tiny transformer on real text, SAM against none.

python examples/trainer_text.py [--steps 60]
"""

import argparse
import tempfile

import torch
from transformers import TrainingArguments

import gradreg
from gradreg.integrations.transformers import RegularizedTrainer
from tiny_language import language_model, text, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps

    tokens = tokenizer()
    ids = torch.tensor(tokens(text())["input_ids"])
    pieces = [{"input_ids": piece, "labels": piece} for piece in ids[: len(ids) // 32 * 32].view(-1, 32)]
    for penalty in (None, gradreg.sam(rho=0.05)):
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                learning_rate=1e-2,
                save_strategy="no",
                eval_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                logging_strategy="no",
            )
            model = language_model(tokens)
            trainer = RegularizedTrainer(model, arguments, train_dataset=pieces[16:], eval_dataset=pieces[:16], penalty=penalty)
            training = trainer.train().training_loss
            held_out = trainer.evaluate()["eval_loss"]
        print(f"{penalty or 'no penalty'}: training loss {training:.3f}, held-out loss {held_out:.3f}")


if __name__ == "__main__":
    main()
