"""A ``Trainer`` on the text that is at hand, whose training a loop by hand can repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

import gradreg
from gradreg.integrations.transformers import RegularizedTrainer, RegularizedTrainerMixin

from .text import examples, language_model

FGR = gradreg.fgr(gamma=0.2, epsilon=0.4)
SAM = gradreg.sam(rho=0.3)


class SeedsEachStep(TrainerCallback):
    """So that the dropout masks of a step are the same wherever it is taken."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(state.global_step)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    chosen: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    return TrainingArguments(str(folder), **chosen)


def optimizers(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    sgd = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    return sgd, torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 0.9**step)


def trained(folder: Path, penalty: Any, *, trainer_class: Any = RegularizedTrainer, model: Any = None, **options: Any) -> Any:
    model = language_model() if model is None else model
    own = {"penalty": penalty} if issubclass(trainer_class, RegularizedTrainerMixin) else {}
    own |= {name: options.pop(name) for name in ("parameters", "scope") if name in options}
    resume = options.pop("resume", None)
    data = options.pop("data", None) or examples()
    trainer = trainer_class(
        model=model,
        args=arguments(folder, **options),
        train_dataset=data,
        optimizers=optimizers(model),
        callbacks=[SeedsEachStep()],
        **own,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer
