"""Stopped in the middle and continued from a checkpoint, training gives the weights of an uninterrupted run, bit for bit."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradreg import GradientPenalty
from gradreg.torch import GradientRegularizer

from .cases import (
    assert_same_bits,
    each_trait,
    every_penalty,
    values,
)

STEPS, STOP = 8, 3


class Training:
    """Everything that a training script keeps: model with dropout and BatchNorm, AdamW, schedule, loss scaler, regularizer."""

    def __init__(self, penalty: GradientPenalty, scaled: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=scaled)
        self.regularizer = GradientRegularizer(self.model, penalty)

    def train(self, first: int, last: int) -> list[Tensor]:
        losses = []
        for step in range(first, last):
            batch = torch.Generator().manual_seed(step)
            x, y = torch.randn(16, 5, generator=batch), torch.randint(0, 3, (16,), generator=batch)
            self.optimizer.zero_grad()
            losses.append(
                self.regularizer.backward(lambda x=x, y=y: nn.functional.cross_entropy(self.model(x), y), scaler=self.scaler)  # type: ignore[misc]
            )
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.scaler.step(self.optimizer)
            self.regularizer.decoupled_step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
        return losses

    def parts(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in ("model", "optimizer", "scheduler", "scaler", "regularizer")}

    def save(self) -> bytes:
        file = io.BytesIO()
        state = {n: part.state_dict() for n, part in self.parts().items()}
        torch.save({**state, "rng": torch.get_rng_state()}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        torch.set_rng_state(state.pop("rng"))
        for name, part in self.parts().items():
            part.load_state_dict(state[name])


@every_penalty
def test_resume_while_a_layer_is_frozen_that_was_trained_and_will_be(penalty: GradientPenalty) -> None:
    def unfreeze_on_the_way(training: Training) -> None:
        training.train(STOP, 4)
        training.model[0].requires_grad_(True)
        training.train(4, STEPS)

    straight = Training(penalty, scaled=False)
    straight.train(0, 2)
    straight.model[0].requires_grad_(False)
    straight.train(2, STOP)
    saved = straight.save()
    unfreeze_on_the_way(straight)
    resumed = Training(penalty, scaled=False)
    resumed.model[0].requires_grad_(False)
    resumed.load(saved)
    unfreeze_on_the_way(resumed)
    assert_same_bits(values(resumed.model), values(straight.model))


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
@each_trait
def test_resume(penalty: GradientPenalty, scaled: bool) -> None:
    straight = Training(penalty, scaled)
    straight.train(0, STOP)
    saved = straight.save()
    losses = straight.train(STOP, STEPS)

    resumed = Training(penalty, scaled)
    resumed.load(saved)
    assert resumed.train(STOP, STEPS) == losses
    assert_same_bits(values(resumed.model), values(straight.model))
    assert resumed.regularizer.metrics.evaluations == straight.regularizer.metrics.evaluations
    assert resumed.scaler.get_scale() == straight.scaler.get_scale()
