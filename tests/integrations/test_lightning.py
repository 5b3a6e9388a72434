"""Lightning's automatic optimization against the bare loop, on real images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

import gradreg
from gradreg import GradientPenalty
from gradreg.integrations.lightning import GradientRegularization
from gradreg.torch import GradientRegularizer
from tests.torch.cases import PENALTIES
from tests.torch.ranks import run_ranks

from .digits import assert_equal, digits, network, values

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*litlogger.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.* is deprecated"),
]


def still(model: nn.Sequential) -> nn.Sequential:
    """Without dropout: Lightning draws random numbers of its own before the first batch."""
    model[3] = nn.Identity()
    return model


class Digits(pl.LightningModule):
    """The user's module: no line of it knows of a penalty."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD) -> None:
        super().__init__()
        self.network = still(network())
        self.optimizer = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss, "seen": torch.tensor(batch_idx)}

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters(), lr=0.1)  # type: ignore[call-arg]
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class Logged(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.outputs: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(trainer.logged_metrics["loss_step"]))
        self.outputs.append(float(outputs["loss"].detach()))


def trainer_of(folder: Path, *callbacks: Callback, **options: Any) -> pl.Trainer:
    options = {"max_epochs": 1, "limit_train_batches": 6, "accelerator": "cpu", "log_every_n_steps": 1, **options}
    return pl.Trainer(
        callbacks=list(callbacks), enable_progress_bar=False, enable_model_summary=False, logger=False, default_root_dir=folder, **options
    )


def loader() -> DataLoader[Any]:
    return DataLoader(digits(), batch_size=32)


def bare(penalty: GradientPenalty | None, *, parts: int = 1, clip: float | None = None) -> tuple[nn.Module, list[float]]:
    """What the callback must reproduce: each micro-batch has its own perturbation, their mean is what the optimizer sees."""
    model = still(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    regularizer = GradientRegularizer(model, penalty)
    for i, (x, y) in enumerate(list(loader())[:6]):
        regularizer.load_state_dict({"step": i // parts, "evaluations": 0})
        if i % parts == 0:
            optimizer.zero_grad()
            total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = None
        losses.append(float(regularizer.backward(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y))))  # type: ignore[misc]
        for n, p in model.named_parameters():
            assert p.grad is not None
            total[n] += p.grad / parts
        if i % parts == parts - 1:
            for n, p in model.named_parameters():
                p.grad = total[n]
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return model, losses


@pytest.mark.parametrize("penalty", [None, *PENALTIES.values()], ids=["none", *PENALTIES])
def test_it_trains_as_the_bare_loop_does_and_logs_the_first_loss(penalty: GradientPenalty | None, tmp_path: Path) -> None:
    module, logged = Digits(), Logged()
    callback = GradientRegularization(penalty)
    trainer_of(tmp_path, callback, logged, enable_checkpointing=False).fit(module, loader())
    model, losses = bare(penalty)
    assert_equal(values(module.network), values(model), tolerance=2e-4)
    assert logged.losses == pytest.approx(losses, rel=1e-3)
    assert logged.outputs == pytest.approx(losses, rel=1e-3)
    assert "training_step" not in vars(module)
    assert "backward" not in vars(module)


@pytest.mark.parametrize("name", ["sam", "fgr-mixing", "cgr"])
def test_accumulation_and_clipping(name: str, tmp_path: Path) -> None:
    module = Digits()
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5, "enable_checkpointing": False}
    trainer_of(tmp_path, GradientRegularization(PENALTIES[name]), **options).fit(module, loader())
    model, _ = bare(PENALTIES[name], parts=3, clip=0.5)
    assert_equal(values(module.network), values(model), tolerance=2e-4)


@pytest.mark.parametrize("scaled", [False, True], ids=["bf16", "scaled"])
@pytest.mark.parametrize("name", ["sam", "fgr"])
def test_mixed_precision(name: str, scaled: bool, tmp_path: Path) -> None:
    from lightning.pytorch.plugins.precision import MixedPrecision

    plugin = MixedPrecision("bf16-mixed", "cpu")
    if scaled:
        plugin.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # type: ignore[assignment]  # as 16-mixed has on an accelerator
    module = Digits()
    callback = GradientRegularization(PENALTIES[name])
    trainer_of(tmp_path, callback, plugins=[plugin], enable_checkpointing=False).fit(module, loader())
    model, _ = bare(PENALTIES[name])
    assert_equal(values(module.network), values(model), tolerance=0.05)
    assert callback.regularizer is not None
    assert callback.regularizer.step == 6


def test_resume_is_bit_for_bit(tmp_path: Path) -> None:
    penalty = gradreg.gnp(r=0.2, alpha=0.8).warmup("radius", steps=10)

    def run(epochs: int, checkpoint: str | None = None) -> tuple[Digits, pl.Trainer]:
        torch.manual_seed(0)
        module = Digits(torch.optim.AdamW)
        trainer = trainer_of(tmp_path, GradientRegularization(penalty), max_epochs=epochs, enable_checkpointing=False)
        trainer.fit(module, loader(), ckpt_path=checkpoint, weights_only=False)
        return module, trainer

    straight, _ = run(3)
    _, trainer = run(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(3, str(tmp_path / "half.ckpt"))
    assert_equal(values(resumed), values(straight))


def test_manual_optimization_and_a_step_without_a_loss_are_refused(tmp_path: Path) -> None:
    manual = Digits()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="automatic_optimization must be True for the GradientRegularization callback"):
        trainer_of(tmp_path, GradientRegularization(gradreg.sam()), enable_checkpointing=False).fit(manual, loader())
    empty = Digits()
    empty.training_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="training_step must return a loss under GradientRegularization; got None"):
        trainer_of(tmp_path, GradientRegularization(gradreg.sam()), enable_checkpointing=False).fit(empty, loader())
    assert "backward" not in vars(empty)


