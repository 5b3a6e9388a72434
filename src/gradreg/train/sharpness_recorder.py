"""What the block ``sharpness`` measures: the training loss on a fixed part of the training set, after some epochs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from gradreg.train.configuration import Config
from gradreg.train.data.loader import AnyBatch, Data
from gradreg.train.devices import Devices
from gradreg.train.evaluation import widened


class SharpnessRecorder:
    """Measures a run on the same samples each time.

    Args:
        config: the run.
        data: its data.
        devices: its processes; each measures its part of the samples, and all get the mean's numbers.

    Raises:
        ValueError: samples or batches that several processes cannot share equally, so that their mean would be another loss.
    """

    def __init__(self, config: Config, data: Data, devices: Devices) -> None:
        self._config, self._data, self._devices = config, data, devices
        self._said: set[str] = set()
        block, processes = config.sharpness, devices.processes
        for key in ("samples", "batch"):
            value = getattr(block, key)
            if block.every is not None and value % processes:
                raise ValueError(
                    f"sharpness.{key} must be a multiple of the {processes} processes, which share the samples equally; got {value}. "
                    f"Use {value + processes - value % processes}."
                )

    def after(self, epoch: int, model: nn.Module) -> dict[str, float]:
        """The numbers after ``epoch`` as its record has them, ``sharpness_NAME``; empty if none are due."""
        block = self._config.sharpness
        if not block.due(epoch, self._config.epochs):
            return {}
        from gradreg import sharpness

        processes = self._devices.processes
        available = min(block.samples, len(self._data.train))
        wanted = available // processes
        batches = self._data.unaugmented(wanted * processes).batches(block.batch)
        closures, sizes = closures_of(self._config, model, batches, wanted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what the numbers must be read with is the command's to say, once
            found = sharpness.summary(
                model, closures, measures=block.measures, rho=block.rho, vectors=block.vectors, sizes=sizes, mode="eval"
            )
        reasons: dict[str, list[str]] = {}
        for name, error in found.failures.items():
            if name not in self._said:
                reasons.setdefault(str(error), []).append(name)
        self._said.update(found.failures)
        for reason, names in reasons.items() if self._devices.main else ():
            warnings.warn(f"{', '.join(names)} could not be measured after epoch {epoch}, recorded as nan: {reason}", stacklevel=2)
        return found.record()


def closures_of(config: Config, model: nn.Module, batches: Iterable[AnyBatch], wanted: int) -> tuple[list[Callable[[], Any]], list[int]]:
    """A closure of the training loss for each batch, until there are ``wanted`` samples, and their sizes."""
    loss = config.objective.build_loss()

    def closure_of(given: Any, targets: Any) -> Callable[[], Any]:
        return lambda: loss.training(widened(model(given), config.precision), targets)

    closures: list[Callable[[], Any]] = []
    sizes: list[int] = []
    for batch in batches:
        rows = slice(0, min(batch.size, wanted - sum(sizes)))
        closures.append(closure_of(*batch.part(rows, config.precision)))
        sizes.append(rows.stop)
        if sum(sizes) == wanted:
            break
    return closures, sizes
