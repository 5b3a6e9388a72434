"""``gradreg train RECIPE``: one run, with any key overridden, and its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gradreg.train import recipe as recipes
from gradreg.train.arguments import CommandParser, configuration

DESCRIPTION = "Train one recipe. Every key can be overridden, as in --optimizer.lr 0.1 or --penalty '{name: sam, rho: 0.05}'."


def main(words: Sequence[str]) -> int:
    """Run ``gradreg train``; returns 0, or 1 if the run diverged."""
    parser = CommandParser("train", DESCRIPTION)
    parser.options.add_argument("--variant", type=str, help="train this variant of the recipe instead of its base")
    parser.options.add_argument(
        "--out", type=str, help="folder of the run: config.yaml, environment.json, metrics.jsonl, weights.safetensors, result.json"
    )
    options = parser.parse(words)
    recipe = recipes.load(options["recipe"])
    config = configuration(recipe.settings(options["variant"], base=parser.settings(words, recipe.base)))

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from gradreg.train.loop import Epoch, train
    from gradreg.train.run_folder import RunFolder

    console = Console(soft_wrap=True)
    penalty = config.gradient_penalty()
    console.print(
        f"{recipe.name}: {config.model['name']} on {config.data.name}, {config.optimizer.name}, {penalty or 'no penalty'}", markup=False
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("epochs", total=config.epochs)

        def show(epoch: Epoch) -> None:
            text = f"loss {epoch.train_loss:.4f}  test accuracy {100 * epoch.test_accuracy:.2f} %"
            progress.update(task, completed=epoch.epoch, description=text)

        if options["out"] is None:
            result = train(config, on_epoch=show).summary()
        else:
            folder = RunFolder(Path(options["out"]))
            result = folder.run(config, on_epoch=show)
    cost = f"{result['gradient_evaluations']} gradient evaluations, {result['seconds']:.1f} s of training"
    if result["diverged"]:
        console.print(
            f"diverged by epoch {result['epochs']}: its loss is not finite, or more than twice that of the untrained model ({cost})"
        )
        return 1
    console.print(f"test accuracy {100 * result['test_accuracy']:.2f} %, train loss {result['train_loss']:.4f} ({cost})")
    if options["out"] is not None:
        console.print(f"run folder: {options['out']}", markup=False)
    return 0
