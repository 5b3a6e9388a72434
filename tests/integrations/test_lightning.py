"""``GradientRegularization`` against a hand-written loop, plain training, and itself resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import gradreg
from gradreg import GradientPenalty
from gradreg.integrations.lightning import GradientRegularization
from gradreg.torch import GradientRegularizer
from tests.penalties import each_trait

from .digits import check_a_penalty_of_any_kind, digits, largest_difference, network, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
]

SAM = gradreg.sam(rho=0.2)
FGR = gradreg.fgr(gamma=0.2, epsilon=0.4)


class Digits(pl.LightningModule):
    """What a user writes, with dropout, batch normalization, a metric and a log."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.network = network(seed)
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.seen = 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        logits = self.network(x)
        loss = cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"size": float(len(y))}, on_step=False, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return {"loss": loss, "extra": loss.detach()}

    def configure_optimizers(self) -> Any:
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(sgd, 2, 0.8), "interval": "step"}}


class SeedsEachStep(Callback):
    """So that the dropout masks of an optimizer step are the same wherever it is taken."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            torch.manual_seed(trainer.global_step)


class Records(Callback):
    """What other callbacks get to see."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.losses.append(loss.item())

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(float(nn.utils.get_total_norm(gradients)))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs)


def loader(images: int = 360, size: int = 40) -> DataLoader[Any]:
    x, y = digits()
    return DataLoader(TensorDataset(x[:images], y[:images]), batch_size=size)


def fit(folder: Path, penalty: Any = None, *, plain: bool = False, callbacks: tuple[Callback, ...] = (), **options: Any) -> pl.Trainer:
    module = options.pop("module", None) or Digits()
    data = options.pop("data", None) or loader()
    resume = options.pop("ckpt_path", None)
    parameters = options.pop("parameters", None)
    ours = [] if plain else [GradientRegularization(penalty, parameters=parameters)]
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    chosen: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "enable_checkpointing": False, **quiet, **options}
    trainer = pl.Trainer(default_root_dir=folder, callbacks=[*ours, SeedsEachStep(), *callbacks], **chosen)
    trainer.fit(module, data, ckpt_path=resume, **({"weights_only": True} if resume else {}))
    return trainer


def by_hand(penalty: Any, *, accumulate: int = 1, clip: float | None = None, autocast: bool = False, **options: Any) -> nn.Module:
    """The loop that the callback stands for."""
    module = Digits()
    configured = module.configure_optimizers()
    sgd, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    regularizer = GradientRegularizer(module, penalty, **options)
    batches = list(loader())

    def closure(batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast, cache_enabled=False):
            return cross_entropy(module.network(batch[0]), batch[1]) / accumulate

    for step, start in enumerate(range(0, len(batches), accumulate)):
        torch.manual_seed(step)
        regularizer.backward([lambda b=b: closure(b) for b in batches[start : start + accumulate]])
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        sgd.step()
        schedule.step()
        sgd.zero_grad()
    return module


def network_weights(module: Any) -> dict[str, Tensor]:
    return weights(module.network)


PENALTIES = {"none": None, "sam": SAM, "fgr": FGR, "cgr": gradreg.cgr(gamma=0.1, epsilon=0.3), "exact": gradreg.exact(gamma=0.1)}


@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"accumulate": 2, "clip": 0.1}, {"autocast": True}], ids=str)
@pytest.mark.parametrize("name", PENALTIES)
def test_training_is_the_hand_written_loop(name: str, options: dict[str, Any], tmp_path: Path):
    trainer = fit(
        tmp_path,
        PENALTIES[name],
        accumulate_grad_batches=options.get("accumulate", 1),
        gradient_clip_val=options.get("clip"),
        precision="bf16-mixed" if options.get("autocast") else "32-true",
    )
    expected = by_hand(PENALTIES[name], **options)
    assert largest_difference(network_weights(trainer.lightning_module), network_weights(expected)) == 0.0
    assert trainer.global_step == (9 + options.get("accumulate", 1) - 1) // options.get("accumulate", 1)


