"""``gradreg l2 probe`` predicts the L2 of a run from a short one; ``gradreg l2 clock`` prints the clock of weight decay."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from gradreg import checks, files
from gradreg.command_lines import Parser
from gradreg.weight_decay_clock import DecayClock

USAGE = """usage: gradreg l2 probe RECIPE --budget-epochs N ...
       gradreg l2 clock --lr LR --weight-decay L2 --batch-size N --samples N ...

probe  train briefly at a large L2 and predict the best L2 for N epochs
clock  the clock of weight decay, its timescale, and the same for another batch size, data size or learning rate

gradreg l2 probe --help and gradreg l2 clock --help explain the options."""

PROBE = (
    "Train the recipe briefly at a large L2 and a constant learning rate, and predict the best weight decay for a run of "
    "--budget-epochs: the time to the best accuracy is in proportion to 1 / (learning rate * L2). Any key of the recipe can be overridden."
)
CLOCK = (
    "The clock of weight decay: lr * weight decay * steps. Runs with equal timescales in epochs are comparable. With any of --to-lr, "
    "--to-batch-size and --to-samples, also the weight decay that keeps that timescale."
)


def main(argv: Sequence[str]) -> int:
    """Run ``gradreg l2``; returns 0, or 1 if the probe allows no prediction."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    actions = {"probe": probe, "clock": clock}
    if argv[0] not in actions:
        raise ValueError(checks.unknown("action of gradreg l2", argv[0], actions))
    return actions[argv[0]](argv[1:])


def clock(argv: Sequence[str]) -> int:
    """Run ``gradreg l2 clock``."""
    parser = Parser(prog="gradreg l2 clock", description=CLOCK, allow_abbrev=False)
    parser.add_argument("--lr", type=float, required=True, help="learning rate; the mean over the run if it has a schedule")
    parser.add_argument("--weight-decay", type=float, required=True, help="weight decay as in PyTorch")
    parser.add_argument("--batch-size", type=int, required=True, help="examples a step")
    parser.add_argument("--samples", type=int, required=True, help="training examples in an epoch")
    parser.add_argument("--momentum", type=float, default=0.0, help="momentum of SGD; 0 for decoupled weight decay (AdamW)")
    parser.add_argument("--epochs", type=float, help="length of the run")
    parser.add_argument("--to-lr", type=float, help="learning rate of another run")
    parser.add_argument("--to-batch-size", type=int, help="batch size of another run")
    parser.add_argument("--to-samples", type=int, help="training examples of another run")
    options = parser.parse_args(_joined(argv))
    here = DecayClock(
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        batch_size=options.batch_size,
        samples=options.samples,
        momentum=options.momentum,
    )
    print(f"decay a step, lr * weight decay{' / (1 - momentum)' if options.momentum else ''}: {here.rate:.4g}")
    print(f"timescale: {here.timescale_steps:.4g} steps = {here.timescale_epochs:.4g} epochs")
    if options.epochs is not None:
        steps = checks.positive("--epochs", options.epochs) * here.steps_per_epoch
        print(f"clock after {options.epochs:g} epochs: {here.elapsed(steps):.4g} timescales")
    if (options.to_lr, options.to_batch_size, options.to_samples) != (None, None, None):
        there = here.transfer(learning_rate=options.to_lr, batch_size=options.to_batch_size, samples=options.to_samples)
        print(
            f"same timescale in epochs with lr {there.learning_rate:g}, batch size {there.batch_size}, {there.samples} samples: "
            f"weight decay {there.weight_decay:.4g}"
        )
    return 0


