"""``RegularizedScaler`` in a loop of the form of timm's ``train.py``, against ``NativeScaler`` and a hand-written loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.task import ClassificationTask
from timm.utils import ApexScaler, NativeScaler
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradreg
from gradreg.integrations.timm import RegularizedScaler
from gradreg.torch import GradientRegularizer

from .digits import batch, largest_difference, network, weights

SAM = gradreg.sam(rho=0.3)
CLIP = {"norm": 0.3, "value": 0.01, "agc": 0.05}


def task(model: nn.Module) -> ClassificationTask:
    return ClassificationTask(model, cross_entropy, device=torch.device("cpu"), verbose=False)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def trained(
    model: nn.Module,
    scaler: Any,
    *,
    batches: int = 6,
    first: int = 0,
    accumulate: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    clip: str | None = None,
    scale: float = 1.0,
) -> list[float]:
    """As timm trains: variables that the loop rebinds, a loss divided in place, and the scaler's call; returns what it would log."""
    module, optimizer, logged = task(model), optimizer or optimizer_of(model), []
    deferred: Callable[[Any], Any] = getattr(scaler, "deferred", lambda task: lambda forward: forward)
    for i in range(first, first + batches):
        torch.manual_seed(i)
        x, y = batch(i)

        @deferred(module)
        def forward():
            result = module(x, y)  # noqa: B023
            loss = result["loss"]
            if accumulate > 1:
                loss /= accumulate
            return loss, result

        loss, _ = forward()
        scaled = loss if scale == 1.0 else scale * loss
        clipped = None if clip is None else CLIP[clip]
        scaler(
            scaled,
            optimizer,
            clip_grad=clipped,
            clip_mode=clip or "norm",
            parameters=None if clip is None else model.parameters(),
            create_graph=False,
            need_update=(i + 1) % accumulate == 0,
        )
        logged.append(loss.item() * accumulate)
        if (i + 1) % accumulate == 0:
            optimizer.zero_grad()
    return logged


def by_hand(penalty: Any, *, accumulate: int, clip: str | None = None, scale: float = 1.0) -> tuple[nn.Module, list[float]]:
    model = network()
    optimizer, regularizer, losses = optimizer_of(model), GradientRegularizer(model, penalty), []
    for i in range(0, 6, accumulate):
        torch.manual_seed(i + accumulate - 1)  # when all are evaluated
        micro = [batch(j) for j in range(i, i + accumulate)]
        loss = regularizer.backward([lambda x=x, y=y: scale * cross_entropy(model(x), y) / accumulate for x, y in micro])
        losses.append(loss.item() / scale)
        if clip is not None:
            dispatch_clip_grad(model.parameters(), CLIP[clip], mode=clip)
        optimizer.step()
        optimizer.zero_grad()
    return model, losses


@pytest.mark.parametrize("clip", [None, *CLIP])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_the_hand_written_loop(accumulate: int, clip: str | None):
    model = network()
    scaler = RegularizedScaler(SAM)
    logged = trained(model, scaler, accumulate=accumulate, clip=clip)
    expected, losses = by_hand(SAM, accumulate=accumulate, clip=clip)
    assert largest_difference(weights(model), weights(expected)) == 0.0
    assert largest_difference(weights(model), weights(by_hand(None, accumulate=accumulate, clip=clip)[0])) > 1e-3
    assert sum(logged) / len(logged) == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert scaler.regularizer is not None
    assert scaler.regularizer.step == 6 // accumulate


def test_a_batch_may_scale_its_loss():
    model = network()
    logged = trained(model, RegularizedScaler(gradreg.fgr(gamma=0.3, epsilon=0.3)), accumulate=2, scale=0.5)
    expected, losses = by_hand(gradreg.fgr(gamma=0.3, epsilon=0.3), accumulate=2, scale=0.5)
    assert largest_difference(weights(model), weights(expected)) <= 1e-6
    assert logged[1::2] == pytest.approx([2 * loss for loss in losses], rel=1e-6)  # unscaled, as train.py logs it


@pytest.mark.parametrize("accumulate", [1, 3])
def test_without_a_penalty_it_is_timms_own(accumulate: int):
    """Without dropout, because deferred micro-batches draw theirs later."""
    mine, theirs = network(dropout=0.0), network(dropout=0.0)
    ours = trained(mine, RegularizedScaler(None, NativeScaler("cpu")), accumulate=accumulate, clip="norm")
    plain = trained(theirs, NativeScaler("cpu"), accumulate=accumulate, clip="norm")
    assert largest_difference(weights(mine), weights(theirs)) == 0.0
    assert sum(ours) == pytest.approx(sum(plain), rel=1e-6)
    if accumulate == 1:
        assert ours == plain


