"""A run is a folder: the resolved configuration, the environment, metrics and times, checkpoints, final weights, and the result."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml
from torch import nn

from gradreg import checks, environment, files
from gradreg.folders import locked
from gradreg.train.checkpoints.folders import Checkpoints
from gradreg.train.checkpoints.policy import Saver
from gradreg.train.checkpoints.save_and_load import own_copies
from gradreg.train.configuration import Config
from gradreg.train.devices import Devices
from gradreg.train.loop import train
from gradreg.train.outcome import Epoch, Outcome
from gradreg.train.recipe import configuration
from gradreg.train.sharpness import SharpnessConfig
from gradreg.train.strict_yaml import read_text, read_yaml
from gradreg.train.trackers import Trackers

CONFIGURATION = "config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
CHECKPOINTS = "checkpoints"
RESULT = "result.json"
WEIGHTS = {"last": "weights.safetensors", "best": "best.safetensors", "ema": "ema.safetensors"}
"""Kind of weights -> file: at the end, of the best epoch, and their EMA."""

_TIMES = ("seconds", "images_per_second")


class RunFolder:
    """One run's files under ``path``; a run is complete when ``result.json`` exists, which is written last.

    Args:
        path: the folder; created, with its parents, when the run starts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def result(self) -> dict[str, Any] | None:
        """The result of the completed run; None if it is not complete.

        Raises:
            ValueError: the file is damaged.
        """
        file = self.path / RESULT
        if not os.path.lexists(file):
            return None
        remedy = f"Remove it, and resume the run with gradreg train --resume {self.path}, which writes it again."
        found = files.read_json(file, holds="the result of a run", remedy=remedy)
        if not isinstance(found.get("diverged"), bool):
            raise ValueError(
                f"{str(file)!r} must hold the result of a run; it is damaged: it does not say whether the run diverged. {remedy}"
            )
        if (self.path / CONFIGURATION).is_file():
            files.check_tie(file, found, self.path / CONFIGURATION, remedy=remedy)
        return found

    def history(self) -> list[Epoch]:
        """The epochs of the run, without their times; an unfinished line is left out.

        Raises:
            ValueError: a line that is damaged; naming it.
        """
        file = self.path / METRICS
        found: list[Epoch] = []
        for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                found.append(Epoch.from_dict(_from_json(files.parse_json(line))))
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"line {number} of {str(file)!r} must be the record of an epoch; it is damaged: {error}. Restore the file; or, if the "
                    f"run's checkpoints are there, remove {RESULT} and resume it: gradreg train --resume {self.path}."
                ) from error
        return found

    def configuration(self) -> Config:
        """The run's configuration.

        Raises:
            ValueError, TypeError: no run in this folder, or a configuration that is damaged or that this version cannot read.
        """
        if not (self.path / CONFIGURATION).is_file():
            raise ValueError(f"{str(self.path)!r} must be the folder of a run; it holds no {CONFIGURATION}. Name what --out named.")
        try:
            return configuration(self._held())
        except (ValueError, TypeError) as error:
            where = str(self.path / CONFIGURATION)
            raise error if where in str(error) else type(error)(f"{where!r}: {error}") from error

    def _held(self) -> dict[str, Any]:
        """The keys of the configuration in the folder, as they are written."""
        file = self.path / CONFIGURATION
        found = read_yaml(repr(str(file)), read_text(file), exponents=False)
        if not isinstance(found, dict):
            raise ValueError(f"{str(file)!r} must be a mapping of keys to values; got {checks.describe(found)}. Restore it.")
        return found

    def check_free_for(self, config: Config) -> None:
        """Raise if the folder holds a run of another configuration.

        Raises:
            ValueError: naming the keys that differ.
        """
        file = self.path / CONFIGURATION
        if not file.is_file():
            if (self.path / CHECKPOINTS).exists():
                raise ValueError(
                    f"{str(self.path)!r} holds checkpoints of a run whose {CONFIGURATION} is gone. Put it back, choose another --out, or "
                    "remove that folder."
                )
            return
        before = {"sharpness": asdict(SharpnessConfig())}  # what a folder holds that is older than the key
        different = differences({**before, **self._held()}, asdict(config))
        different = [key for key in different if not (key.startswith("code.") and key.endswith(".file"))]  # a file may have been moved
        if different:
            changed = " (the content of that file has changed)" if all(key.startswith("code.") for key in different) else ""
            raise ValueError(
                f"{str(self.path)!r} holds a run of another configuration; it differs in {', '.join(different)}{changed}. "
                "Choose another --out, or remove that folder."
            )

    def run(
        self,
        config: Config,
        on_epoch: Callable[[Epoch], None] = lambda epoch: None,
        *,
        report: Callable[[str], None] = lambda message: None,
        track: bool = True,
        devices: Devices | None = None,
    ) -> dict[str, Any]:
        """Train and write everything, resuming from the newest undamaged checkpoint if there is one.

        Args:
            config: the run.
            on_epoch: called after every epoch.
            report: told from where the run resumes, and of damaged checkpoints.
            track: whether ``config.trackers`` are told of the run.
            devices: the processes and the device.

        Returns:
            The content of ``result.json``; that of a complete run is not changed.

        Raises:
            ValueError: the folder holds a run of another configuration.
            FolderInUse: another process writes the folder.
            Stopped: a signal stopped the run, which is saved.
            OSError: a file could not be written; the last checkpoint is kept.
        """
        ended = self._ended(config)
        devices = devices or Devices(config)
        with self._locked(devices) if ended is None else nullcontext():
            ended = ended or self._ended(config)  # which the process that has just left the folder may have written
            if ended is not None:
                report(f"the run in {str(self.path)!r} is complete; remove the folder to run it again")
                return ended
            return self._run(config, on_epoch, report=report, track=track, devices=devices)

    def _ended(self, config: Config) -> dict[str, Any] | None:
        """The result in the folder, which must be free for ``config``."""
        self.check_free_for(config)
        return self.result()

    @contextmanager
    def _locked(self, devices: Devices) -> Generator[None]:
        """The folder, made and locked by the main process; where that cannot, every process raises its error."""
        with ExitStack() as stack:
            refused: OSError | None = None
            if devices.main:
                try:
                    stack.enter_context(locked(self.path, purpose="--out"))
                except OSError as error:
                    refused = error
            refused = devices.gather(refused)[0]
            if refused is not None:
                raise refused
            yield

    def _run(
        self,
        config: Config,
        on_epoch: Callable[[Epoch], None],
        *,
        report: Callable[[str], None],
        track: bool,
        devices: Devices,
    ) -> dict[str, Any]:
        checkpoints = Checkpoints(self.path / CHECKPOINTS, keep=config.checkpoint.keep)
        newest = next(checkpoints.whole(report if devices.main else lambda message: None), None)
        saver = Saver(checkpoints, config.checkpoint, devices)
        trackers: Trackers | None = None

        def begin(history: Sequence[Epoch]) -> None:
            nonlocal trackers
            files.write_text(self.path / CONFIGURATION, yaml.safe_dump(asdict(config), sort_keys=False))
            files.write_json(self.path / ENVIRONMENT, environment.describe())
            if newest is not None:
                report(f"resuming from {newest.name}, with {len(history)} of {config.epochs} epochs done")
            # Drop what an interrupted run wrote after its last checkpoint, because it will be written again.
            files.write_text(self.path / METRICS, "".join(map(_metrics_line, history)))
            files.write_text(self.path / TIMINGS, "".join(map(_timings_line, history)))
            if track:
                trackers = Trackers(config, self.path, first_step=history[-1].step if history else 0)

        def record(epoch: Epoch) -> None:
            files.append_text(self.path / METRICS, _metrics_line(epoch))
            files.append_text(self.path / TIMINGS, _timings_line(epoch))
            if trackers is not None:
                trackers.log(epoch)
            on_epoch(epoch)

        try:
            with saver.listening():
                outcome = train(
                    config,
                    devices=devices,
                    saver=saver,
                    resume_from=newest,
                    **({"on_start": begin, "on_epoch": record} if devices.main else {}),
                )
        finally:
            if trackers is not None:
                trackers.close()
        result = outcome.summary()
        if devices.main:
            self._save_weights(outcome)
            result = files.tied(result, self.path / CONFIGURATION)
            files.write_json(self.path / RESULT, result)
        devices.wait()
        return result

    def _save_weights(self, outcome: Outcome) -> None:
        kept: dict[str, dict[str, Any] | None] = {
            "last": outcome.weights,
            "best": outcome.best,
            "ema": None if outcome.ema is None else own_copies(outcome.ema.state_dict()),
        }
        for which, tensors in kept.items():
            if tensors is not None:
                files.write_bytes(self.path / WEIGHTS[which], safetensors.torch.save(tensors))