@each_trait
def test_with_a_penalty_of_every_kind_too(penalty: GradientPenalty, tmp_path: Path):
    check_a_penalty_of_any_kind(
        penalty,
        lambda p: network_weights(fit(tmp_path, p).lightning_module),
        lambda p: network_weights(by_hand(p)),
        last=8,
        within=0.0,
    )


def test_without_a_penalty_it_is_plain_training_logs_included(tmp_path: Path):
    for accumulate in (1, 2):
        mine, plain = fit(tmp_path, accumulate_grad_batches=accumulate), fit(tmp_path, plain=True, accumulate_grad_batches=accumulate)
        assert largest_difference(network_weights(mine.lightning_module), network_weights(plain.lightning_module)) == 0.0
        assert mine.callback_metrics == plain.callback_metrics


def test_the_first_pass_is_logged_once(tmp_path: Path):
    still = {"module": Still(), "data": loader(350)}  # the last batch is smaller, and weighs less in a mean
    plain, mine = fit(tmp_path, plain=True, **still), fit(tmp_path, SAM, module=Still(), data=loader(350), accumulate_grad_batches=2)
    assert set(mine.callback_metrics) == set(plain.callback_metrics) == {"loss", "loss_step", "loss_epoch", "size", "accuracy"}
    for name, value in plain.callback_metrics.items():
        torch.testing.assert_close(mine.callback_metrics[name], value, rtol=1e-6, atol=0, msg=name)


