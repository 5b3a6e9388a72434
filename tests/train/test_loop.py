"""The loop against a bare one, its determinism, and what it does with a run that diverges."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from gradreg.train import models
from gradreg.train.configuration import Config, OptimizerConfig, ScheduleConfig
from gradreg.train.data.configuration import DataConfig
from gradreg.train.data.loader import load
from gradreg.train.evaluation import evaluate
from gradreg.train.loop import train

SMALL = Config(
    data=DataConfig(train_size=250, label_noise=0.2),
    model={"name": "mlp", "hidden": [16]},
    optimizer=OptimizerConfig(lr=0.1),
    epochs=3,
    batch_size=100,
    threads=1,
    device="cpu",
)


def same(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


def test_the_norm_of_plain_gradients_is_measured_where_it_is_logged_and_nowhere_else(monkeypatch):
    from gradreg.torch import step

    measured, norm = [], step.gradient_norm
    monkeypatch.setattr(step, "gradient_norm", lambda gradients: measured.append(norm(gradients)) or measured[-1])
    history = train(replace(SMALL, epochs=2)).history
    assert [epoch.gradient_norm for epoch in history] == [float(value) for value in measured]


@pytest.mark.parametrize("rho", [None, 0.2])
def test_the_loop_equals_ten_lines_of_plain_pytorch(rho):
    config = replace(SMALL, penalty=None if rho is None else {"name": "sam", "rho": rho}, clip_norm=0.1, label_smoothing=0.1)
    torch.manual_seed(config.seed)
    sets = load(config.data, config.augmentation, seed=config.seed, device=torch.device("cpu"))
    model = models.create(config.model, classes=10, image_shape=(1, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step, total = 0, 9
    for epoch in range(1, config.epochs + 1):
        for batch in sets.train.batches(epoch, 100):
            x, y = batch.images, batch.labels
            optimizer.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * step / total)) / 2
            optimizer.zero_grad()
            cross_entropy(model(x), y, label_smoothing=0.1).backward()
            if rho is not None:
                held = [p.detach().clone() for p in model.parameters()]
                norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
                with torch.no_grad():
                    for p in model.parameters():
                        p.add_(rho * p.grad / norm)
                optimizer.zero_grad()
                cross_entropy(model(x), y, label_smoothing=0.1).backward()
                with torch.no_grad():
                    for p, h in zip(model.parameters(), held, strict=True):
                        p.copy_(h)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            step += 1
    trained = train(config)
    for ours, theirs in zip(trained.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    last = trained.history[-1]
    assert (last.step, last.gradient_evaluations) == (9, 9 if rho is None else 18)
    end = evaluate(model, sets.test)
    assert (last.test_loss, last.test_accuracy, last.test_top5) == pytest.approx((end.loss, end.accuracy, end.top5), rel=1e-4)


def test_the_same_configuration_gives_the_same_weights_and_another_seed_others():
    first, again, other = train(SMALL), train(SMALL), train(replace(SMALL, seed=1))
    assert same(first.model, again.model)
    assert not same(first.model, other.model)


def test_the_logged_loss_is_the_first_passs():
    penalised = train(replace(SMALL, epochs=1, batch_size=250, penalty={"name": "sam", "rho": 5.0}))
    assert penalised.history[0].train_loss == train(replace(SMALL, epochs=1, batch_size=250)).history[0].train_loss


def test_a_run_that_diverges_ends_early_and_says_so():
    config = replace(SMALL, optimizer=OptimizerConfig(lr=1e12), schedule=ScheduleConfig(name="constant"))
    outcome = train(config)
    assert outcome.diverged
    assert not outcome.history[-1].finite
    assert len(outcome.history) < config.epochs
    summary = outcome.summary()
    assert summary["diverged"]
    assert summary["test_accuracy"] is None


def test_a_loss_that_blew_up_but_stayed_finite_diverged_too():
    outcome = train(replace(SMALL, optimizer=OptimizerConfig(lr=1e3), epochs=1))
    assert outcome.history[-1].finite
    assert outcome.history[-1].train_loss > 2 * outcome.first_loss
    assert outcome.summary()["diverged"]


def test_evaluation_counts_every_example_once_in_evaluation_mode():
    split = load(SMALL.data, SMALL.augmentation, seed=0, device=torch.device("cpu")).test
    model = torch.nn.Sequential(models.create({"name": "mlp"}, classes=10, image_shape=(1, 8, 8)), torch.nn.Dropout(0.5)).train()
    whole = next(split.batches(len(split)))
    with torch.no_grad():
        logits = model[0](whole.images)
    found = evaluate(model, split, batch_size=100)
    assert found.accuracy == pytest.approx((logits.argmax(dim=1) == whole.labels).float().mean().item())
    assert found.top5 == pytest.approx((logits.topk(5).indices == whole.labels[:, None]).any(dim=1).float().mean().item())
    assert found.loss == pytest.approx(cross_entropy(logits, whole.labels).item(), rel=1e-5)