def load_weights(model: nn.Module, file: Path) -> None:
    """Load the weights in ``file`` into ``model``.

    Raises:
        ValueError: no such file, or one that is damaged or of another model.
    """
    try:
        model.load_state_dict(safetensors.torch.load_file(file))
    except RuntimeError as error:
        heading, *first = str(error).splitlines()[:2]
        raise ValueError(
            f"{str(file)!r} must hold the weights of this model; {heading} {' '.join(first).strip()} It is built for the size of the "
            "images and the number of classes: name data that have those of the run."
        ) from error
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{str(file)!r} must hold the weights of this model; {type(error).__name__}: {error}") from error


def _metrics_line(epoch: Epoch) -> str:
    return _line({key: value for key, value in epoch.to_dict().items() if key not in _TIMES})


def _timings_line(epoch: Epoch) -> str:
    return _line({key: getattr(epoch, key) for key in ("epoch", *_TIMES)})


def _line(values: dict[str, Any]) -> str:
    """One line of JSON, which has no NaN or infinity: these are written as strings, so that a diverged run's lines are still JSON."""
    plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


def _from_json(values: dict[str, Any]) -> dict[str, Any]:
    return {k: float(v) if isinstance(v, str) else v for k, v in values.items()}


def differences(held: Any, wanted: Any, prefix: str = "") -> list[str]:
    """The dotted keys in which two configurations, nested plain values, differ."""
    if isinstance(held, dict) and isinstance(wanted, dict):
        keys = [*held, *(k for k in wanted if k not in held)]
        return [d for k in keys for d in differences(held.get(k), wanted.get(k), f"{prefix}.{k}" if prefix else k)]
    return [] if held == wanted else [prefix]
