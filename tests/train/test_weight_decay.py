"""Weight decay in recipes: what the loop sets at each step, what it measures for AutoL2, and what it logs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from gradreg import AutoL2, Cosine
from gradreg.train import models
from gradreg.train.configuration import Config, OptimizerConfig, ScheduleConfig, WeightDecayConfig
from gradreg.train.data.configuration import DataConfig
from gradreg.train.data.loader import load
from gradreg.train.loop import train
from gradreg.train.recipe import configuration

SMALL = Config(
    data=DataConfig(train_size=240, validation=40),
    model={"name": "mlp", "hidden": [16]},
    optimizer=OptimizerConfig(lr=0.1),
    schedule=ScheduleConfig(name="constant"),
    epochs=5,
    batch_size=40,
    threads=1,
    device="cpu",
)  # 5 steps an epoch


def reference(config: Config, coefficient: Any) -> tuple[list[torch.Tensor], list[float]]:
    """The weights and the coefficients of a bare loop in which ``coefficient(step, loss, accuracy)`` is SGD's weight decay."""
    torch.manual_seed(config.seed)
    sets = load(config.data, config.augmentation, seed=config.seed, device=torch.device("cpu"))
    model = models.create(config.model, classes=10, image_shape=(1, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    used: list[float] = []
    for epoch in range(1, config.epochs + 1):
        for batch in sets.train.batches(epoch, config.batch_size):
            x, y = batch.images, batch.labels
            logits = model(x)
            loss = cross_entropy(logits, y)
            used.append(coefficient(len(used), loss.item(), (logits.argmax(1) == y).float().mean().item()))
            optimizer.param_groups[0]["weight_decay"] = used[-1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [p.detach() for p in model.parameters()], used


@pytest.mark.parametrize(
    ("settings", "coefficient"),
    [
        (WeightDecayConfig(start=0.02), lambda step, *_: 0.02),
        (WeightDecayConfig(schedule="cosine", start=0.05, end=0.01), lambda step, *_: Cosine(start=0.05, end=0.01, steps=24)(step)),
        (WeightDecayConfig(schedule="log-time", start=0.05, t0_epochs=2), lambda step, *_: 0.05 * 10 / (10 + step)),
        (WeightDecayConfig(schedule="auto", start=0.5, measure_every=2), AutoL2(initial=0.5, measure_every=2).update),
        (
            WeightDecayConfig(schedule="auto", start=0.5, measure_every=1, trigger="loss", learning_rate_aware=True, refractory=1.0),
            AutoL2(initial=0.5, measure_every=1, trigger="loss", learning_rate=0.1 / (1 - 0.9), refractory=1.0).update,
        ),
    ],
    ids=["constant", "cosine", "log-time", "auto", "auto on the clock"],
)
def test_the_loop_decays_as_a_bare_one(settings, coefficient):
    weights, used = reference(SMALL, coefficient)
    assert (settings.schedule == "constant") == (len(set(used)) == 1)
    outcome = train(replace(SMALL, weight_decay=settings))
    for ours, theirs in zip(outcome.model.parameters(), weights, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-4, atol=1e-6)
    assert [epoch.weight_decay for epoch in outcome.history] == pytest.approx(used[4::5])


def test_auto_moves_and_is_seen_to():
    outcome = train(replace(SMALL, epochs=12, weight_decay=WeightDecayConfig(schedule="auto", measure_every=2)))
    seen = [epoch.weight_decay for epoch in outcome.history]
    assert seen[0] == 0.1
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < 0.1


def test_authors_convention_scales_to_the_classes():
    outcome = train(replace(SMALL, epochs=1, weight_decay=WeightDecayConfig(schedule="auto", start=0.01, convention="authors")))
    assert outcome.history[0].weight_decay == pytest.approx(2 * 10 * 0.01)


def test_lr_squared_follows_the_learning_rate():
    config = replace(
        SMALL,
        schedule=ScheduleConfig(name="cosine"),
        optimizer=OptimizerConfig(lr=0.1, weight_decay=0.01),
        weight_decay=WeightDecayConfig(schedule="lr-squared"),
    )
    outcome = train(config)
    rates = [0.1 * (1 + math.cos(math.pi * step / 25)) / 2 for step in range(25)]
    assert [epoch.weight_decay for epoch in outcome.history] == pytest.approx([0.01 * rate / 0.1 for rate in rates[4::5]])


def test_biases_without_decay_stay_without():
    options = {"lr": 0.1, "momentum": 0.0, "decay_biases_and_norms": False}
    plain = train(replace(SMALL, epochs=1, optimizer=OptimizerConfig(**options)))
    decayed = train(replace(SMALL, epochs=1, optimizer=OptimizerConfig(**options), weight_decay=WeightDecayConfig(start=1.0)))
    constant = train(replace(SMALL, epochs=1, optimizer=OptimizerConfig(**options, weight_decay=1.0)))
    for a, b in zip(decayed.model.parameters(), constant.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(next(plain.model.parameters()), next(decayed.model.parameters()))


def test_cautious_decay_differs_from_plain_and_logs_its_coefficient():
    plain = train(replace(SMALL, epochs=1, weight_decay=WeightDecayConfig(start=0.3)))
    cautious = train(replace(SMALL, epochs=1, weight_decay=WeightDecayConfig(start=0.3, cautious=True)))
    assert cautious.history[0].weight_decay == 0.3
    norms = [sum(p.square().sum().item() for p in outcome.model.parameters()) for outcome in (plain, cautious)]
    assert norms[1] > norms[0]


def test_validation_is_logged_and_plain_runs_log_their_constant():
    outcome = train(replace(SMALL, epochs=1, optimizer=OptimizerConfig(lr=0.1, weight_decay=1e-3)))
    last = outcome.history[-1]
    assert last.weight_decay == 1e-3
    assert last.validation_accuracy is not None
    assert 0.0 <= last.validation_accuracy <= 1.0
    assert (last.validation_accuracy * 40) % 1 == pytest.approx(0.0, abs=1e-6)
    without = train(replace(SMALL, epochs=1, data=DataConfig(train_size=240)))
    assert (without.history[-1].validation_loss, without.history[-1].validation_accuracy) == (None, None)


def test_a_run_that_diverges_under_auto_ends_as_diverged():
    outcome = train(replace(SMALL, optimizer=OptimizerConfig(lr=1e6), weight_decay=WeightDecayConfig(schedule="auto", measure_every=1)))
    assert outcome.diverged


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weight_decay": {"start": -0.1}}, r"weight_decay.start must be finite and >= 0; got -0.1"),
        ({"weight_decay": {"schedule": "auto", "refractory": 0.0}}, r"weight_decay.refractory must be finite and > 0; got 0.0"),
        ({"weight_decay": {"schedule": "auto", "start": 0.0}}, r"weight_decay.start must be finite and > 0; got 0.0"),
        ({"weight_decay": {"schedule": "auto"}, "optimizer": {"weight_decay": 0.001}}, r"optimizer.weight_decay must be 0 with .*'auto'"),
        ({"weight_decay": {"schedule": "cosine"}}, r"weight_decay.start must be > 0 for schedule 'cosine'; got None"),
        ({"weight_decay": {"schedule": "cosine", "start": 0.1, "end": -0.1}}, r"weight_decay.end must be finite and >= 0; got -0.1"),
        (
            {"weight_decay": {"convention": "authors", "start": 0.1}},
            r"weight_decay.convention must be 'torch' unless the schedule is 'auto'",
        ),
        ({"weight_decay": {"schedule": "cosin"}}, r"cosin"),
    ],
)
def test_bad_weight_decays_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        configuration(keys)