def _joined(argv: Sequence[str]) -> list[str]:
    """``--option -5e-4`` as ``--option=-5e-4``: argparse takes negative numbers with an exponent for options."""
    joined: list[str] = []
    for word in argv:
        if joined and joined[-1].startswith("--") and "=" not in joined[-1] and re.fullmatch(r"-[\d.].*", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def probe(argv: Sequence[str]) -> int:
    """Run ``gradreg l2 probe``."""
    from gradreg.study import l2_probe
    from gradreg.study.executors.executor import command_options, from_command
    from gradreg.train import recipe as recipes
    from gradreg.train.arguments import CommandParser

    parser = CommandParser("l2 probe", PROBE)
    parser.add("--variant", type=str, help="probe this variant of the recipe instead of its base")
    parser.add("--budget-epochs", type=int, required=True, help="epochs of the run for which L2 is to be predicted")
    parser.add("--probe-l2", type=float, default=0.1, help="L2 of the probe: large, so that the best accuracy comes early")
    parser.add("--probe-epochs", type=int, default=2, help="epochs of the probe")
    parser.add("--measure-every", type=int, default=10, help="steps from one measurement to the next")
    parser.add("--smooth", type=int, default=1, help="measurements in a centered mean before the best is picked, odd")
    parser.add("--out", type=str, help="folder for probe.json and probe.png (runs/RECIPE-l2-probe)")
    parser.add("--apply", type=str, help="write the recipe with the predicted weight decay and --budget-epochs to this file")
    for option, keywords in command_options(leave_out=["--workers"]):
        parser.add(option, **keywords)
    options = parser.parse(argv)
    executor = from_command(options)
    recipe = recipes.load(options["recipe"])
    settings = recipe.settings(options["variant"], base=parser.settings(argv, recipe.base))
    plan = l2_probe.make_plan(
        recipe.configuration(settings, options["variant"]),
        budget_epochs=options["budget_epochs"],
        probe_l2=options["probe_l2"],
        probe_epochs=options["probe_epochs"],
        measure_every=options["measure_every"],
        smooth=options["smooth"],
    )
    target = None if options["apply"] is None else Path(options["apply"])
    if target is not None and target.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--apply must name a file that ends in .yaml; got {options['apply']!r}.")
    folder = files.make_directory(Path(options["out"] or f"runs/{recipe.name}-l2-probe"), purpose="--out")
    data = plan.config.data
    print(
        f"probe: {plan.config.epochs} epochs at L2 {plan.config.optimizer.weight_decay:g}, {100 * plan.share:.3g} % of the budget, "
        f"on {data.training_images()} images; validation: {data.validation} of the training images"
    )
    found = l2_probe.run_probe(plan) if executor.name == "local" else l2_probe.run_probe_on(plan, executor, folder)
    files.write_json(folder / "probe.json", found.result())
    from gradreg.study.l2_figures import draw_probe

    picture = draw_probe(found, folder / "probe.png")
    print(f"best validation accuracy {100 * max(found.smoothed):.2f} % at step t* = {found.best_step} of {found.probe_steps}")
    print(f"c = lr{' / (1 - momentum)' if found.momentum else ''} * L2 * t* = {found.constant:.4g}")
    print(f"picture: {picture}")
    if found.rejection is not None:
        print(found.rejection)
        return 1
    predicted = found.predicted_l2()
    if not math.isclose(found.budget_learning_rate, found.learning_rate, rel_tol=1e-6):
        print(
            f"mean learning rate of the budget under its schedule: {found.budget_learning_rate:.4g} (the probe's: {found.learning_rate:g})"
        )
    print(f"predicted weight decay for {plan.budget.epochs} epochs ({found.budget_steps} steps): {predicted:.4g}")
    if target is not None:
        import yaml

        content = asdict(plan.recipe)
        content["epochs"] = plan.budget.epochs
        content["optimizer"]["weight_decay"] = float(f"{predicted:.4g}")
        content.pop("weight_decay", None)
        text = yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False)
        note = f"# {recipe.name} with the weight decay that gradreg l2 probe predicted for {plan.budget.epochs} epochs\n"
        recipes.parse_recipe(target.stem, text)
        files.write_text(target, note + text)
        print(f"recipe: {target}")
    return 0
