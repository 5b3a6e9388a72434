"""``RegularizedTrainer`` above a ``training_step`` of one's own: what scales the loss is right, what does more is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import Trainer as PlainTrainer
from transformers import TrainerCallback

from gradreg.integrations.transformers import RegularizedTrainer, RegularizedTrainerMixin

from .digits import largest_difference, weights
from .text import examples, language_model
from .trainers import FGR, SAM, arguments, trained


class AddsTerm(PlainTrainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = self.compute_loss(model, self._prepare_inputs(inputs)) + 1e-2 * sum(p.abs().sum() for p in model.parameters())
        self.accelerator.backward(loss / 3)
        return loss.detach()


class AddsNumber(PlainTrainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss.square())
        return loss.detach()


class TwoLosses(PlainTrainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs) + self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


class TwoPasses(PlainTrainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss, retain_graph=True)
        self.accelerator.backward(loss)
        return loss.detach()


class Pairs(PlainTrainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        first = super().training_step(model, inputs, num_items_in_batch)
        return first + super().training_step(model, inputs, num_items_in_batch)


class OwnLoss(PlainTrainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


class Backwards(PlainTrainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss.backward()
        return loss.detach()


class Outputs(PlainTrainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        self.accelerator.backward(loss + outputs.logits.square().mean())
        return loss.detach()


DO_MORE = {
    AddsTerm: "adds a term that depends on parameters",
    AddsNumber: "does more with the loss of compute_loss than multiply it by a number",
    TwoLosses: "calls compute_loss more than once",
    TwoPasses: "runs more than one backward pass",
    Pairs: "(calls compute_loss more than once|runs more than one backward pass)",
    OwnLoss: "computes its loss without compute_loss",
    Backwards: r"does not call accelerator\.backward",
    Outputs: "uses the outputs of compute_loss",
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("penalty", [None, SAM], ids=["none", "sam"])
@pytest.mark.parametrize("beneath", DO_MORE)
def test_a_training_step_that_does_more_than_scale_a_loss_is_noticed(beneath: Any, penalty: Any, accumulate: int, tmp_path: Path):
    class Mixed(RegularizedTrainerMixin, beneath):
        pass

    model = language_model()
    with pytest.raises(ValueError, match=f"training_step must scale the loss of one call of compute_loss.*{DO_MORE[beneath]}"):
        trained(tmp_path, penalty, model=model, trainer_class=Mixed, gradient_accumulation_steps=accumulate)
    assert largest_difference(weights(model), weights(language_model())) == 0.0


def test_pairs_made_above_the_mixin_are_noticed(tmp_path: Path):
    class Above(RegularizedTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            first = super().training_step(*args, **kwargs)
            return first + super().training_step(*args, **kwargs)

    with pytest.raises(ValueError, match=r"got one that calls the training_step beneath it more than once"):
        trained(tmp_path, SAM, trainer_class=Above, gradient_accumulation_steps=1)


def test_an_update_that_is_skipped_and_not_counted_is_no_second_training_step(tmp_path: Path):
    """Where ``global_step`` stays if a loss scale skips an update."""

    class Skipped(TrainerCallback):
        left = 1

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.global_step -= self.left
            self.left = 0

    trainer = RegularizedTrainer(
        model=language_model(), args=arguments(tmp_path, max_steps=3), train_dataset=examples(), callbacks=[Skipped()], penalty=SAM
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.regularizer is not None
    assert trainer.regularizer.metrics.evaluations == 2 * 4


def test_a_training_step_may_scale_the_loss(tmp_path: Path):
    class Halves(PlainTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            share = (inputs["labels"] != -100).float().mean()  # depends on the data, not on parameters
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch) * share
            self.accelerator.backward(loss)
            return loss.detach()

    class Inside(RegularizedTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, inputs, *args, **kwargs) * (inputs["labels"] != -100).float().mean()

    class Mixed(RegularizedTrainerMixin, Halves):
        pass

    mixed, inside = (trained(tmp_path, FGR, trainer_class=c, max_steps=2) for c in (Mixed, Inside))
    assert largest_difference(weights(mixed.model), weights(inside.model)) <= 1e-6
    assert largest_difference(weights(mixed.model), weights(language_model())) > 1e-4
