"""Loss and metric over a data set, every sample counted once on any number of processes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradreg.train.configuration import Precision
from gradreg.train.data.loader import EvaluationBatches
from gradreg.train.devices import Devices
from gradreg.train.objective import Objective


@dataclass(frozen=True)
class Evaluation:
    """The loss and metrics of a model on a data set.

    Args:
        loss: the mean over the samples, without label smoothing.
        metrics: "accuracy" and "top5", shares of the samples, 0 to 1; or the recipe's own metric.
    """

    loss: float
    metrics: Mapping[str, float]

    @property
    def accuracy(self) -> float:
        """Share of samples whose class has the largest output, 0 to 1."""
        return self.metrics["accuracy"]

    @property
    def top5(self) -> float:
        """Share of samples whose class is among the five largest outputs (all, if there are fewer classes), 0 to 1."""
        return self.metrics["top5"]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    samples: EvaluationBatches,
    *,
    batch_size: int = 1000,
    devices: Devices | None = None,
    precision: Precision = "fp32",
    objective: Objective | None = None,
) -> Evaluation:
    """Evaluate ``model`` over all ``samples``, in evaluation mode, in which it stays.

    Args:
        model: images to logits, or inputs to outputs.
        samples: the data set, or this process's part of it.
        batch_size: samples at a time, ≥ 1.
        devices: sums over the processes; None for one process.
        precision: of the model.
        objective: the loss and the metric; None for cross entropy and accuracy.

    Sums are accumulated in float64 on the device and read once, at the end.
    """
    objective = objective or Objective()
    loss, judge = objective.build_loss(), objective.build_judge()
    model.eval()
    sums: Tensor | None = None
    for batch in samples.batches(batch_size):
        given, targets = batch.labeled(precision)
        device = _device_of(given, devices)
        with autocast(precision, device):
            outputs = widened(model(given), precision)
        counts = [loss.total(outputs, targets, batch.size), *judge.sums(outputs, targets, batch.size), torch.tensor(batch.size)]
        part = torch.cat([c.detach().to(device=device, dtype=_wide(device)).reshape(-1) for c in counts])
        if sums is not None and len(part) != len(sums):
            raise ValueError(f"a metric must return as many numbers for each batch; got {len(part) - 2} after {len(sums) - 2}.")
        sums = part if sums is None else sums + part
    if devices is not None and devices.processes > 1:
        width = max(devices.gather(0 if sums is None else len(sums)))  # a process may have had no part of any batch
        sums = devices.total(torch.zeros(width, dtype=_wide(devices.device), device=devices.device) if sums is None else sums)
    if sums is None:
        raise ValueError("samples must hold at least one image to evaluate; got none.")
    total, *rest, seen = sums.tolist()
    return Evaluation(total / seen, judge.values([value / seen for value in rest]))


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context in which a model runs in ``precision``."""
    if precision in ("fp32", "fp64"):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def widened(outputs: Any, precision: Precision) -> Any:
    """A model's outputs in the dtype that losses are computed in; what is no tensor of floats stays as it is."""
    if precision == "fp64" or not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        return outputs
    return outputs.float()


def _device_of(given: Any, devices: Devices | None) -> torch.device:
    if devices is not None:
        return devices.device
    return given.device if isinstance(given, Tensor) else torch.device("cpu")


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
