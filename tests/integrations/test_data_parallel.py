"""Each adapter in two processes joined by gloo, against one process that sees what both see."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import gradreg
from tests.torch.ranks import run_ranks

from .digits import batch, largest_difference, network, weights

SAM = gradreg.sam(rho=0.2)
PENALTIES = {"sam": SAM, "fgr": gradreg.fgr(gamma=0.2, epsilon=0.4)}
STEPS = 3


def launched(rank: int, world: int) -> None:
    """What a launcher tells its processes."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "ACCELERATE_USE_CPU": "true"}
    os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


def micro_batch(step: int, i: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """The rows of one micro-batch of two: one process alone has those of both."""
    rows = [batch(2 * (2 * step + i) + r) for r in ((rank,) if world == 2 else (0, 1))]
    return torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])


def with_accelerate(rank: int, world: int, scope: Any) -> dict[str, Tensor]:
    from accelerate import Accelerator

    from gradreg.torch import GradientRegularizer

    launched(rank, world)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network(dropout=0.0).eval()  # batch statistics are each rank's own
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    regularizer = GradientRegularizer(model, SAM, scope=scope)
    for step in range(STEPS):
        closures = []
        for i in range(2):
            x, y = micro_batch(step, i, rank, world)
            with accelerator.accumulate(model):
                closures.append(lambda x=x, y=y: cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    regularizer.backward(closures, backward=accelerator.backward)
                optimizer.step()
                optimizer.zero_grad()
    return weights(model)


def with_transformers(rank: int, world: int, scope: Any, folder: str) -> dict[str, Tensor]:
    from .text import language_model
    from .trainers import trained

    launched(rank, world)
    model = language_model(dropout=0.0)
    options = {"max_steps": STEPS, "per_device_train_batch_size": 4 // world, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    return weights(trained(Path(folder), SAM, model=model, scope=scope, **options).model)


def resumed_with_transformers(rank: int, world: int, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A run of a penalty with state, whole and resumed."""
    from .test_transformers import SAVING, STATEFUL
    from .text import language_model
    from .trainers import trained

    launched(rank, world)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "ddp_backend": "gloo", **SAVING}

    def run(name: str, **more: Any) -> dict[str, Tensor]:
        return weights(trained(Path(folder) / name, STATEFUL["friendly_sam"], model=language_model(dropout=0.0), **options, **more).model)

    return run("whole"), run("again", resume=str(Path(folder) / "whole" / "checkpoint-2"))


def with_lightning(rank: int, world: int, scope: Any, folder: str) -> dict[str, Tensor]:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.data import DataLoader

    from gradreg.integrations.lightning import GradientRegularization

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network(dropout=0.0).eval()

        def training_step(self, rows: Any, batch_idx: int) -> Tensor:
            loss = cross_entropy(self.network(rows[0]), rows[1])
            self.log("loss", loss, sync_dist=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    warnings.simplefilter("ignore")
    launched(rank, world)
    module = Module()
    strategy: Any = "auto" if world == 1 else DDPStrategy(process_group_backend="gloo", cluster_environment=TorchElasticEnvironment())
    rows = [batch(i, 64 // world) for i in range(rank, 2 * STEPS * world, world)]
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        max_epochs=1,
        accumulate_grad_batches=2,
        callbacks=[GradientRegularization(SAM, scope=scope)],
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(module, DataLoader(rows, batch_size=None))  # type: ignore[arg-type]
    return weights(module.network)


def with_fabric(rank: int, world: int, name: str, scope: Any) -> dict[str, Tensor]:
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.fabric.strategies import DDPStrategy

    from gradreg.torch import GradientRegularizer

    launched(rank, world)
    strategy: Any = "auto" if world == 1 else DDPStrategy(process_group_backend="gloo", cluster_environment=TorchElasticEnvironment())
    fabric = Fabric(accelerator="cpu", devices=world, strategy=strategy)
    fabric.launch()
    assert fabric.world_size == world
    model = network(dropout=0.0).eval()  # batch statistics are each rank's own
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    regularizer = GradientRegularizer(wrapped, PENALTIES[name], scope=scope)
    for step in range(STEPS):
        closures = []
        for i in range(2):
            x, y = micro_batch(step, i, rank, world)
            closures.append(lambda x=x, y=y: cross_entropy(wrapped(x), y) / 2)
        regularizer.backward(closures, backward=fabric.backward)
        fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def test_two_processes_equal_one_with_the_global_scope_and_agree_with_the_local(tmp_path: Path, monkeypatch):
    folder = str(tmp_path)
    both = run_ranks(
        2,
        {
            f"{name} {scope}": (function, (scope, *more))
            for name, function, more in (
                ("accelerate", with_accelerate, ()),
                ("transformers", with_transformers, (folder,)),
                ("lightning", with_lightning, (folder,)),
            )
            for scope in ("global", "local")
        }
        | {f"fabric-{name} {scope}": (with_fabric, (name, scope)) for name in PENALTIES for scope in ("global", "local")}
        | {"resumed": (resumed_with_transformers, (folder,))},
        tmp_path,
    )
    for whole, again in both.pop("resumed"):
        assert largest_difference(whole, again) == 0.0
    assert len(list(tmp_path.glob("whole/checkpoint-2/gradreg-*-of-2.pt"))) == 2
    (alone := tmp_path / "alone").mkdir()
    one = run_ranks(
        1,
        {
            "accelerate": (with_accelerate, ("local",)),
            "transformers": (with_transformers, ("local", folder)),
            "lightning": (with_lightning, ("local", folder)),
            **{f"fabric-{name}": (with_fabric, (name, "local")) for name in PENALTIES},
        },
        alone,
    )
    for name, (first, second) in both.items():
        assert largest_difference(first, second) == 0.0, name
        which, scope = name.split()
        difference = largest_difference(first, one[which][0])
        assert difference <= 1e-6 if scope == "global" else difference > 1e-5, name
