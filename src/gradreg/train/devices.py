"""The processes of a run, started by ``accelerate launch`` or ``torchrun``, their devices, and their collective operations."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.nn.parallel import DistributedDataParallel

from gradreg.train.configuration import Config

if TYPE_CHECKING:
    from accelerate import PartialState

_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables that launchers set, besides Accelerate's own."""


class Devices:
    """The device of this process, its rank among the others, and the collective operations of the loop.

    Alone, a process takes ``config.device``; one of several takes the accelerator of its local rank, or the CPU with ``device: cpu``.

    Args:
        config: the run.

    Raises:
        ValueError: a device that does not exist, or options of the launcher that contradict the configuration.
    """

    def __init__(self, config: Config) -> None:
        _check_launcher(config)
        self._state = _launched(cpu=config.device == "cpu")
        self.rank: int = 0 if self._state is None else self._state.process_index
        self.processes: int = 1 if self._state is None else self._state.num_processes
        if self._state is None or self.processes == 1:
            self.device = _device(config.device)
        elif config.device in ("auto", "cpu"):
            assert self._state.device is not None
            self.device = self._state.device
        else:
            raise ValueError(
                f"device must be auto or cpu with {self.processes} processes, of which each takes its own; got {config.device!r}. "
                "Leave it out."
            )
        if config.parallel == "fsdp" and self.processes == 1:
            raise ValueError(
                "parallel must be 'ddp' with one process, which cannot shard the model; got 'fsdp'. "
                "Start several: accelerate launch --num_processes 2 -m gradreg train ..."
            )

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.rank == 0

    def place(self, model: nn.Module, config: Config) -> nn.Module:
        """``model`` on the device, sharded or replicated as ``config.parallel`` says; with one process, the model itself."""
        model.to(self.device, torch.float64 if config.precision == "fp64" else None)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.compile:
            model.compile()
        if self.processes == 1:
            return model
        if config.parallel == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for block in _blocks(model):
                fully_shard(block)
            fully_shard(model)
            return model
        ids = None if self.device.type == "cpu" else [self.device.index]
        return DistributedDataParallel(model, device_ids=ids)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of ``value`` over the processes."""
        return value if self.processes == 1 else self.total(value) / self.processes

    def total(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over the processes."""
        if self.processes == 1:
            return value
        total = value.detach().clone()
        all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true for any process; a collective operation."""
        if self.processes == 1:
            return flag
        return bool(self.total(torch.tensor(float(flag), device=self.device)) > 0)

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of every process, in the order of their ranks."""
        if self.processes == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def wait(self) -> None:
        """Wait for all processes (a barrier)."""
        if self._state is not None and self.processes > 1:
            self._state.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group."""
        if self._state is not None and self.processes > 1:
            self._state.destroy_process_group()


def _launched(*, cpu: bool) -> PartialState | None:
    """The state of a process that torchrun, Accelerate or MPI started; None in any other process."""
    if not any(name in _LAUNCHERS or name.startswith("ACCELERATE_") for name in os.environ):
        return None
    from accelerate import PartialState

    return PartialState(cpu=cpu)


def _device(name: str) -> torch.device:
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found if found is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"device must name one that this machine has; got {name!r}: {first_line}. Use auto or cpu.") from error
    return device


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The units that FSDP gathers one at a time: the members of the model's lists and sequences of modules that have weights."""
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and m is not model]
    outermost = [m for m in lists if not any(m is not other and m in set(other.modules()) for other in lists)]
    return [block for m in outermost for block in m if any(True for _ in block.parameters())]


def _check_launcher(config: Config) -> None:
    """Raise if ``accelerate launch`` got options that contradict the configuration, so that neither is silently ignored."""
    said = {
        "precision": (os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower(), {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}),
        "parallel": (os.environ.get("ACCELERATE_USE_FSDP", "false").lower(), {"false": "ddp", "true": "fsdp"}),
        "compile": (os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower(), {"no": False, "inductor": True}),
        "accumulation": (os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"), {"1": 1}),
    }
    for key, (word, meanings) in said.items():
        off = next(iter(meanings))
        value = getattr(config, key)
        if word != off and meanings.get(word) != value:
            wanted = meanings.get(word, word)
            raise ValueError(
                f"{key} must be what accelerate launch was told, {wanted!r}; got {value!r} in the configuration. "
                f"Add --{key} {str(wanted).lower()} after 'train', or leave the option of accelerate launch out."
            )
