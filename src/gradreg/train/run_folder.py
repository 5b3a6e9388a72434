"""A run is a folder: the resolved configuration, the environment, metrics and times, checkpoints, final weights, and the result.

Here it is read, without importing PyTorch; ``run_to_folder`` writes it.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from gradreg import checks, files
from gradreg.train.configuration import Config
from gradreg.train.outcome import Epoch
from gradreg.train.recipe import configuration
from gradreg.train.sharpness import SharpnessConfig
from gradreg.train.strict_yaml import read_text, read_yaml

CONFIGURATION = "config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
CHECKPOINTS = "checkpoints"
RESULT = "result.json"
WEIGHTS = {"last": "weights.safetensors", "best": "best.safetensors", "ema": "ema.safetensors"}
"""Kind of weights -> file: at the end, of the best epoch, and their EMA."""


class RunFolder:
    """One run's files under ``path``; a run is complete when ``result.json`` exists, which is written last.

    Args:
        path: the folder.
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
        if read_text(file) == as_text(config):
            return  # a comparison asks this of each of its runs, and reading YAML takes ten times as long as writing it
        before = {"sharpness": asdict(SharpnessConfig())}  # what a folder holds that is older than the key
        different = differences({**before, **self._held()}, asdict(config))
        different = [key for key in different if not (key.startswith("code.") and key.endswith(".file"))]  # a file may have been moved
        if different:
            changed = " (the content of that file has changed)" if all(key.startswith("code.") for key in different) else ""
            raise ValueError(
                f"{str(self.path)!r} holds a run of another configuration; it differs in {', '.join(different)}{changed}. "
                "Choose another --out, or remove that folder."
            )


def as_text(config: Config) -> str:
    """The content of ``config.yaml``."""
    return yaml.dump(asdict(config), Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False)


def _from_json(values: dict[str, Any]) -> dict[str, Any]:
    return {k: float(v) if isinstance(v, str) else v for k, v in values.items()}


def differences(held: Any, wanted: Any, prefix: str = "") -> list[str]:
    """The dotted keys in which two configurations, nested plain values, differ."""
    if isinstance(held, dict) and isinstance(wanted, dict):
        keys = [*held, *(k for k in wanted if k not in held)]
        return [d for k in keys for d in differences(held.get(k), wanted.get(k), f"{prefix}.{k}" if prefix else k)]
    return [] if held == wanted else [prefix]
