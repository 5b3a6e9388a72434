"""F-GR in TRL's GRPO, as the alternative to the KL penalty: a tiny transformer and a rule for a reward, penalty off and on.

    python examples/grpo_reward.py [--steps 20]

The setting is that of arXiv 2602.18037: no KL term (beta 0), strength 1e-2, epsilon 1e-3, embeddings and output head not perturbed.
"""

import argparse
import tempfile
import warnings
from typing import Any

from datasets import Dataset
from trl import GRPOConfig

from gradreg.integrations.trl import RegularizedGRPOTrainer, against_reward_hacking, without_embeddings
from tiny_language import language_model, text, tokenizer


def early_letters(completions: list[str], **_: Any) -> list[float]:
    """The rule: the share of words that start with a letter before m."""
    return [sum(word[0] < "m" for word in c.split()) / max(1, len(c.split())) for c in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)

    words = text().split()
    prompts = Dataset.from_list([{"prompt": " ".join(words[i : i + 6])} for i in range(0, 512, 8)])
    for penalty in (None, against_reward_hacking()):
        tokens = tokenizer()
        model = language_model(tokens)
        with tempfile.TemporaryDirectory() as folder:
            arguments = GRPOConfig(
                folder,
                max_steps=steps,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                num_generations=8,
                max_completion_length=12,
                beta=0.0,
                learning_rate=1e-2,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
            )
            trainer = RegularizedGRPOTrainer(
                model,
                early_letters,
                args=arguments,
                train_dataset=prompts,
                processing_class=tokens,
                penalty=penalty,
                perturbed=without_embeddings(model),
            )
            trainer.train()
        log = trainer.state.log_history
        print(f"{penalty or 'no penalty'}: reward {log[0]['reward']:.3f} at the first step, {log[-2]['reward']:.3f} at the last")


if __name__ == "__main__":
    main()
