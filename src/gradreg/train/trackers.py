"""TensorBoard, Weights & Biases and MLflow through one interface: Accelerate's trackers."""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradreg import files
from gradreg.train.configuration import Config
from gradreg.train.outcome import Epoch

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

IDENTITIES = "trackers.json"
PROJECT = "gradreg"


class Trackers:
    """The trackers of a run, which log every epoch.

    Args:
        config: the run; ``config.trackers`` names them.
        folder: the run's folder: TensorBoard's events go under it, and the identities by which a resumed run is the same run to the others.
        first_step: optimizer step from which a run resumes; what TensorBoard holds of later ones is hidden.

    Raises:
        ValueError: a tracker whose package is not installed.
    """

    def __init__(self, config: Config, folder: Path, *, first_step: int) -> None:
        self._trackers: list[GeneralTracker] = []
        try:
            for name in dict.fromkeys(config.trackers):
                tracker = _started(name, folder, first_step)
                self._trackers.append(tracker)
                if (
                    not first_step and name != "tensorboard"
                ):  # TensorBoard's table of settings needs final metrics, and config.yaml says more
                    tracker.store_init_configuration(dict(_flat(asdict(config))))
        except BaseException:
            self.close()
            raise

    def log(self, epoch: Epoch) -> None:
        """Every number of ``epoch``, at its optimizer step."""
        values = {key: value for key, value in epoch.to_dict().items() if isinstance(value, (int, float)) and key != "step"}
        for tracker in self._trackers:
            tracker.log(values, step=epoch.step)

    def close(self) -> None:
        """Flush and close all of them."""
        for tracker in self._trackers:
            tracker.finish()


def _started(name: str, folder: Path, first_step: int) -> GeneralTracker:
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"trackers must name installed ones; got {name!r}, whose package is missing. Run: pip install {name}")
    from accelerate.tracking import MLflowTracker, TensorBoardTracker, WandBTracker

    file = folder / IDENTITIES
    remedy = "Remove it, so that the run is a new one to its trackers."
    identities: dict[str, str] = files.read_json(file, holds="the run's identities", remedy=remedy) if os.path.lexists(file) else {}
    if name == "tensorboard":
        # Hiding from the next step on keeps the last epoch's point, which was written at the step before.
        tracker: GeneralTracker = TensorBoardTracker("tensorboard", folder, purge_step=first_step + 1 if first_step else None)
        tracker.start()
        return tracker
    if name == "wandb":
        identity = identities.setdefault(name, uuid.uuid4().hex)
        tracker = WandBTracker(PROJECT, id=identity, name=folder.name, dir=str(folder), resume="allow")
        tracker.start()
    else:
        tracker = MLflowTracker(PROJECT, run_id=identities.get(name), run_name=folder.name)
        tracker.start()
        identities[name] = tracker.tracker.info.run_id
    files.write_json(file, identities)
    return tracker


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, (bool, int, float, str)) else str(value)
