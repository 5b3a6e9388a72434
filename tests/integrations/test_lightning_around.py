"""``GradientRegularization`` among what else Lightning has: hooks and their order, plugins, checkpoints, averaging and tuners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradreg
from gradreg.integrations.lightning import GradientRegularization
from gradreg.torch import GradientRegularizer

from .digits import digits, largest_difference, network
from .test_lightning import FGR, SAM, Digits, Still, by_hand, fit, loader, network_weights
from .test_lightning import pytestmark as _common

pytestmark = _common

REMEMBER = {
    "friendly": gradreg.friendly_sam(rho=0.2),
    "looksam": gradreg.looksam(rho=0.2, k=3),
    "msam": gradreg.msam(rho=0.2),
    "sparse": gradreg.sam(rho=0.2).sparse(0.5, every=2),
    "warmup": gradreg.friendly_sam(rho=0.2).warmup("zero", steps=2),
}


def test_building_the_callback_draws_no_random_numbers():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    GradientRegularization(SAM)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "accumulate"), [*((name, 1) for name in REMEMBER), ("friendly", 2), ("looksam", 2)])
def test_penalties_with_state_train_as_the_hand_written_loop(name: str, accumulate: int, tmp_path: Path):
    trainer = fit(tmp_path, REMEMBER[name], accumulate_grad_batches=accumulate)
    expected = by_hand(REMEMBER[name], accumulate=accumulate)
    assert largest_difference(network_weights(trainer.lightning_module), network_weights(expected)) == 0.0


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("name", REMEMBER)
def test_a_resumed_run_has_the_state_of_the_penalty(name: str, tmp_path: Path):
    def checkpoints() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=9)

    common: dict[str, Any] = {"enable_checkpointing": True, "max_epochs": 2}
    whole = fit(tmp_path, REMEMBER[name], callbacks=(checkpoints(),), **common)
    options = {"module": Digits(seed=1), "callbacks": (checkpoints(),), "ckpt_path": tmp_path / "step=9.ckpt", **common}
    resumed = fit(tmp_path, REMEMBER[name], **options)
    assert largest_difference(network_weights(resumed.lightning_module), network_weights(whole.lightning_module)) == 0.0
    one, other = (t.callbacks[0].state_dict() for t in (whole, resumed))  # type: ignore[attr-defined]
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert one["memory"]
    with pytest.raises(ValueError, match=r"the checkpoint must be of a run with a penalty of the same kind; got SAM.*leave out ckpt_path"):
        fit(tmp_path, SAM, **options)


def test_another_module_starts_from_no_state(tmp_path: Path):
    callback = GradientRegularization(REMEMBER["friendly"])
    trainers = [fit(tmp_path, plain=True, callbacks=(callback,)) for _ in range(2)]
    first, second = (network_weights(t.lightning_module) for t in trainers)
    assert largest_difference(first, second) == 0.0
    assert callback.state_dict()["step"] == 9


class Order(pl.Callback):
    """Notes the order of hooks, of the callback and of the module, and the gradients that they see."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

    def note(self, name: str, module: nn.Module) -> None:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        self.seen.append((name, float(nn.utils.get_total_norm(gradients)) if gradients else -1.0))

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.note("callback.on_before_zero_grad", pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.note("callback.on_before_backward", pl_module)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.note("callback.on_after_backward", pl_module)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.note("callback.on_before_optimizer_step", pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.note(f"callback.on_train_batch_end {sorted(outputs)}", pl_module)


class Noting(Digits):
    """The same hooks of the module."""

    zeroes = True

    def __init__(self, order: Order) -> None:
        super().__init__()
        self.order = [order]  # no submodule, and no state of the module

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.order[0].note("training_step", self)
        return super().training_step(batch, batch_idx)

    def optimizer_zero_grad(self, *args: Any) -> None:
        self.order[0].note("optimizer_zero_grad", self)
        if self.zeroes:
            super().optimizer_zero_grad(*args)

    def on_before_backward(self, loss: Tensor) -> None:
        self.order[0].note("on_before_backward", self)

    def on_after_backward(self) -> None:
        self.order[0].note("on_after_backward", self)


class NotingWithoutZeroing(Noting):
    """Gradients stay from step to step."""

    zeroes = False


@pytest.mark.parametrize("module", [Noting, NotingWithoutZeroing])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("penalty", [None, SAM.warmup("zero", steps=100)], ids=["none", "before it acts"])
def test_without_a_second_pass_every_hook_is_lightnings_own(penalty: Any, accumulate: int, module: type[Noting], tmp_path: Path):
    def seen(*callbacks: pl.Callback) -> tuple[list[tuple[str, float]], pl.Trainer]:
        order = Order()
        options = {"accumulate_grad_batches": accumulate, "module": module(order)}
        trainer = fit(tmp_path, plain=True, callbacks=(*callbacks, order), **options)
        return order.seen, trainer

    (mine, ours), (theirs, plain) = seen(GradientRegularization(penalty)), seen()
    assert mine == theirs
    assert largest_difference(network_weights(ours.lightning_module), network_weights(plain.lightning_module)) == 0.0


@pytest.mark.parametrize("accumulate", [1, 3])
def test_with_a_penalty_gradients_are_cleared_after_the_first_forward_pass(accumulate: int, tmp_path: Path):
    order = Order()
    fit(tmp_path, SAM, callbacks=(order,), module=Noting(order), accumulate_grad_batches=accumulate, max_steps=2)
    names = [name for name, _ in order.seen if not name.startswith("callback.on_train_batch_end")]
    middle = ["training_step"] * (2 * accumulate - 1)
    between = ["callback.on_before_backward", "on_before_backward"]
    once = ["training_step", "callback.on_before_zero_grad", "optimizer_zero_grad", *between, *middle]
    assert names == 2 * [*once, "callback.on_after_backward", "on_after_backward", "callback.on_before_optimizer_step"]
    # The second step's first forward pass and the hooks before clearing see the first step's gradient, as in Lightning.
    left = next(norm for name, norm in order.seen if name == "on_after_backward")
    second = [norm for name, norm in order.seen if name in ("training_step", "callback.on_before_zero_grad")][-2 * accumulate - 1 :][:2]
    assert second == [left, left]
    assert left > 0


def test_gradients_that_are_not_cleared_are_added_to(tmp_path: Path):
    order = Order()
    trainer = fit(tmp_path, SAM, module=NotingWithoutZeroing(order))
    expected = Digits()
    configured = expected.configure_optimizers()
    regularizer = GradientRegularizer(expected, SAM)
    for step, batch in enumerate(loader()):
        torch.manual_seed(step)
        regularizer.backward(lambda b=batch: cross_entropy(expected.network(b[0]), b[1]))
        configured["optimizer"].step()
        configured["lr_scheduler"]["scheduler"].step()
    assert largest_difference(network_weights(trainer.lightning_module), network_weights(expected)) <= 1e-6


class ScaledPrecision(Precision):
    """A static loss scale, and nothing that divides by it."""

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().backward(128.0 * tensor, model, optimizer, *args, **kwargs)


class ScaledStrategy(SingleDeviceStrategy):
    """The same by a strategy."""

    calls = 0

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return super().backward(128.0 * closure_loss, *args, **kwargs)


class Slow(Digits):
    """With a learning rate that makes up for the scale."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


@pytest.mark.parametrize(("kind", "accumulate"), [("precision", 1), ("strategy", 3)])
@pytest.mark.parametrize("name", ["none", "sam", "fgr", "bgr", "friendly"])
def test_a_custom_precision_or_strategy_runs_every_backward_pass(name: str, kind: str, accumulate: int, tmp_path: Path):
    penalty = {"none": None, "sam": SAM, "fgr": FGR, "bgr": gradreg.bgr(gamma=0.1, epsilon=0.3), **REMEMBER}[name]
    strategy = ScaledStrategy("cpu")
    plugins: dict[str, Any] = {"plugins": [ScaledPrecision()]} if kind == "precision" else {"strategy": strategy}
    options = {"accumulate_grad_batches": accumulate}
    scaled = fit(tmp_path, penalty, module=Slow(0.1 / 128), **options, **plugins)
    unscaled = fit(tmp_path, penalty, module=Slow(0.1), **options)
    assert largest_difference(network_weights(scaled.lightning_module), network_weights(unscaled.lightning_module)) <= 1e-6
    ours = scaled.callbacks[0]
    assert isinstance(ours, GradientRegularization)
    assert ours.regularizer is not None
    assert ours.regularizer.metrics.gradient_norm < 50  # without the scale
    if kind == "strategy":
        assert strategy.calls == 9 * (1 if penalty is None else 2)


def test_an_exact_penalty_with_an_unknown_scale_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match=r"backward must not scale the loss unless scaler is given; got one that multiplies it by 128"):
        fit(tmp_path, gradreg.exact(gamma=0.1, power=2), plugins=[ScaledPrecision()])


class Averaged(Still):
    """Trains without a schedule, which weight averaging would replace."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("penalty", [None, SAM, FGR], ids=["none", "sam", "fgr"])
def test_the_last_epoch_of_weight_averaging_only_collects_statistics(penalty: Any, tmp_path: Path):
    def averaged(**options: Any) -> tuple[pl.Trainer, StochasticWeightAveraging, Order]:
        averaging, order = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2), Order()
        trainer = fit(tmp_path, penalty, module=Averaged(), callbacks=(averaging, order), max_epochs=3, **options)
        return trainer, averaging, order

    trainer, averaging, order = averaged()
    assert [name for name, _ in order.seen].count("callback.on_before_backward") == 3 * 9
    average: Any = averaging._average_model
    expected = network(dropout=0.0)
    expected.load_state_dict(average.network.state_dict())
    normalization = expected[1]  # type: ignore[index]
    normalization.reset_running_stats()
    normalization.momentum = None
    x, _ = digits()
    for i in range(9):
        expected(x[40 * i : 40 * (i + 1)])
    found: Any = trainer.lightning_module
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(found.network[1], name), getattr(normalization, name), rtol=1e-5, atol=1e-6)
    if penalty is None:
        plain, *_ = averaged(plain=True)
        assert largest_difference(network_weights(found), network_weights(plain.lightning_module)) == 0.0


