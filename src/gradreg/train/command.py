"""``gradreg train RECIPE``: one run, with any key overridden, and its folder; ``gradreg train --resume RUN`` resumes one."""

from __future__ import annotations

import shlex
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from gradreg import checks, folders
from gradreg.study.tasks import Metric
from gradreg.train import recipe as recipes
from gradreg.train.arguments import CommandParser
from gradreg.train.configuration import Config

DESCRIPTION = (
    "Train one recipe, or one of its variants. Every key of it can be overridden, as in --optimizer.lr 0.1, --penalty.rho 0.1 or "
    "--penalty '{name: sam, rho: 0.05}'. "
    "gradreg train --resume RUN resumes an interrupted run from its folder alone. "
    "Several processes: accelerate launch --num_processes 2 -m gradreg train RECIPE --out RUN ..."
)

_LIVE_WIDTH = 80
"""Columns of a terminal from which on progress is one line that changes; below, and where the output is a file, it is a line an epoch."""


def main(argv: Sequence[str]) -> int:
    """Run ``gradreg train``; returns 0, 1 if the run diverged, or 128 + the number of the signal that stopped it."""
    parser = CommandParser("train", DESCRIPTION, default_recipe="")
    parser.add("--variant", type=str, help="train this variant of the recipe instead of its base")
    parser.add("--out", type=str, help="folder of the run (runs/train/RECIPE-VARIANT-seed-SEED-TIME)")
    parser.add("--resume", type=str, help="folder of an interrupted run to resume; nothing else is given beside it")
    options = parser.parse(argv)
    if options["resume"] is not None:
        folder, name, config = _interrupted(options["resume"], argv)
    else:
        if not options["recipe"]:
            raise ValueError("train needs a recipe or --resume RUN; got neither. gradreg recipes lists those that come with the package.")
        recipe = recipes.load(options["recipe"])
        config = recipe.configuration(parser.settings(argv, recipe.settings(options["variant"])), options["variant"])
        name = recipe.name
        folder = Path(options["out"]) if options["out"] else None

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from gradreg.train.checkpoints.policy import Stopped
    from gradreg.train.devices import Devices
    from gradreg.train.outcome import Epoch
    from gradreg.train.run_folder import CONFIGURATION
    from gradreg.train.run_to_folder import run_to_folder

    devices = Devices(config)
    if devices.processes > 1 and folder is None:
        raise ValueError("--out must be given with several processes, which write one folder; got none. Write --out runs/NAME.")
    console = Console(file=_Outlived(sys.stdout), soft_wrap=True, quiet=not devices.main, highlight=False)  # type: ignore[arg-type]
    metric = config.objective.judged
    penalty = config.described_penalty  # the number of steps in an epoch is not known before the data are loaded
    live = console.is_terminal and not console.is_dumb_terminal and console.width >= _LIVE_WIDTH
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (devices.main and live)) as progress:
        task = progress.add_task("epochs", total=config.epochs)

        def show(epoch: Epoch) -> None:
            if live:
                progress.update(task, completed=epoch.epoch, description=f"loss {epoch.train_loss:.4f}  {judged(epoch.to_dict(), metric)}")
            else:
                report(f"epoch {epoch.epoch}/{config.epochs}: loss {epoch.train_loss:.4f}, {judged(epoch.to_dict(), metric)}")

        def report(message: str) -> None:
            progress.console.print(checks.printable(message), markup=False)

        report(f"{name}: {config.model['name']} on {config.data.name}, {config.optimizer.name}, {penalty}")
        if folder is None:
            variant = f"-{options['variant']}" if options["variant"] else ""
            folder = folders.new_folder(Path(f"runs/train/{name}{variant}-seed-{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"))
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: report(f"warning: {message}")
                result = run_to_folder(folder, config, show, report=report, devices=devices)
        except Stopped as stopped:
            begun = (folder / CONFIGURATION).is_file()
            then = f"Resume with: gradreg train --resume {shlex.quote(str(folder))}" if begun else "Start it with the same command"
            report(f"{stopped}. {then}")
            return 128 + stopped.signal_number
        finally:
            devices.close()
    for line in _conclusion(result, folder, metric):
        report(line)
    return 1 if result["diverged"] else 0


class _Outlived:
    """A stream whose end the run outlives: a terminal that is closed, the reader of a pipe that leaves. Then nothing more is written."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._do(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._do(lambda stream: stream.flush())

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    @property
    def encoding(self) -> str:
        return self._stream.encoding if self._stream is not None else "utf-8"

    def _do(self, what: Callable[[TextIO], object]) -> None:
        if self._stream is not None:
            try:
                what(self._stream)
            except OSError:
                self._stream = None


def judged(found: Mapping[str, Any], metric: Metric) -> str:
    """The metric of an epoch or a result: on the validation images, if there are any, and on the test images."""
    named = {"validation": found.get(metric.validation), "test": found.get(metric.test)}
    return ", ".join(f"{split} {metric.text(value)}" for split, value in named.items() if value is not None)


def _interrupted(folder: str, argv: Sequence[str]) -> tuple[Path, str, Config]:
    from gradreg.train.run_folder import RunFolder

    if list(argv) not in (["--resume", folder], [f"--resume={folder}"]):
        raise ValueError(
            f"--resume must be the only argument, because a run resumes with its own configuration; got {' '.join(argv)!r}. "
            "Write gradreg train --resume RUN, or start another run with the changed keys and another --out."
        )
    return Path(folder), Path(folder).name, RunFolder(Path(folder)).configuration()


def _conclusion(result: dict[str, Any], folder: Path, metric: Metric) -> list[str]:
    cost = f"{result['gradient_evaluations']:g} gradient evaluations, {result['seconds']:.1f} s of training"
    if result["diverged"]:
        return [f"diverged by epoch {result['epochs']}: its loss is not finite, or more than twice that of the untrained model ({cost})"]
    return [f"{judged(result, metric)}, train loss {result['train_loss']:.4f} ({cost})", f"run folder: {folder}"]
