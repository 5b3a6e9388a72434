"""Optimizers and schedules: what the keys promise is what the library's objects do."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import timm.optim
import torch

from gradreg.train.configuration import OptimizerConfig, ScheduleConfig


def rates(config: ScheduleConfig, *, epochs: int = 6, steps_per_epoch: int = 4) -> list[float]:
    optimizer = OptimizerConfig(lr=1.0).build(torch.nn.Linear(2, 2))
    schedule = config.build(optimizer, epochs=epochs, steps_per_epoch=steps_per_epoch)
    found = [optimizer.param_groups[0]["lr"]]
    for step in range(1, epochs * steps_per_epoch + 1):
        if schedule is not None:
            schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_cosine_falls_from_lr_to_the_minimum_every_step():
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 24)) / 2 for step in range(25)]
    assert rates(ScheduleConfig(name="cosine", min_lr=0.1)) == pytest.approx(expected)


def test_warmup_is_linear_from_zero():
    assert rates(ScheduleConfig(name="constant", warmup_epochs=2))[:9] == pytest.approx([step / 8 for step in range(9)])


def test_step_decays_at_its_epochs():
    found = rates(ScheduleConfig(name="step", decay_epochs=[2, 4], decay_rate=0.5))
    assert found[:7] == [1.0] * 7
    assert found[8:15] == [0.5] * 7
    assert found[16:] == [0.25] * 9


@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize(("steps_per_epoch", "end"), [(1, 0.0), (7, 0.0), (13, 0.01)])
def test_the_cosine_is_timms_number_for_number(warmup, steps_per_epoch, end):
    config = ScheduleConfig(name="cosine", warmup_epochs=warmup, min_lr=end)
    same = replace(config, options={"k_decay": 1.0})  # an option of timm's that changes nothing
    assert rates(config, epochs=5, steps_per_epoch=steps_per_epoch) == rates(same, epochs=5, steps_per_epoch=steps_per_epoch)


def test_the_cosine_scales_each_groups_rate_as_timms():
    found = []
    for options in ({}, {"k_decay": 1.0}):
        optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr_scale": 0.5, "lr": 0.2}, {"params": [torch.zeros(1)]}], lr=0.3)
        schedule = ScheduleConfig(warmup_epochs=1, options=options).build(optimizer, epochs=3, steps_per_epoch=2)
        rates = [[group["lr"] for group in optimizer.param_groups]]
        for step in range(1, 7):
            schedule.step_update(step)
            rates.append([group["lr"] for group in optimizer.param_groups])
        found.append((rates, [group["initial_lr"] for group in optimizer.param_groups]))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimizers_built_without_timm_are_timms(name):
    """Bit for bit, in their weights and in what a checkpoint holds of them."""
    found = []
    for build in (
        lambda model: OptimizerConfig(name=name, lr=0.1, nesterov=name == "sgd").build(model),
        lambda model: timm.optim.create_optimizer_v2(model, opt=name, lr=0.1, weight_decay=0.0, momentum=0.9),
    ):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
        model[0].weight.requires_grad_(False)
        optimizer = build(model)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(5, 3)).square().mean().backward()
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        found.append((optimizer, list(model.parameters())))
    ours, theirs = found
    assert type(theirs[0]) in type(ours[0]).__mro__
    assert all(torch.equal(p, q) for p, q in zip(ours[1], theirs[1], strict=True))
    torch.testing.assert_close(ours[0].state_dict(), theirs[0].state_dict(), rtol=0, atol=0)


def test_constant_stays():
    assert set(rates(ScheduleConfig(name="constant"))) == {1.0}


def test_sgd_follows_the_nesterov_key():
    for nesterov in (True, False):
        optimizer = OptimizerConfig(name="sgd", nesterov=nesterov).build(torch.nn.Linear(2, 2))
        assert optimizer.param_groups[0]["nesterov"] is nesterov


def test_adamw_and_decay_of_biases():
    optimizer = OptimizerConfig(name="adamw", lr=1e-3, weight_decay=0.1, decay_biases_and_norms=False).build(torch.nn.Linear(2, 2))
    assert type(optimizer) is torch.optim.AdamW
    decays = {len(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {2: 0.1, 1: 0.0}


def test_refused_options_are_named():
    with pytest.raises(ValueError, match=r"optimizer 'adamw' does not accept its options \{'betta': 1\}"):
        OptimizerConfig(name="adamw", options={"betta": 1}).build(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"optimizer.options.betas must be left out for 'sgd', which has none; got \[0.9, 0.95\]"):
        OptimizerConfig(name="sgd", options={"betas": [0.9, 0.95]}).build(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"optimizer.options.eps must be left out for 'lion', which has none; got 1e-06"):
        OptimizerConfig(name="lion", options={"eps": 1e-6}).build(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"optimizer.momentum must be in \[0, 1\); got 1.0"):
        OptimizerConfig(momentum=1.0)
    with pytest.raises(ValueError, match=r"optimizer.nesterov must be false for 'adamw'"):
        OptimizerConfig(name="adamw", nesterov=True).build(torch.nn.Linear(2, 2))


def test_optimizers_of_torch_by_their_class():
    optimizer = OptimizerConfig(name="torch.RMSprop", lr=0.2, momentum=0.5, options={"alpha": 0.8}).build(torch.nn.Linear(2, 2))
    assert type(optimizer) is torch.optim.RMSprop
    assert {key: optimizer.param_groups[0][key] for key in ("lr", "momentum", "alpha")} == {"lr": 0.2, "momentum": 0.5, "alpha": 0.8}
    spared = OptimizerConfig(name="torch.ASGD", lr=0.2, weight_decay=0.1, decay_biases_and_norms=False)
    groups = spared.build(torch.nn.Linear(2, 2)).param_groups
    assert {len(p.shape): group["weight_decay"] for group in groups for p in group["params"]} == {2: 0.1, 1: 0.0}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (OptimizerConfig(name="torch.RMSProp"), "unknown optimizer 'torch.RMSProp'. Did you mean 'torch.RMSprop'"),
        (OptimizerConfig(name="torch.LBFGS"), "unknown optimizer 'torch.LBFGS'"),
        (OptimizerConfig(name="torch.Adam", nesterov=True), "optimizer.nesterov must be false for 'torch.Adam', which does not know it"),
        (
            OptimizerConfig(name="torch.Rprop", weight_decay=0.1),
            "optimizer.weight_decay must be 0 for 'torch.Rprop', which has none; got 0.1",
        ),
        (OptimizerConfig(name="torch.Adam", options={"beta": 1}), "does not accept its options {'beta': 1}"),
    ],
)
def test_what_an_optimizer_of_torch_refuses_is_said(config, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        config.build(torch.nn.Linear(2, 2))
