"""The state from which a run resumes exactly, written to a checkpoint and read back.

Nothing is unpickled as code: weights are safetensors, the rest is loaded with ``weights_only``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from gradreg.torch import GradientRegularizer
from gradreg.torch.weight_decay import WeightDecay
from gradreg.train.checkpoints.folders import Checkpoints
from gradreg.train.devices import Devices
from gradreg.train.outcome import Epoch

_MODEL, _EMA, _BEST = "model.safetensors", "ema.safetensors", "best.safetensors"
_OPTIMIZER, _PROGRESS = "optimizer.pt", "progress.pt"


@dataclass
class Progress:
    """How far a run has come.

    Args:
        epoch: epochs done.
        batch: batches done of the epoch after them.
        losses: the loss of each of these.
        metrics: the regularizer's, of the last step.
        weight_decay: the coefficient of the last step.
        history: one record for each epoch done.
        first_loss: loss of the run's first step.
        seconds: seconds spent training.
    """

    epoch: int = 0
    batch: int = 0
    losses: list[Tensor] = field(default_factory=list)
    metrics: Mapping[str, float] = field(default_factory=dict)
    weight_decay: float = 0.0
    history: list[Epoch] = field(default_factory=list)
    first_loss: float = float("nan")
    seconds: float = 0.0


@dataclass
class TrainingState:
    """The parts of a run that change during training.

    Args:
        model: the model that is trained, as ``Devices.place`` returned it.
        optimizer: its optimizer.
        regularizer: fills the gradients; its step is the run's clock.
        scaler: the loss scaling of fp16; disabled otherwise.
        weight_decay: what changes the weight decay; None if nothing does.
        ema: EMA of the weights; None without one.
        divided: whether FSDP shards the model.
        progress: how far the run has come.
        best: weights of the best epoch so far, by name, on the CPU; None where they are not kept. On the main process.
    """

    model: nn.Module
    optimizer: Optimizer
    regularizer: GradientRegularizer
    scaler: torch.amp.GradScaler
    weight_decay: WeightDecay | None
    ema: AveragedModel | None
    divided: bool = False
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Tensor] | None = None

    def weights(self) -> dict[str, Tensor]:
        """A copy of the whole model's parameters and buffers on the CPU, by name; a collective operation if it is sharded."""
        if not self.divided:
            return own_copies(unwrapped(self.model).state_dict())
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        return own_copies(get_model_state_dict(self.model, options=_whole(offload=True)))

    def save(self, checkpoints: Checkpoints, devices: Devices) -> None:
        """Write a checkpoint of the current step; each process adds its own part."""
        weights = self.weights()
        optimizer = self._optimizer_state()
        with checkpoints.new(self.regularizer.step) if devices.main else nullcontext() as made:
            folder = Path(devices.gather(str(made))[0])
            torch.save(self._own(), folder / _of_process(devices.rank))
            devices.wait()
            if devices.main:
                safetensors.torch.save_file(weights, folder / _MODEL)
                torch.save(optimizer, folder / _OPTIMIZER)
                torch.save(self._shared(devices), folder / _PROGRESS)
                if self.ema is not None:
                    safetensors.torch.save_file(own_copies(self.ema.module.state_dict()), folder / _EMA)
                if self.best is not None:
                    safetensors.torch.save_file(self.best, folder / _BEST)
        devices.wait()

    def load(self, checkpoint: Path, devices: Devices) -> None:
        """Resume from ``checkpoint``.

        Raises:
            ValueError: the state of a penalty was saved by another number of processes.
        """
        weights: dict[str, Any] = dict(safetensors.torch.load_file(checkpoint / _MODEL))
        optimizer = _load(checkpoint / _OPTIMIZER)
        if self.divided:
            from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

            set_model_state_dict(self.model, weights, options=_whole(offload=False))
            set_optimizer_state_dict(self.model, self.optimizer, optimizer, options=_whole(offload=False))
        else:
            unwrapped(self.model).load_state_dict(weights)
            self.optimizer.load_state_dict(optimizer)
        shared = _load(checkpoint / _PROGRESS)
        if self.ema is not None:
            self.ema.module.load_state_dict(safetensors.torch.load_file(checkpoint / _EMA))
            self.ema.n_averaged.fill_(shared["ema_updates"])
        if self.weight_decay is not None:
            self.weight_decay.load_state_dict(shared["weight_decay"])
        self.scaler.load_state_dict(shared["scaler"])
        keys = shared["progress"]
        self.progress = Progress(**{**keys, "history": [Epoch(**epoch) for epoch in keys["history"]]})
        best = checkpoint / _BEST
        self.best = safetensors.torch.load_file(best) if devices.main and best.is_file() else None
        if shared["processes"] == devices.processes:
            own = _load(checkpoint / _of_process(devices.rank))
            self.regularizer.load_state_dict(own["regularizer"])
            set_random_state(own["random"])
            return
        own = _load(checkpoint / _of_process(0))
        if any(isinstance(value, dict) for value in own["regularizer"].values()):
            raise ValueError(
                f"--resume must use {shared['processes']} processes, because each saved its own part of the penalty's state; "
                f"got {devices.processes}. Start as many."
            )
        self.regularizer.load_state_dict(own["regularizer"])

    def _optimizer_state(self) -> dict[str, Any]:
        """The whole optimizer's state; a collective operation if it is sharded."""
        if not self.divided:
            return self.optimizer.state_dict()
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return dict(get_optimizer_state_dict(self.model, self.optimizer, options=_whole(offload=True)))

    def _shared(self, devices: Devices) -> dict[str, Any]:
        """The state that is the same on every process."""
        progress = self.progress
        return {
            "processes": devices.processes,
            "progress": {
                **{key: getattr(progress, key) for key in ("epoch", "batch", "weight_decay", "first_loss", "seconds")},
                "losses": [loss.cpu() for loss in progress.losses],
                "metrics": dict(progress.metrics),
                "history": [asdict(epoch) for epoch in progress.history],
            },
            "scaler": self.scaler.state_dict(),
            "weight_decay": None if self.weight_decay is None else self.weight_decay.state_dict(),
            "ema_updates": 0 if self.ema is None else int(self.ema.n_averaged),
        }

    def _own(self) -> dict[str, Any]:
        """The state that differs between processes."""
        return {"regularizer": self.regularizer.state_dict(), "random": random_state()}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel``, or ``model`` itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def own_copies(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """``tensors`` on the CPU, contiguous and without shared memory, as safetensors requires."""
    return {name: torch.empty_like(t, device="cpu", memory_format=torch.contiguous_format).copy_(t.detach()) for name, t in tensors.items()}


def random_state() -> dict[str, Any]:
    """The state of the generators that layers draw from: PyTorch's on the CPU and the accelerator, and Python's."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "accelerator": None if accelerator is None else torch.get_device_module(accelerator).get_rng_state(),
        "python": [version, list(numbers), gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what ``random_state`` returned."""
    torch.set_rng_state(state["torch"])
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and state["accelerator"] is not None:
        torch.get_device_module(accelerator).set_rng_state(state["accelerator"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


def _whole(*, offload: bool) -> Any:
    """Options for gathering a sharded model's state and scattering it again. The import, which takes a second, is delayed."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=offload)


def _of_process(rank: int) -> str:
    return f"process-{rank:05d}.pt"


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)
