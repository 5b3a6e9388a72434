"""Scheduled weight decay on torch parameter groups: what each step takes off, what is left alone, resuming."""

from __future__ import annotations

import copy
import json

import pytest

torch = pytest.importorskip("torch")

from gradreg import AutoL2, Cosine, LogTime, Ramp, Schedule  # noqa: E402
from gradreg.torch.weight_decay import WeightDecay  # noqa: E402

SCHEDULES: list[Schedule | float] = [0.2, Cosine(start=0.4, end=0.05, steps=7), LogTime(value=0.5, t0=3), Ramp(start=0.0, end=0.3, steps=5)]
LR = 0.5


def one(value: float = 1.0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor([value], dtype=torch.float64))


def optimizers(weight: torch.nn.Parameter) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD([weight], lr=LR, weight_decay=1.0), torch.optim.AdamW([weight], lr=LR, weight_decay=1.0)]


@pytest.mark.parametrize("decay", SCHEDULES, ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("cautious", [False, True])
def test_each_step_takes_off_the_learning_rate_times_the_schedule(decay: Schedule | float, which: int, cautious: bool) -> None:
    weight = one()
    optimizer = optimizers(weight)[which]
    setter = WeightDecay(optimizer, decay, cautious=cautious)
    for step in range(10):
        before = weight.item()
        weight.grad = torch.zeros_like(weight)  # decay alone moves the weight, whichever way the optimizer applies it
        value = setter.set(step)
        optimizer.step()
        expected = decay(step) if isinstance(decay, Schedule) else decay
        assert value == pytest.approx(expected, abs=1e-15)
        assert weight.item() / before == pytest.approx(1 - LR * expected, rel=1e-12)


def test_coupled_decay_passes_through_the_momentum_and_decoupled_does_not() -> None:
    coupled, decoupled = one(), one()
    setups = [
        (coupled, torch.optim.SGD([coupled], lr=0.1, momentum=0.9, weight_decay=1.0), False),
        (decoupled, torch.optim.SGD([decoupled], lr=0.1, momentum=0.9, weight_decay=1.0), True),
    ]
    for weight, optimizer, cautious in setups:
        setter = WeightDecay(optimizer, 0.1, cautious=cautious)
        for step in range(2):
            weight.grad = torch.zeros_like(weight)
            setter.set(step)
            optimizer.step()
    assert decoupled.item() == pytest.approx(0.99**2)
    assert coupled.item() == pytest.approx(0.99 - 0.1 * (0.9 * 0.1 + 0.1 * 0.99))


def test_groups_without_decay_stay_without_and_the_others_keep_their_ratio() -> None:
    weights = [one(), one(), one()]
    groups = [{"params": [w], "weight_decay": d} for w, d in zip(weights, (0.0, 0.02, 0.01), strict=True)]
    optimizer = torch.optim.SGD(groups, lr=LR)
    setter = WeightDecay(optimizer, Cosine(start=0.4, end=0.0, steps=2))
    assert setter.set(1) == pytest.approx(0.2)
    assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([0.0, 0.2, 0.1])
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert [w.item() for w in weights] == pytest.approx([1.0, 0.9, 0.95])


def test_a_coefficient_of_zero_does_not_lose_the_group() -> None:
    weight = one()
    setter = WeightDecay(optimizers(weight)[0], Ramp(start=0.0, end=0.4, steps=2))
    assert [setter.set(step) for step in (0, 1, 2)] == pytest.approx([0.0, 0.2, 0.4])


def test_decay_follows_the_square_of_the_learning_rate() -> None:
    weight = one()
    optimizer = torch.optim.AdamW([weight], lr=0.4, weight_decay=1.0)
    halving = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    setter = WeightDecay(optimizer, 0.1, peak_learning_rate=0.4)
    factors = []
    for step in range(4):
        before = weight.item()
        weight.grad = torch.zeros_like(weight)
        setter.set(step)
        optimizer.step()
        halving.step()
        factors.append(1 - weight.item() / before)
    assert factors == pytest.approx([0.04 / 4**k for k in range(4)])


@pytest.mark.parametrize("which", [0, 1], ids=["SGD", "AdamW"])
def test_cautious_decay_spares_what_the_optimizer_moves_away_from_zero(which: int) -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0], dtype=torch.float64))
    plain = torch.nn.Parameter(weight.detach().clone())
    gradient = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0], dtype=torch.float64) * 0.1
    optimizer = optimizers(weight)[which]
    setter = WeightDecay(optimizer, 0.2, cautious=True)
    undecayed = type(optimizer)([plain], lr=LR, weight_decay=0.0)  # type: ignore[call-arg]
    weight.grad, plain.grad = gradient.clone(), gradient.clone()
    setter.set(0)
    optimizer.step()
    undecayed.step()
    decayed = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(weight.detach(), plain.detach() - LR * 0.2 * decayed * torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0]))


