"""``gradreg train RECIPE``: one run, with any key overridden, and its folder; ``gradreg train --resume RUN`` resumes one."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradreg.train import recipe as recipes
from gradreg.train.arguments import CommandParser
from gradreg.train.configuration import Config

DESCRIPTION = (
    "Train one recipe, or one of its variants. Every key of it can be overridden, as in --optimizer.lr 0.1, --penalty.rho 0.1 or "
    "--penalty '{name: sam, rho: 0.05}'. "
    "gradreg train --resume RUN resumes an interrupted run from its folder alone. "
    "Several processes: accelerate launch --num_processes 2 -m gradreg train RECIPE --out RUN ..."
)


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
        folder = Path(options["out"]) if options["out"] else _new_folder(recipe.name, options["variant"], config.seed)

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from gradreg.train.checkpoints.policy import Stopped
    from gradreg.train.devices import Devices
    from gradreg.train.outcome import Epoch
    from gradreg.train.run_folder import RunFolder

    devices = Devices(config)
    if devices.processes > 1 and options["out"] is None and options["resume"] is None:
        raise ValueError("--out must be given with several processes, which write one folder; got none. Write --out runs/NAME.")
    console = Console(soft_wrap=True, quiet=not devices.main, highlight=False)
    penalty = config.resolved_penalty(1)  # the number of steps in an epoch is not known before the data are loaded
    console.print(f"{name}: {config.model['name']} on {config.data.name}, {config.optimizer.name}, {penalty}", markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (devices.main and console.is_terminal)) as progress:
        task = progress.add_task("epochs", total=config.epochs)

        def show(epoch: Epoch) -> None:
            text = f"loss {epoch.train_loss:.4f}  test accuracy {100 * epoch.test_accuracy:.2f} %"
            progress.update(task, completed=epoch.epoch, description=text)

        def report(message: str) -> None:
            progress.console.print(message, markup=False)

        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: report(f"warning: {message}")
                result = RunFolder(folder).run(config, show, report=report, devices=devices)
        except Stopped as stopped:
            report(f"{stopped}. Resume with: gradreg train --resume {folder}")
            return 128 + stopped.signal_number
        finally:
            devices.close()
    return _conclude(console, result, folder)


def _interrupted(folder: str, argv: Sequence[str]) -> tuple[Path, str, Config]:
    from gradreg.train.run_folder import RunFolder

    if list(argv) not in (["--resume", folder], [f"--resume={folder}"]):
        raise ValueError(
            f"--resume must be the only argument, because a run resumes with its own configuration; got {' '.join(argv)!r}. "
            "Write gradreg train --resume RUN, or start another run with the changed keys and another --out."
        )
    return Path(folder), Path(folder).name, RunFolder(Path(folder)).configuration()


def _new_folder(recipe: str, variant: str | None, seed: int) -> Path:
    stem = f"runs/train/{recipe}{f'-{variant}' if variant else ''}-seed-{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
    return next(path for path in map(Path, names) if not path.exists())


def _conclude(console: Any, result: dict[str, Any], folder: Path) -> int:
    cost = f"{result['gradient_evaluations']:g} gradient evaluations, {result['seconds']:.1f} s of training"
    if result["diverged"]:
        console.print(
            f"diverged by epoch {result['epochs']}: its loss is not finite, or more than twice that of the untrained model ({cost})"
        )
        return 1
    console.print(f"test accuracy {100 * result['test_accuracy']:.2f} %, train loss {result['train_loss']:.4f} ({cost})")
    console.print(f"run folder: {folder}", markup=False)
    return 0
