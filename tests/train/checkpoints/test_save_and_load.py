"""What a checkpoint brings back, part by part: one that were forgotten would not show in every run."""

from __future__ import annotations

import random

import pytest
import torch

from gradreg.train.checkpoints.folders import Checkpoints
from gradreg.train.checkpoints.save_and_load import random_state, set_random_state
from gradreg.train.configuration import Config, OptimizerConfig, WeightDecayConfig
from gradreg.train.data.configuration import DataConfig
from gradreg.train.devices import Devices
from gradreg.train.loop import Run

SMALL = Config(
    data=DataConfig(train_size=120),
    model={"name": "mlp", "hidden": [16]},
    optimizer=OptimizerConfig(lr=0.1),
    epochs=2,
    batch_size=40,
    precision="fp16",
    ema=0.9,
    weight_decay=WeightDecayConfig(schedule="auto", measure_every=2),
    threads=1,
    device="cpu",
)


def test_random_numbers_go_on_where_they_stood():
    state = random_state()
    drawn = torch.rand(3), random.random()
    set_random_state(state)
    again = torch.rand(3), random.random()
    assert torch.equal(drawn[0], again[0])
    assert drawn[1] == again[1]


def test_everything_that_a_run_remembers_comes_back(tmp_path):
    devices = Devices(SMALL)
    before, after = Run(SMALL, devices), Run(SMALL, devices)
    before.train_epoch(None, None)
    before.state.scaler.update(512.0)
    before.state.save(Checkpoints(tmp_path, keep=1), devices)
    after.state.load(next(Checkpoints(tmp_path, keep=1).whole(pytest.fail)), devices)
    old, new = before.state, after.state
    assert new.scaler.get_scale() == old.scaler.get_scale() == 512.0
    assert new.regularizer.step == old.regularizer.step == 3
    assert new.weight_decay is not None
    assert old.weight_decay is not None
    assert new.weight_decay.state_dict() == old.weight_decay.state_dict()
    assert old.ema is not None
    assert new.ema is not None
    assert int(new.ema.n_averaged) == int(old.ema.n_averaged) == 3
    for name, expected in old.ema.module.state_dict().items():
        assert torch.equal(new.ema.module.state_dict()[name], expected), name
    assert new.progress.history == old.progress.history
    assert new.best is not None
    assert old.best is not None
    assert all(torch.equal(new.best[name], expected) for name, expected in old.best.items())
