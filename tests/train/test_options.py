"""What a configuration can turn on around the bare step: averages, precision, micro-batches, compilation, L2 in the loss, flooding."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

import gradreg
from gradreg import HeldOut
from gradreg.torch import GradientRegularizer
from gradreg.train.configuration import Config, OptimizerConfig, ScheduleConfig
from gradreg.train.data.configuration import DataConfig
from gradreg.train.devices import Devices
from gradreg.train.loop import Run, train
from gradreg.train.optimization import HarmfulPenalty
from gradreg.train.outcome import Outcome
from gradreg.train.penalty import RecipePenalty

SMALL = Config(
    data=DataConfig(train_size=250, label_noise=0.2),
    model={"name": "mlp", "hidden": [16]},
    optimizer=OptimizerConfig(lr=0.1),
    epochs=2,
    batch_size=100,
    precision="fp64",
    threads=1,
    device="cpu",
)
SAM = {"name": "sam", "rho": 0.2}


def assert_close(left: Outcome, right: Outcome, tolerance: float = 1e-12) -> None:
    for ours, theirs in zip(left.model.parameters(), right.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("penalty", [None, SAM], ids=["plain", "sam"])
def test_micro_batches_change_nothing_but_memory(penalty):
    whole = train(replace(SMALL, penalty=penalty))
    divided = train(replace(SMALL, penalty=penalty, accumulation=3))
    assert_close(divided, whole)
    assert divided.history[-1].train_loss == pytest.approx(whole.history[-1].train_loss, abs=1e-12)


@pytest.mark.parametrize("model", [{"name": "mlp", "hidden": [16]}, {"name": "test_resnet"}], ids=["mlp", "BatchNorm"])
def test_the_ema_is_the_running_mean_of_the_weights_and_statistics(model):
    seen: list[dict[str, torch.Tensor]] = []

    def keep(step: int, trained: torch.nn.Module, _: object) -> None:
        seen.append({name: t.clone() for name, t in trained.state_dict().items() if t.is_floating_point()})

    outcome = train(replace(SMALL, model=model, ema=0.8), on_step=keep)
    expected = seen[0]
    for weights in seen[1:]:
        expected = {name: 0.8 * mean + 0.2 * weights[name] for name, mean in expected.items()}
    assert outcome.ema is not None
    for name, mean in expected.items():
        torch.testing.assert_close(outcome.ema.state_dict()[name], mean, rtol=0, atol=1e-12)
    assert outcome.history[-1].ema_test_loss != outcome.history[-1].test_loss


def test_a_decoupled_penalty_moves_the_weights_beside_the_optimizer():
    """With plain SGD that makes no difference, with momentum it does."""

    def run(momentum: float, *, decoupled: bool) -> Outcome:
        optimizer = OptimizerConfig(lr=0.1, momentum=momentum)
        return train(replace(SMALL, optimizer=optimizer, penalty={"name": "wsam", "rho": 0.3, "gamma": 0.6, "decoupled": decoupled}))

    assert_close(run(0.0, decoupled=True), run(0.0, decoupled=False))
    with pytest.raises(AssertionError, match="not close"):
        assert_close(run(0.9, decoupled=True), run(0.9, decoupled=False), tolerance=1e-4)


def test_l2_in_the_loss_is_weight_decay_for_plain_sgd_and_enters_the_direction_of_a_penalty():
    def run(penalty: dict[str, object] | None, *, in_loss: bool) -> Outcome:
        where = {"l2_in_loss": 0.05} if in_loss else {"weight_decay": 0.05}
        return train(replace(SMALL, penalty=penalty, optimizer=OptimizerConfig(lr=0.1, **where)))

    assert_close(run(None, in_loss=True), run(None, in_loss=False))
    with pytest.raises(AssertionError, match="not close"):
        assert_close(run(SAM, in_loss=True), run(SAM, in_loss=False), tolerance=1e-4)


def test_l2_enters_the_loss_once_whatever_the_micro_batches():
    config = replace(SMALL, optimizer=OptimizerConfig(lr=0.1, l2_in_loss=0.3), penalty=SAM)
    assert_close(train(replace(config, accumulation=3)), train(config))


def test_l2_in_the_loss_under_sam_by_hand():
    config = replace(SMALL, epochs=1, batch_size=250, penalty=SAM, optimizer=OptimizerConfig(lr=0.1, momentum=0.0, l2_in_loss=0.3))
    from gradreg.train import models
    from gradreg.train.data.loader import load

    torch.manual_seed(config.seed)
    batch = next(load(config.data, config.augmentation, seed=0, device=torch.device("cpu")).train.batches(1, 250))
    model = models.create(config.model, classes=10, image_shape=(1, 8, 8)).double()

    def gradient() -> list[torch.Tensor]:
        loss = cross_entropy(model(batch.images.double()), batch.labels) + 0.15 * sum(p.square().sum() for p in model.parameters())
        return list(torch.autograd.grad(loss, list(model.parameters())))

    start = [p.detach().clone() for p in model.parameters()]
    first = gradient()
    norm = torch.cat([g.flatten() for g in first]).norm()
    with torch.no_grad():
        for p, g in zip(model.parameters(), first, strict=True):
            p.add_(0.2 * g / norm)
    for ours, before, g in zip(train(config).model.parameters(), start, gradient(), strict=True):
        torch.testing.assert_close(ours, before - 0.1 * g, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "tanh", "poly", "step", "wsd", "rsqrt"])
def test_optimizers_and_schedules_from_end_to_end(name, schedule):
    lr = 0.1 if name == "sgd" else 3e-3
    outcome = train(
        replace(
            SMALL,
            epochs=4,
            optimizer=OptimizerConfig(name=name, lr=lr, nesterov=name == "sgd", weight_decay=1e-3, decay_biases_and_norms=False),
            schedule=ScheduleConfig(name=schedule, warmup_epochs=1, decay_epochs=[2] if schedule == "step" else []),
        )
    )
    rates = [epoch.lr for epoch in outcome.history]
    assert rates[0] == pytest.approx(lr, rel=0.2)
    assert (rates[-1] == lr) == (schedule == "constant")
    assert all(math.isfinite(epoch.train_loss) for epoch in outcome.history)
    assert outcome.history[-1].train_loss < outcome.first_loss


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_with_weights_in_fp32(precision):
    outcome = train(replace(SMALL, precision=precision, penalty={"name": "fgr", "gamma": 0.1, "epsilon": 0.1}, clip_norm=5.0, epochs=20))
    assert all(p.dtype == torch.float32 for p in outcome.model.parameters())
    assert outcome.history[-1].train_loss < 0.8 * outcome.first_loss
    exact = train(replace(SMALL, penalty={"name": "fgr", "gamma": 0.1, "epsilon": 0.1}, clip_norm=5.0, epochs=20))
    assert outcome.history[-1].train_loss == pytest.approx(exact.history[-1].train_loss, rel=0.05)


def test_a_compiled_model_trains_the_same():
    config = replace(SMALL, epochs=1, penalty=SAM)
    assert_close(train(replace(config, compile=True)), train(config), tolerance=1e-9)


def test_channels_last_changes_the_layout_alone():
    config = replace(SMALL, model={"name": "test_resnet"}, epochs=1, data=DataConfig(train_size=64), batch_size=32)
    last = train(replace(config, channels_last=True))
    assert any(p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) for p in last.model.parameters())
    assert_close(last, train(config), tolerance=1e-9)


def test_ascent_on_a_part_of_each_batch_costs_its_part():
    penalty = {"name": "fgr", "gamma": 0.5, "epsilon": 0.5, "ascent_fraction": 0.25}
    outcome = train(replace(SMALL, data=DataConfig(train_size=200), penalty=penalty, epochs=1))
    assert outcome.history[-1].gradient_evaluations == 2 * 1.25


@pytest.mark.parametrize("kind", ["batch", "individual"])
def test_flooding_keeps_the_training_loss_from_falling_below_its_level(kind):
    config = replace(SMALL, epochs=40, data=DataConfig(train_size=250), batch_size=250)
    dry = train(config)
    flooded = train(replace(config, flooding={"name": kind, "level": 2.0}))
    assert dry.history[-1].test_loss < 1.6
    assert 1.9 < flooded.history[-1].test_loss < 2.2
    assert_close(train(replace(config, flooding={"name": kind, "level": 0.0})), dry)


def test_bad_flooding_is_refused_in_words():
    with pytest.raises(ValueError, match="unknown flooding 'deep'"):
        replace(SMALL, flooding={"name": "deep", "level": 1.0})
    with pytest.raises(ValueError, match="flooding must have a name, batch or individual"):
        replace(SMALL, flooding={"level": 1.0})


def test_a_warm_up_may_be_counted_in_epochs():
    by_epochs = train(replace(SMALL, penalty={**SAM, "warmup": {"kind": "zero", "epochs": 1}}))
    by_steps = train(replace(SMALL, penalty={**SAM, "warmup": {"kind": "zero", "steps": 3}}))
    assert_close(by_epochs, by_steps, tolerance=0.0)
    assert [epoch.gradient_evaluations for epoch in by_epochs.history] == [3, 9]


def test_a_tail_is_a_share_of_the_run():
    """Of 2 epochs of 3 steps the last third are 2."""
    late = train(replace(SMALL, penalty={**SAM, "tail": 1 / 3}))
    by_steps = train(replace(SMALL, penalty={**SAM, "warmup": {"kind": "zero", "steps": 4}}))
    assert_close(late, by_steps, tolerance=0.0)
    assert [epoch.gradient_evaluations for epoch in late.history] == [3, 8]


@pytest.mark.parametrize(
    "more", [{"tail": 0.01}, {"warmup": {"kind": "zero", "epochs": 2}}, {"warmup": {"kind": "zero", "steps": 6}, "tail": 0.5}]
)
def test_a_run_without_a_regularized_step_is_an_error(more):
    with pytest.raises(ValueError, match=r"^penalty: a penalty must act at a step of the run, of which there are 6; got SAM"):
        train(replace(SMALL, penalty={**SAM, **more}))


def test_every_group_of_m_samples_has_a_perturbation_of_its_own():
    """Groups of 4 of 16 images: the mean of the SAM gradients of each, their share of L2 in the loss among it."""
    config = replace(
        SMALL, data=DataConfig(train_size=16), batch_size=16, epochs=1, precision="fp64", optimizer=OptimizerConfig(lr=0.1, l2_in_loss=0.3)
    )
    penalty = {"name": "fgr", "gamma": 0.2, "epsilon": 0.5}
    outcome = train(replace(config, penalty={**penalty, "m": 4}))
    run = Run(config, Devices(config))
    (batch,) = run.data.train.batches(1, 16)
    found = [torch.zeros_like(p) for p in run.state.model.parameters()]
    for start in range(0, 16, 4):
        run.state.optimizer.zero_grad()
        regularizer = GradientRegularizer(run.state.model, gradreg.fgr(gamma=0.2, epsilon=0.5))
        regularizer.backward(run._closure(batch, slice(start, start + 4), 1.0, l2=1.0))
        for mean, p in zip(found, run.state.model.parameters(), strict=True):
            mean.add_(p.grad, alpha=1 / 4)
    for (name, p), g in zip(run.state.model.named_parameters(), found, strict=True):
        torch.testing.assert_close(outcome.weights[name], p.detach() - 0.1 * g, rtol=0, atol=1e-12)
    assert outcome.history[-1].gradient_evaluations == 2


def test_m_of_a_whole_batch_is_one_perturbation_and_a_resting_step_is_plain():
    assert_close(train(replace(SMALL, penalty={**SAM, "m": 1000})), train(replace(SMALL, penalty=SAM)), tolerance=0.0)
    resting = {**SAM, "warmup": {"kind": "zero", "epochs": 1}}
    with_m = train(replace(SMALL, penalty={**resting, "m": 2}))
    assert with_m.history[0].train_loss == train(SMALL).history[0].train_loss


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"penalty": {**SAM, "m": 0}}, "^penalty.m must be >= 1; got 0"),
        ({"penalty": {**SAM, "m": 2, "ascent_fraction": 0.5}}, "^penalty.m must be left out with penalty.ascent_fraction"),
        ({"penalty": {"name": "gsam", "rho": 0.1, "a": 0.1, "m": 2}}, "^penalty.m must be left out here; got 2: perturb must be 'all'"),
        ({"penalty": {**SAM, "m": 2}, "accumulation": 2}, "^accumulation must be 1 with penalty.m"),
        ({"penalty": {**SAM, "m": 2}, "scope": "global"}, "^scope must be local with penalty.m"),
    ],
)
def test_what_does_not_go_with_m(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_a_share_of_the_training_images_tells_whether_the_penalty_helps():
    """50 of 250 images are not trained on: 2 steps an epoch, each of which looks at held-out images, because there are so few."""
    config = replace(SMALL, epochs=5, penalty={**SAM, "held_out": 0.2})
    outcome = train(config)
    assert outcome.history[-1].step == 10
    assert outcome.history[-1].strength == 0.0
    assert outcome.history[-1].gradient_evaluations == 10 * (2 + 1)
    run = Run(config, Devices(config))
    assert run.held_out == HeldOut(steps_per_epoch=2, every=1)
    assert (len(run.data.train), len(run.data.kept_out)) == (200, 50)
    assert config.steps_per_epoch() == run.steps_per_epoch == 2
    everything = Run(SMALL, Devices(SMALL)).data.train
    (all_rows,) = everything.batches(1, 250)
    (trained,), (kept,) = run.data.train.batches(1, 200), run.data.kept_out.batches(1, 50)
    as_sets = [{tuple(image.flatten().tolist()) for image in batch.images} for batch in (all_rows, trained, kept)]
    assert as_sets[1] | as_sets[2] == as_sets[0]
    loss = run._held_out(0)()
    expected = cross_entropy(run.state.model(kept.images.double()), kept.targets)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("epochs", "rule"),
    [
        (12, HeldOut(steps_per_epoch=50, latest=400)),
        (3, HeldOut(steps_per_epoch=50, every=2, latest=100)),
        (200, HeldOut(steps_per_epoch=50, latest=6667)),
    ],
)
def test_how_often_a_run_looks_at_held_out_images_and_how_long_it_waits(epochs, rule):
    """At least 60 times, where it has as many steps, and for two thirds of them."""
    assert RecipePenalty(gradreg.sam(rho=0.1), held_out=0.1).switch(steps_per_epoch=50, epochs=epochs) == rule
    assert RecipePenalty(gradreg.sam(rho=0.1)).switch(steps_per_epoch=50, epochs=epochs) is None


def test_held_out_images_leave_training_itself_as_it_is():
    """While the penalty waits, a look at them changes no weight: the same run on 200 images without one."""
    config = replace(SMALL, data=replace(SMALL.data, train_size=250, label_noise=0.0), epochs=3)
    with_look = train(replace(config, penalty={**SAM, "held_out": 0.2}))
    assert with_look.history[-1].strength == 0.0
    smaller = Run(replace(config, penalty={**SAM, "held_out": 0.2}), Devices(config))
    plain = GradientRegularizer(smaller.state.model, None)
    for _ in range(3):
        for batch in smaller.data.train.batches(smaller.state.progress.epoch + 1, 100):
            smaller.state.optimizer.zero_grad()
            plain.backward(smaller._closures(batch, 1.0))
            smaller.state.optimizer.step()
            smaller.schedule.step_update(plain.step)
        smaller.state.progress.epoch += 1
    for ours, theirs in zip(with_look.model.parameters(), smaller.state.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_held_out_images_switch_the_penalty_on_once_the_others_are_learned_by_heart():
    """40 of 240 images held out, wrong labels, two steps an epoch: on before the end, and not at the start."""
    config = replace(SMALL, data=replace(SMALL.data, train_size=240, label_noise=0.5), epochs=100, penalty={**SAM, "held_out": 1 / 6})
    strengths = [epoch.strength for epoch in train(config).history]
    assert strengths[0] == 0.0
    assert strengths[-1] == 0.2


def test_a_radius_that_is_learned_from_held_out_images():
    """50 of 250 images held out: every second of the 10 steps looks at them, the penalty acts from the first on, and its radius moves."""
    penalty = {"name": "sam", "rho": {"schedule": "lets", "start": 0.2, "rate": 0.1, "every": 2}, "held_out": 0.2}
    config = replace(SMALL, epochs=5, penalty=penalty)
    run = Run(config, Devices(config))
    assert run.held_out is None
    assert (len(run.data.train), len(run.data.kept_out)) == (200, 50)
    history = train(config).history
    assert history[-1].gradient_evaluations == 10 * 2 + 5
    radii = [epoch.radius for epoch in history]
    assert radii[0] == pytest.approx(0.2 * math.exp(0.1)) or radii[0] == pytest.approx(0.2 * math.exp(-0.1))  # after one measurement
    assert len(set(radii)) == 5


def test_the_gap_is_that_of_one_loss_on_two_sets_of_images():
    """Weight decay that is part of the training loss is part of the held-out loss too."""
    penalty = {"name": "sam", "rho": "lets", "held_out": 0.2}
    losses = []
    for l2 in (0.0, 0.1):
        run = Run(replace(SMALL, penalty=penalty, optimizer=replace(SMALL.optimizer, l2_in_loss=l2)), Devices(SMALL))
        batch = next(iter(run.data.train.batches(1, 100)))
        (closure,) = run._closures(batch, 1.0)
        losses.append((closure().item(), run._held_out(0)().item()))
    assert losses[1][0] - losses[0][0] > 0.1
    assert losses[1][1] - losses[0][1] == pytest.approx(losses[1][0] - losses[0][0], rel=1e-6)
    with pytest.raises(ValueError, match=r"^flooding must be null with lets\(rate 0\.01\), .*; got \{'name': 'batch', 'level': 0\.1\}"):
        replace(SMALL, penalty=penalty, flooding={"name": "batch", "level": 0.1})


@pytest.mark.parametrize(
    ("penalty", "message"),
    [
        ({"name": "sam", "rho": "lets"}, r"^penalty\.held_out must be given with lets\(rate 0\.01\), a radius that is .*; got none"),
        ({**SAM, "held_out": 1.0}, "^penalty.held_out must be a share < 1 of the training samples; got 1.0"),
        ({**SAM, "held_out": 0}, "^penalty.held_out must be finite and > 0; got 0"),
    ],
)
def test_what_may_be_held_out(penalty, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, penalty=penalty)
    with pytest.raises(ValueError, match=r"^penalty\.held_out must leave samples to train on; got 0\.9 of 1"):
        RecipePenalty(None, held_out=0.9).kept_out(1)


def test_an_adaptive_optimizer_that_warms_up_under_a_whole_penalty_is_warned_of():
    adaptive = replace(
        SMALL, optimizer=OptimizerConfig(name="adamw", lr=1e-3), schedule=ScheduleConfig(warmup_epochs=1), penalty={**SAM}, epochs=2
    )
    with pytest.warns(HarmfulPenalty, match=r"arXiv 2406\.09723.*--penalty\.warmup '\{kind: zero, epochs: 1\}'"):
        train(adaptive)
    for mended in (
        {"penalty": {**SAM, "warmup": {"kind": "zero", "epochs": 1}}},
        {"penalty": {**SAM, "warmup": {"kind": "radius", "epochs": 1}}},
        {"penalty": None},
        {"optimizer": OptimizerConfig(lr=0.1)},
        {"schedule": ScheduleConfig()},
    ):
        train(replace(adaptive, **mended))  # warnings are errors


def test_the_best_epochs_weights_are_kept():
    config = replace(SMALL, epochs=6, optimizer=OptimizerConfig(lr=1.0), data=DataConfig(train_size=250, label_noise=0.5, validation=50))
    per_step: dict[int, dict[str, torch.Tensor]] = {}
    outcome = train(config, on_step=lambda step, model, _: per_step.update({step: {k: v.clone() for k, v in model.state_dict().items()}}))
    best = outcome.best_epoch
    assert best.validation_accuracy == max(epoch.validation_accuracy for epoch in outcome.history)
    assert outcome.best is not None
    for name, tensor in per_step[best.step].items():
        assert torch.equal(outcome.best[name], tensor)
    summary = outcome.summary()["best"]
    assert (summary["epoch"], summary["by"]) == (best.epoch, "validation_accuracy")


def test_of_equal_epochs_the_first_is_the_best():
    after: list[torch.Tensor] = []
    config = replace(SMALL, optimizer=OptimizerConfig(lr=1e-9), data=DataConfig(train_size=100))
    outcome = train(config, on_step=lambda step, model, _: after.append(next(model.parameters()).detach().clone()))
    assert len({epoch.test_accuracy for epoch in outcome.history}) == 1
    assert outcome.best_epoch.epoch == 1
    assert outcome.best is not None
    assert torch.equal(next(iter(outcome.best.values())), after[0])
    assert not torch.equal(after[0], after[1])