def test_cautious_decay_leaves_parameters_without_a_gradient_alone() -> None:
    weight, frozen = one(), one()
    optimizer = torch.optim.SGD([weight, frozen], lr=LR, weight_decay=1.0)
    setter = WeightDecay(optimizer, 0.2, cautious=True)
    weight.grad = torch.zeros_like(weight)
    setter.set(0)
    optimizer.step()
    assert (weight.item(), frozen.item()) == (pytest.approx(0.9), 1.0)


@pytest.mark.parametrize("kind", ["fused", "foreach"])
@pytest.mark.parametrize("cautious", [False, True])
def test_a_step_that_a_loss_scale_skips_decays_nothing(cautious: bool, kind: str) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=LR, weight_decay=1.0, **{kind: True})  # type: ignore[arg-type]
    setter = WeightDecay(optimizer, 0.1, cautious=cautious)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step, (loss, expected) in enumerate([(float("inf"), 1.0), (0.0, 0.95)]):
        optimizer.zero_grad()
        setter.set(step)
        scaler.scale((weight * loss).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(weight.detach(), torch.full((3,), expected))


def test_cautious_decay_follows_a_closure() -> None:
    weight = one()
    optimizer = torch.optim.SGD([weight], lr=LR, weight_decay=1.0)
    WeightDecay(optimizer, 0.2, cautious=True)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 0.0 * weight.sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert weight.item() == pytest.approx(0.9)


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("sets_first", [False, True], ids=["added before set", "added after set"])
def test_a_group_that_is_added_later_decays_by_its_ratio_to_the_largest(cautious: bool, sets_first: bool) -> None:
    weights = [one(), one(), one(), one()]
    optimizer = torch.optim.AdamW([{"params": [weights[0]], "weight_decay": 0.02}], lr=LR)
    setter = WeightDecay(optimizer, Cosine(start=0.4, end=0.0, steps=2), cautious=cautious)
    setter.set(0)
    if sets_first:
        setter.set(1)
    for weight, mark in zip(weights[1:], (0.01, 0.0, 0.02), strict=True):
        optimizer.add_param_group({"params": [weight], "weight_decay": mark})
    if not sets_first:
        assert setter.set(1) == pytest.approx(0.2)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert [w.item() for w in weights] == pytest.approx([0.9, 0.95, 1.0, 0.9])
    state = setter.state_dict()
    again = WeightDecay(optimizer, Cosine(start=0.4, end=0.0, steps=2), cautious=False) if not cautious else None
    if again is not None:
        again.load_state_dict(json.loads(json.dumps(state)))
        again.set(1)
        assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([0.2, 0.1, 0.0, 0.2])
    del optimizer.param_groups[1:]
    with pytest.raises(ValueError, match=r"optimizer must keep its parameter groups; got 1, of 4\. Build WeightDecay again"):
        setter.set(2)


def train(weight: torch.Tensor, optimizer: torch.optim.Optimizer, scheduler: object, setter: WeightDecay, steps: range) -> list[float]:
    values = []
    for step in steps:
        weight.grad = (weight.detach() - 0.3).sign() * 0.1 + weight.detach() ** 3
        measured = {"loss": 1.0, "accuracy": 0.5} if setter.due(step) else {}
        values.append(setter.set(step, **measured))
        optimizer.step()
        scheduler.step()  # type: ignore[attr-defined]
    return values


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("make", [lambda: AutoL2(measure_every=2), lambda: Cosine(start=0.4, end=0.0, steps=30)], ids=["auto", "cosine"])
@pytest.mark.parametrize("state_first", ["optimizer", "decay"])
def test_resumes_exactly_beside_a_learning_rate_schedule(cautious: bool, make: object, state_first: str) -> None:
    def setup() -> tuple:
        weight = one()
        optimizer = torch.optim.SGD([weight], lr=0.2, momentum=0.9, weight_decay=1.0)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
        return weight, optimizer, scheduler, WeightDecay(optimizer, make(), cautious=cautious, peak_learning_rate=0.2)  # type: ignore[operator]

    whole = setup()
    expected = train(*whole, range(50))
    first = setup()
    got = train(*first, range(23))
    saved = [copy.deepcopy(part.state_dict()) for part in first[1:3]]
    decay_state = json.loads(json.dumps(first[3].state_dict(), allow_nan=False))
    second = setup()
    with torch.no_grad():
        second[0].copy_(first[0])
    if state_first == "decay":
        second[3].load_state_dict(decay_state)
    second[1].load_state_dict(saved[0])
    second[2].load_state_dict(saved[1])
    if state_first == "optimizer":
        second[3].load_state_dict(decay_state)
    got += train(*second, range(23, 50))
    assert got == expected
    assert second[0].item() == whole[0].item()
    assert len(set(expected)) > 3


@pytest.mark.parametrize("cautious", [False, True])
def test_a_state_knows_groups_that_were_added_and_the_largest_mark(cautious: bool) -> None:
    def added(mark: float) -> dict[str, object]:
        return {"params": [one()], "weight_decay": mark}

    optimizer = torch.optim.AdamW([added(0.02)], lr=LR)
    setter = WeightDecay(optimizer, 0.4, cautious=cautious)
    optimizer.add_param_group(added(0.01))
    state = setter.state_dict()
    assert state["shares"] == [1.0, 0.5]
    again = torch.optim.AdamW([added(1.0)], lr=LR)
    resumed = WeightDecay(again, 0.4, cautious=cautious)
    again.add_param_group(added(1.0))
    resumed.load_state_dict(json.loads(json.dumps(state)))
    again.add_param_group(added(0.005))
    resumed.set(0)
    assert resumed.state_dict()["shares"] == pytest.approx([1.0, 0.5, 0.25])
    if not cautious:
        assert [group["weight_decay"] for group in again.param_groups] == pytest.approx([0.4, 0.2, 0.1])


def test_a_state_says_which_groups_decay_even_where_the_optimizer_no_longer_does() -> None:
    def grouped(*marks: float) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [one()], "weight_decay": mark} for mark in marks], lr=LR)

    saved = WeightDecay(grouped(1.0, 0.0, 0.5), 0.4).state_dict()
    restored = grouped(1.0, 1.0, 1.0)
    setter = WeightDecay(restored, 0.4)
    setter.load_state_dict(saved)
    setter.set(7)
    assert [group["weight_decay"] for group in restored.param_groups] == pytest.approx([0.4, 0.0, 0.2])


