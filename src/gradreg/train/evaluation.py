"""Loss and accuracy over a data set, every sample counted once on any number of processes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradreg.train.configuration import Precision
from gradreg.train.data.loader import EvaluationSet
from gradreg.train.devices import Devices


@dataclass(frozen=True)
class Evaluation:
    """The loss and accuracy of a model on a data set.

    Args:
        loss: mean cross entropy, without label smoothing.
        accuracy: share of samples whose class has the largest output, 0 to 1.
        top5: share of samples whose class is among the five largest outputs (all, if there are fewer classes), 0 to 1.
    """

    loss: float
    accuracy: float
    top5: float


@torch.no_grad()
def evaluate(
    model: nn.Module,
    samples: EvaluationSet,
    *,
    batch_size: int = 1000,
    devices: Devices | None = None,
    precision: Precision = "fp32",
) -> Evaluation:
    """Evaluate ``model`` over all ``samples``, in evaluation mode, in which it stays.

    Args:
        model: images to logits.
        samples: the data set, or this process's part of it.
        batch_size: samples at a time, ≥ 1.
        devices: sums over the processes; None for one process.
        precision: of the model.

    Sums are accumulated in float64 on the device and read once, at the end.
    """
    model.eval()
    sums: torch.Tensor | None = None
    for batch in samples.batches(batch_size):
        with autocast(precision, batch.images.device):
            logits = model(inputs(batch.images, precision))
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
        counts = (
            cross_entropy(logits.double() if precision == "fp64" else logits.float(), batch.labels, reduction="sum"),
            best[:, 0].sum(),
            best.sum(),
            torch.tensor(len(best)),
        )
        part = torch.stack([c.to(device=logits.device, dtype=_wide(logits.device)) for c in counts])
        sums = part if sums is None else sums + part
    if devices is not None:
        sums = devices.total(torch.zeros(4, dtype=_wide(devices.device), device=devices.device) if sums is None else sums)
    if sums is None:
        raise ValueError("samples must hold at least one image to evaluate; got none.")
    loss, right, among, seen = sums.tolist()
    return Evaluation(loss / seen, right / seen, among / seen)


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context in which a model runs in ``precision``."""
    if precision in ("fp32", "fp64"):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def inputs(images: torch.Tensor, precision: Precision) -> torch.Tensor:
    """``images`` in the dtype of a model in ``precision``; autocast casts them itself."""
    return images.double() if precision == "fp64" else images


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