class Still(Digits):
    """Learns nothing, so that all its first passes are those of plain training; and has no dropout, whose masks differ by the step."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network(dropout=0.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_hooks_run_once_a_step_on_the_first_loss_and_the_final_gradient(tmp_path: Path):
    mine, plain = Records(), Records()
    fit(tmp_path, FGR, module=Still(), callbacks=(mine,))
    fit(tmp_path, plain=True, module=Still(), callbacks=(plain,))
    assert mine.losses == pytest.approx([(1 - 0.5) * loss for loss in plain.losses])  # as it is weighted: c = 1/2
    assert len(mine.norms) == 9
    assert all(abs(a - b) > 1e-3 for a, b in zip(mine.norms, plain.norms, strict=True))
    assert [float(o["loss"]) for o in mine.outputs] == pytest.approx([float(o["loss"]) for o in plain.outputs])
    assert [float(o["extra"]) for o in mine.outputs] == pytest.approx([float(o["extra"]) for o in plain.outputs])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path):
    penalty = gradreg.gnp(r=0.4, alpha=0.8).warmup("zero", steps=4)

    def checkpoints() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=3)

    options = {"enable_checkpointing": True, "max_epochs": 2, "accumulate_grad_batches": 3}
    whole = fit(tmp_path, penalty, callbacks=(checkpoints(),), **options)
    checkpoint = tmp_path / "step=3.ckpt"
    resumed = fit(tmp_path, penalty, module=Digits(seed=1), callbacks=(checkpoints(),), ckpt_path=checkpoint, **options)
    assert largest_difference(network_weights(resumed.lightning_module), network_weights(whole.lightning_module)) == 0.0
    states = [t.callbacks[0].state_dict() for t in (whole, resumed)]  # type: ignore[attr-defined]
    assert states == [{"step": 6, "evaluations": 4 + 2 * 2}] * 2


def test_a_loss_scale_leaves_the_result_and_an_overflow_skips_the_step(tmp_path: Path):
    class Half(MixedPrecision):
        """A loss scale without the rounding of 16 bits, so that the two runs may be compared."""

        def autocast_context_manager(self) -> torch.autocast:
            return torch.autocast("cpu", enabled=False)

    def scaled(scale: float) -> pl.Trainer:
        plugin = Half("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
        return fit(tmp_path, FGR, module=Constant(), plugins=[plugin], gradient_clip_val=1.0, max_steps=3)

    class Constant(Digits):
        """Without a schedule, for an overflow leaves no step for it to follow."""

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    expected = network_weights(fit(tmp_path, FGR, module=Constant(), gradient_clip_val=1.0, max_steps=3).lightning_module)
    assert largest_difference(network_weights(scaled(2.0**12).lightning_module), expected) <= 1e-6
    overflowed = scaled(2.0**127)
    parameters = dict(overflowed.lightning_module.network.named_parameters())
    assert all(torch.equal(p, dict(network().named_parameters())[name]) for name, p in parameters.items())


def test_a_step_without_a_loss_is_left_out(tmp_path: Path):
    class Skips(Digits):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="returned `None`"):
        mine = fit(tmp_path, None, module=Skips())
    plain = fit(tmp_path, plain=True, module=Skips())
    assert largest_difference(network_weights(mine.lightning_module), network_weights(plain.lightning_module)) == 0.0
    with pytest.raises(ValueError, match=r"training_step must return a loss for every batch of an accumulation.*times 0"):
        fit(tmp_path, SAM, module=Skips(), accumulate_grad_batches=2)


def test_selection_speaks_the_modules_own_names(tmp_path: Path):
    trainer = fit(tmp_path, SAM, parameters=lambda name, p: name.startswith("network.4"))
    expected = by_hand(SAM, parameters=lambda name, p: name.startswith("network.4"))
    assert largest_difference(network_weights(trainer.lightning_module), network_weights(expected)) == 0.0


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument")
def test_what_it_cannot_do_is_refused(tmp_path: Path):
    class Manual(Digits):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    class Draws(Digits):
        def training_step(self, dataloader_iter: Any) -> Any:
            return super().training_step(next(dataloader_iter)[0], 0)

    with pytest.raises(ValueError, match=r"automatic_optimization must be True.*backward=self\.manual_backward"):
        fit(tmp_path, SAM, module=Manual())
    with pytest.raises(ValueError, match=r"training_step must be given its batch.*got one with a dataloader_iter"):
        fit(tmp_path, SAM, module=Draws())
    with pytest.raises(ValueError, match=r"penalty must not be decoupled under Lightning.*Use gradreg\.wsam"):
        GradientRegularization(gradreg.wsam(rho=0.1, gamma=0.4, decoupled=True))
    with pytest.raises(ValueError, match=r"^penalty must not learn its radius from held-out data under Lightning, .*; got SAM"):
        GradientRegularization(gradreg.sam(rho=gradreg.LETS()))
    with pytest.raises(TypeError, match=r"penalty must be a GradientPenalty or None; got 0\.1"):
        GradientRegularization(0.1)  # type: ignore[arg-type]


def test_manual_optimization_needs_no_callback(tmp_path: Path):
    class Manual(Digits):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.regularizer = GradientRegularizer(self.network, SAM)

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            closure = lambda: cross_entropy(self.network(batch[0]), batch[1])  # noqa: E731
            self.log("loss", self.regularizer.backward(closure, backward=self.manual_backward))
            optimizer.step()
            self.lr_schedulers().step()  # type: ignore[union-attr]

    trainer = fit(tmp_path, plain=True, module=Manual())
    assert largest_difference(network_weights(trainer.lightning_module), network_weights(by_hand(SAM))) == 0.0


def test_the_trainer_is_left_as_it_was(tmp_path: Path):
    class Fails(Digits):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ZeroDivisionError("division by zero")

    trainer = fit(tmp_path, SAM)
    assert "_make_closure" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)
    callback = GradientRegularization(SAM)
    trainer = pl.Trainer(
        default_root_dir=tmp_path, callbacks=[callback], max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        trainer.fit(Fails(), loader())
    assert "_make_closure" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)
    assert callback._waiting == []
