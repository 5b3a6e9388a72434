"""Training into the folder of a run, resuming from its newest checkpoint; the weights that it leaves there."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from gradreg import environment, files
from gradreg.folders import locked
from gradreg.train.checkpoints.folders import Checkpoints
from gradreg.train.checkpoints.policy import Saver
from gradreg.train.checkpoints.save_and_load import own_copies
from gradreg.train.configuration import Config
from gradreg.train.devices import Devices
from gradreg.train.loop import train
from gradreg.train.outcome import Epoch, Outcome
from gradreg.train.run_folder import CHECKPOINTS, CONFIGURATION, ENVIRONMENT, METRICS, RESULT, TIMINGS, WEIGHTS, RunFolder, as_text
from gradreg.train.trackers import Trackers

_TIMES = ("seconds", "images_per_second")


def run_to_folder(
    path: Path,
    config: Config,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    *,
    report: Callable[[str], None] = lambda message: None,
    track: bool = True,
    devices: Devices | None = None,
) -> dict[str, Any]:
    """Train and write everything, resuming from the newest undamaged checkpoint if there is one.

    Args:
        path: the folder; created, with its parents, when the run starts.
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
    ended = _ended(path, config)
    devices = devices or Devices(config)
    with _locked(path, devices) if ended is None else nullcontext():
        ended = ended or _ended(path, config)  # which the process that has just left the folder may have written
        if ended is not None:
            report(f"the run in {str(path)!r} is complete; remove the folder to run it again")
            return ended
        return _run(path, config, on_epoch, report=report, track=track, devices=devices)


def _ended(path: Path, config: Config) -> dict[str, Any] | None:
    """The result in the folder, which must be free for ``config``."""
    folder = RunFolder(path)
    folder.check_free_for(config)
    return folder.result()


@contextmanager
def _locked(path: Path, devices: Devices) -> Generator[None]:
    """The folder, made and locked by the main process; where that cannot, every process raises its error."""
    with ExitStack() as stack:
        refused: OSError | None = None
        if devices.main:
            try:
                stack.enter_context(locked(path, purpose="--out"))
            except OSError as error:
                refused = error
        refused = devices.gather(refused)[0]
        if refused is not None:
            raise refused
        yield


def _run(
    path: Path,
    config: Config,
    on_epoch: Callable[[Epoch], None],
    *,
    report: Callable[[str], None],
    track: bool,
    devices: Devices,
) -> dict[str, Any]:
    checkpoints = Checkpoints(path / CHECKPOINTS, keep=config.checkpoint.keep)
    newest = next(checkpoints.whole(report if devices.main else lambda message: None), None)
    saver = Saver(checkpoints, config.checkpoint, devices)
    trackers: Trackers | None = None

    def begin(history: Sequence[Epoch]) -> None:
        nonlocal trackers
        files.write_text(path / CONFIGURATION, as_text(config))
        files.write_json(path / ENVIRONMENT, environment.describe())
        if newest is not None:
            report(f"resuming from {newest.name}, with {len(history)} of {config.epochs} epochs done")
        # Drop what an interrupted run wrote after its last checkpoint, because it will be written again.
        files.write_text(path / METRICS, "".join(map(_metrics_line, history)))
        files.write_text(path / TIMINGS, "".join(map(_timings_line, history)))
        if track:
            trackers = Trackers(config, path, first_step=history[-1].step if history else 0)

    def record(epoch: Epoch) -> None:
        files.append_text(path / METRICS, _metrics_line(epoch))
        files.append_text(path / TIMINGS, _timings_line(epoch))
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
        _save_weights(path, outcome)
        result = files.tied(result, path / CONFIGURATION)
        files.write_json(path / RESULT, result)
    devices.wait()
    return result


def _save_weights(path: Path, outcome: Outcome) -> None:
    kept: dict[str, dict[str, Any] | None] = {
        "last": outcome.weights,
        "best": outcome.best,
        "ema": None if outcome.ema is None else own_copies(outcome.ema.state_dict()),
    }
    for which, tensors in kept.items():
        if tensors is not None:
            files.write_bytes(path / WEIGHTS[which], safetensors.torch.save(tensors))


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