def test_auto_is_due_when_it_measures_and_sets_what_it_says() -> None:
    weight = one()
    optimizer = optimizers(weight)[0]
    setter = WeightDecay(optimizer, AutoL2())
    assert [step for step in range(25) if setter.due(step)] == [0, 10, 20]
    values = [setter.set(step, loss=1.0, accuracy=0.5) for step in range(25)]
    assert values == [0.1] * 20 + [0.01] * 5
    assert optimizer.param_groups[0]["weight_decay"] == 0.01
    assert not WeightDecay(optimizers(one())[0], 0.1).due(0)


def test_bad_decays_and_optimizers_are_refused() -> None:
    weight = one()
    with pytest.raises(ValueError, match=r"decay must be finite and >= 0; got -0.1\. Leave WeightDecay out"):
        WeightDecay(optimizers(weight)[0], -0.1)
    with pytest.raises(ValueError, match=r"decay must be >= 0 at every step; got the schedule ramp\(0.1 -> -0.1 over 5 steps\)"):
        WeightDecay(optimizers(weight)[0], Ramp(start=0.1, end=-0.1, steps=5))
    with pytest.raises(ValueError, match=r"a parameter group with weight_decay > 0, .*; got none\. Build it with any"):
        WeightDecay(torch.optim.SGD([weight], lr=0.1), 0.1)
    with pytest.raises(ValueError, match=r"optimizer must know weight decay; got LBFGS, whose group 0"):
        WeightDecay(torch.optim.LBFGS([weight]), 0.1)
    with pytest.raises(ValueError, match=r"peak_learning_rate must be finite and > 0; got 0"):
        WeightDecay(optimizers(weight)[0], 0.1, peak_learning_rate=0.0)
    with pytest.raises(TypeError, match=r"loss must be a number; got None"):
        WeightDecay(optimizers(weight)[0], AutoL2()).set(0)


def test_states_of_something_else_are_refused() -> None:
    auto = WeightDecay(optimizers(one())[0], AutoL2())
    with pytest.raises(ValueError, match=r"state must come from AutoL2; got one of a schedule"):
        auto.load_state_dict(WeightDecay(optimizers(one())[0], 0.1).state_dict())
    two = torch.optim.SGD([{"params": [one()]}, {"params": [one()]}], lr=0.1, weight_decay=1.0)
    with pytest.raises(ValueError, match=r"an optimizer with 1 parameter groups; got one of 2"):
        auto.load_state_dict(WeightDecay(two, AutoL2()).state_dict())
