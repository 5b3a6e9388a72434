"""``gradreg evaluate RUN``: a trained run's loss and metric, on its own or other data."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from gradreg import checks
from gradreg.train.arguments import CommandParser
from gradreg.train.configuration import Config
from gradreg.train.recipe import configuration

if TYPE_CHECKING:
    from gradreg.train.devices import Devices
    from gradreg.train.evaluation import Evaluation

DESCRIPTION = (
    "Evaluate the weights of a run on its test set or its validation images, every image once. Keys of the evaluation can be overridden, "
    "as in --data.root ELSEWHERE, --data.name svhn or --device cpu; other data are normalized like the run's own."
)
SPLITS = ("test", "validation")
DEPENDS_ON = (
    *("data", "model", "loss", "metric", "augmentation.normalize", "batch_size", "evaluation_batch_size", "precision", "device", "threads"),
    *("seed", "code"),
)
"""Keys that change an evaluation; the others concern training."""


def main(argv: Sequence[str]) -> int:
    """Run ``gradreg evaluate``; returns 0."""
    parser = CommandParser("evaluate", DESCRIPTION, positional=("run", "folder of the run"))
    parser.add("--weights", type=str, default="last", help="last, best or ema")
    parser.add("--split", type=str, default="test", help="test, or validation where the run has such images")
    parser.add("--json", action="store_true", help="print one line of JSON instead of text")
    options = parser.parse(argv)

    checks.choice("--split", options["split"], SPLITS)
    config, file = configuration_and_weights(parser, argv, options["run"], options["weights"])

    from gradreg.train.devices import Devices

    devices = Devices(config)
    try:
        found, images = _evaluated(config, file, options["split"], devices)
    finally:
        devices.close()
    if not devices.main:
        return 0
    if options["json"]:
        # JSON has no NaN, which is the loss of weights that diverged.
        values = {"loss": found.loss, **found.metrics}
        numbers = {key: value if math.isfinite(value) else None for key, value in values.items()}
        counted = {"samples" if config.data.is_own else "images": images}
        print(json.dumps({**numbers, **counted, "split": options["split"], "weights": options["weights"]}, allow_nan=False))
    else:
        metric, what = config.objective.judged, "samples" if config.data.is_own else "images"
        values = [metric.text(value) for name, value in found.metrics.items() if name == metric.name]
        values += [f"top-5 {100 * found.top5:.2f} %"] if "top5" in found.metrics else []
        shown = ", ".join([*values, f"loss {found.loss:.4f}"])
        print(f"{options['split']}, {images:,} {what}, {options['weights']} weights: {shown}")
    return 0


def configuration_and_weights(parser: CommandParser, argv: Sequence[str], run: str, weights: str) -> tuple[Config, Path]:
    """What a trained run is evaluated with: its configuration, with the keys of ``argv`` that an evaluation depends on, and a file.

    Raises:
        ValueError: no such run or weights, or a key that concerns training.
    """
    from gradreg.train.run_folder import WEIGHTS, RunFolder, differences

    checks.choice("--weights", weights, tuple(WEIGHTS))
    folder = RunFolder(Path(run))
    trained = folder.configuration()
    config = configuration(parser.settings(argv, asdict(trained)))
    for key in differences(asdict(trained), asdict(config)):
        if not f"{key}.".startswith(tuple(f"{read}." for read in DEPENDS_ON)):
            raise ValueError(
                f"--{key} must be left out, because an evaluation does not depend on it. It can change {', '.join(DEPENDS_ON)}."
            )
    if config.augmentation.normalize == "auto":
        config.augmentation.normalize = trained.data.name
    config.parallel = "ddp"  # each process holds the whole model, even if the run sharded it
    file = folder.path / WEIGHTS[weights]
    if not file.is_file():
        there = [which for which, name in WEIGHTS.items() if (folder.path / name).is_file()]
        remedy = f"It has {', '.join(there)}." if there else "Finish it first: gradreg train --resume RUN."
        raise ValueError(f"--weights must name weights that the run in {run!r} has; got {weights!r}. {remedy}")
    return config, file


def _evaluated(config: Config, weights: Path, split: str, devices: Devices) -> tuple[Evaluation, int]:
    """The evaluation of a weights file on a split, and the number of its images."""
    import torch

    from gradreg.train import models
    from gradreg.train.evaluation import evaluate
    from gradreg.train.loop import load_data
    from gradreg.train.run_to_folder import load_weights

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data = load_data(config, devices)
    samples = data.test if split == "test" else data.validation
    if samples is None:
        raise ValueError("--split must name images that there are; got 'validation' of a run without any. Use --split test.")
    model = models.create(config.model, classes=data.classes, image_shape=data.image_shape, code=config.code)
    model.to(devices.device, torch.float64 if config.precision == "fp64" else None)  # before it is given weights, which might be fp64
    load_weights(model, weights)
    size = config.evaluation_batch_size or (1000 if data.in_memory else config.batch_size)
    found = evaluate(model, samples, batch_size=size, devices=devices, precision=config.precision, objective=config.objective)
    return found, len(samples)