def alone(model: nn.Module, penalty: GradientPenalty, world: int) -> None:
    """Three steps in one process, each along the mean of the gradients that the ranks would regularize on their own."""
    x, y = digits().tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        mean = [torch.zeros_like(p) for p in model.parameters()]
        for rank in range(world):
            rows = torch.arange(rank, len(x), world)[32 * step : 32 * (step + 1)]  # the distributed sampler deals them out in turn
            model.zero_grad()
            regularizer = GradientRegularizer(model, penalty)
            regularizer.load_state_dict({"step": step, "evaluations": 0})
            regularizer.backward(lambda rows=rows: nn.functional.cross_entropy(model(x[rows]), y[rows]))  # type: ignore[misc]
            for total, p in zip(mean, model.parameters(), strict=True):
                assert p.grad is not None
                total.add_(p.grad, alpha=1 / world)
        for total, p in zip(mean, model.parameters(), strict=True):
            p.grad = total
        optimizer.step()


def data_parallel(rank: int, world: int, folder: str) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    import warnings

    from lightning.pytorch.plugins.environments import ClusterEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    class Joined(ClusterEnvironment):
        """The processes are there already, and so is their process group."""

        creates_processes_externally = True
        main_address = "localhost"
        main_port = 0

        @staticmethod
        def detect() -> bool:
            return True

        def world_size(self) -> int:
            return world

        def set_world_size(self, size: int) -> None: ...

        def global_rank(self) -> int:
            return rank

        def set_global_rank(self, rank: int) -> None: ...

        def local_rank(self) -> int:
            return rank

        def node_rank(self) -> int:
            return 0

    found = {}
    for name in ("sam", "fgr-mixing"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = Digits()
            module.network = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
            torch.manual_seed(1)
            for p in module.parameters():
                nn.init.normal_(p, std=0.1)
            twin = Digits()
            twin.network = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
            twin.load_state_dict(module.state_dict())
            strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=Joined())
            callback = GradientRegularization(PENALTIES[name], parameters=lambda n, p: n.startswith("network."))
            options: dict[str, Any] = {"strategy": strategy, "devices": world, "limit_train_batches": 3, "enable_checkpointing": False}
            sampler = DistributedSampler(digits(), world, rank, shuffle=False)
            data = DataLoader(digits(), batch_size=32, sampler=sampler)
            trainer_of(Path(folder), callback, use_distributed_sampler=False, **options).fit(module, data)
        alone(twin.network, PENALTIES[name], world)
        found[name] = (values(module.network), values(twin.network))
    return found


def test_data_parallel_keeps_each_rank_s_own_direction(tmp_path: Path) -> None:
    for found in run_ranks(2, {"ddp": (data_parallel, (str(tmp_path),))}, tmp_path)["ddp"]:
        for mine, reference in found.values():
            assert_equal(mine, reference, tolerance=1e-5)
