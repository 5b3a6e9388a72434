"""Accelerate's own loop, as ``examples/accelerate_loop.py`` has it: against a loop without Accelerate, and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import gradreg
from gradreg.torch import GradientRegularizer

from .digits import digits, largest_difference, network, weights

PENALTIES = {"none": None, "sam": gradreg.sam(rho=0.2), "fgr": gradreg.fgr(gamma=0.2, epsilon=0.4), "exact": gradreg.exact(gamma=0.1)}


class Loop:
    """Model, optimizer, schedule and regularizer under an ``Accelerator`` that accumulates two batches."""

    def __init__(self, penalty: Any, seed: int = 0) -> None:
        x, y = digits()
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = network(seed)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(sgd, 2, 0.8)
        data = DataLoader(TensorDataset(x[:320], y[:320]), batch_size=40)
        self.model, self.optimizer, self.schedule, self.data = self.accelerator.prepare(model, sgd, schedule, data)
        self.regularizer = GradientRegularizer(self.model, penalty)
        self.accelerator.register_for_checkpointing(self.regularizer)

    def train(self) -> None:
        closures: list[Callable[[], Tensor]] = []
        for i, (x, y) in enumerate(self.data):
            with self.accelerator.accumulate(self.model):
                closures.append(lambda x=x, y=y: cross_entropy(self.model(x), y))
                if self.accelerator.sync_gradients:
                    torch.manual_seed(i)
                    self.regularizer.backward(closures, backward=self.accelerator.backward, scaler=self.accelerator.scaler)
                    closures.clear()
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()


@pytest.mark.parametrize("name", PENALTIES)
def test_training_is_the_loop_without_accelerate(name: str):
    loop = Loop(PENALTIES[name])
    loop.train()
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(sgd, 2, 0.8)
    regularizer = GradientRegularizer(model, PENALTIES[name])
    x, y = digits()
    for i in range(0, 8, 2):
        torch.manual_seed(i + 1)
        both = [slice(40 * j, 40 * (j + 1)) for j in (i, i + 1)]
        regularizer.backward([lambda r=r: cross_entropy(model(x[r]), y[r]) / 2 for r in both])
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        sgd.step()
        schedule.step()
        sgd.zero_grad()
    assert largest_difference(weights(loop.model), weights(model)) <= 1e-6
    assert loop.optimizer.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path):
    penalty = gradreg.gnp(r=0.3, alpha=0.8).warmup("radius", steps=6)
    whole = Loop(penalty)
    whole.train()
    whole.accelerator.save_state(str(tmp_path))
    whole.train()
    resumed = Loop(penalty, seed=1)
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.regularizer.step == 4
    resumed.train()
    assert largest_difference(weights(resumed.model), weights(whole.model)) == 0.0
    assert resumed.regularizer.state_dict() == whole.regularizer.state_dict()