def test_a_step_that_overflows_is_skipped():
    model, native = network(), NativeScaler("cpu")
    native._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    scaler, before = RegularizedScaler(SAM, native), [p.detach().clone() for p in model.parameters()]
    trained(model, scaler, batches=1, clip="norm")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert native._scaler.get_scale() == 2.0**126
    native._scaler.load_state_dict({**native._scaler.state_dict(), "scale": 2.0**10})
    trained(model, scaler, batches=1, first=1, clip="norm")
    assert max(float((p - q).detach().abs().max()) for p, q in zip(model.parameters(), before, strict=True)) > 1e-3


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path):
    penalty = gradreg.friendly_sam(rho=0.3).warmup("zero", steps=2)
    whole = network()
    trained(whole, RegularizedScaler(penalty, NativeScaler("cpu")))
    model = network()
    optimizer, scaler = optimizer_of(model), RegularizedScaler(penalty, NativeScaler("cpu"))
    trained(model, scaler, batches=3, optimizer=optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), scaler.state_dict_key: scaler.state_dict()}
    torch.save(state, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again = network(seed=1)
    optimizer, scaler = optimizer_of(again), RegularizedScaler(penalty, NativeScaler("cpu"))
    again.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    scaler.load_state_dict(loaded[RegularizedScaler.state_dict_key])
    assert scaler.state_dict()["regularizer"]["step"] == 3  # a checkpoint before the first step has it too
    trained(again, scaler, batches=3, first=3, optimizer=optimizer)
    assert largest_difference(weights(again), weights(whole)) == 0.0


def test_a_radius_that_is_learned_from_held_out_data_is_refused():
    with pytest.raises(ValueError, match=r"^penalty must not learn its radius from held-out data under timm, .*; got SAM"):
        RegularizedScaler(gradreg.sam(rho=gradreg.LETS()))


def test_a_decoupled_penalty_is_applied():
    penalty, model, expected = gradreg.wsam(rho=0.3, gamma=0.6, decoupled=True), network(), network()
    trained(model, RegularizedScaler(penalty), batches=2)
    optimizer, regularizer = optimizer_of(expected), GradientRegularizer(expected, penalty)
    for i in range(2):
        torch.manual_seed(i)
        x, y = batch(i)
        optimizer.zero_grad()
        regularizer.backward(lambda x=x, y=y: cross_entropy(expected(x), y))
        optimizer.step()
        regularizer.decoupled_step(optimizer)
    assert largest_difference(weights(model), weights(expected)) == 0.0


def test_names_are_the_models_own():
    names: list[str] = []

    def no_head(name: str, parameter: nn.Parameter) -> bool:
        names.append(name)
        return not name.startswith("4.")

    model = network()
    trained(model, RegularizedScaler(SAM, parameters=no_head), batches=1)
    assert set(names) == {name for name, _ in model.named_parameters()}


def test_what_it_cannot_do_is_an_error():
    model = network()
    optimizer, module = optimizer_of(model), task(model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TypeError, match=r"scaler must be a timm\.utils\.NativeScaler or None; got .*ApexScaler"):
        RegularizedScaler(SAM, ApexScaler())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"penalty must be a GradientPenalty or None; got 0\.05"):
        RegularizedScaler(0.05)  # type: ignore[arg-type]
    x, y = batch(0)
    scaler = RegularizedScaler(SAM)
    with pytest.raises(ValueError, match=r"loss must come from the function under @loss_scaler\.deferred"):
        scaler(module(x, y)["loss"], optimizer)

    @scaler.deferred(module)
    def forward() -> tuple[Tensor, Any]:
        return module(x, y)["loss"], None

    for call, words in (
        (lambda loss: scaler(loss, optimizer, create_graph=True), "create_graph must be False.*got True"),
        (lambda loss: scaler(loss, optimizer, clip_grad=1.0), "parameters must be given with clip_grad; got None"),
        (lambda loss: scaler(loss + model[0].weight.abs().sum(), optimizer), "loss must be a multiple of what the deferred function"),
    ):
        loss, _ = forward()
        with pytest.raises(ValueError, match=words):
            call(loss)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