class Tunable(Digits):
    """With a rate for a tuner to find."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Seeded(Tunable):
    """Draws the masks of a step, whatever callbacks there are."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        torch.manual_seed(batch_idx)
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*logger.*")
@pytest.mark.filterwarnings("ignore:.*num_training.*")
@pytest.mark.parametrize("name", ["none", "sam", "friendly"])
def test_a_search_for_the_learning_rate_trains_with_the_penalty(name: str, tmp_path: Path):
    penalty = {"none": None, "sam": SAM, "friendly": gradreg.friendly_sam(rho=0.5)}[name]
    callback = GradientRegularization(penalty)
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing"), False)
    trainer = pl.Trainer(default_root_dir=tmp_path, callbacks=[callback], max_epochs=1, accelerator="cpu", **quiet)  # type: ignore[arg-type]
    module = Seeded()
    before = network_weights(module)
    options = {"min_lr": 0.05, "max_lr": 0.5, "num_training": 8, "early_stop_threshold": None, "update_attr": False}
    found = Tuner(trainer).lr_find(module, loader(), **options)  # type: ignore[arg-type]
    assert found is not None
    expected = Seeded()
    sgd = torch.optim.SGD(expected.parameters(), lr=0.1)
    regularizer = GradientRegularizer(expected, penalty)
    average, losses = 0.0, []
    for step, (batch, rate) in enumerate(zip(loader(), found.results["lr"], strict=False)):
        sgd.param_groups[0]["lr"] = rate
        sgd.zero_grad()
        torch.manual_seed(step)
        loss = regularizer.backward(lambda b=batch: cross_entropy(expected.network(b[0]), b[1]))
        sgd.step()
        average = 0.98 * average + 0.02 * loss.item()
        losses.append(average / (1 - 0.98 ** (step + 2)))
    assert found.results["loss"] == pytest.approx(losses[: len(found.results["loss"])], rel=1e-5)
    assert largest_difference(network_weights(module), before) == 0.0
    assert callback.state_dict() == {"step": 0, "evaluations": 0}
    trainer.fit(module, loader())
    fresh = fit(tmp_path, penalty, module=Seeded())
    assert largest_difference(network_weights(module), network_weights(fresh.lightning_module)) == 0.0


def test_a_line_search_is_an_error_with_a_penalty_and_lightnings_own_without(tmp_path: Path):
    class Searches(Digits):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)

    with pytest.raises(ValueError, match="the optimizer must take one gradient a step; got LBFGS"):
        fit(tmp_path, SAM, module=Searches())
    mine, plain = fit(tmp_path, None, module=Searches()), fit(tmp_path, plain=True, module=Searches())
    assert largest_difference(network_weights(mine.lightning_module), network_weights(plain.lightning_module)) == 0.0


def test_without_a_penalty_manual_optimization_is_lightnings_own(tmp_path: Path):
    class Manual(Digits):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self.network(batch[0]), batch[1]))
            optimizer.step()

    mine, plain = fit(tmp_path, None, module=Manual()), fit(tmp_path, plain=True, module=Manual())
    assert largest_difference(network_weights(mine.lightning_module), network_weights(plain.lightning_module)) == 0.0


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_backward_pass_that_makes_a_graph_is_an_error_with_a_penalty(tmp_path: Path):
    class Graph(Digits):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            loss.backward(create_graph=True)

    with pytest.raises(RuntimeError, match=r"backward must not make gradients with a graph \(create_graph=True\)"):
        fit(tmp_path, SAM, module=Graph())
