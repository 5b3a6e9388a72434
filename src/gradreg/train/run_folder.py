"""A run is a folder: the resolved configuration, the environment, a line of metrics an epoch, the final weights and the result."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml

from gradreg import files
from gradreg.train import environment
from gradreg.train.configuration import Config
from gradreg.train.loop import Epoch, Outcome, train

CONFIGURATION = "config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
WEIGHTS = "weights.safetensors"
RESULT = "result.json"


class RunFolder:
    """One run's files under ``path``; a run is complete when ``result.json`` stands there, which is written last.

    Args:
        path: the folder; made, with its parents, when the run starts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def result(self) -> dict[str, Any] | None:
        """What the completed run ended with; None if there is none."""
        file = self.path / RESULT
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def history(self) -> list[Epoch]:
        """The epochs of the run."""
        lines = (self.path / METRICS).read_text(encoding="utf-8").splitlines()
        return [Epoch(**_from_json(json.loads(line))) for line in lines]

    def check_free_for(self, config: Config) -> None:
        """Fail if the folder holds a run of another configuration: a run folder is never shared by two.

        Raises:
            ValueError: naming the keys that differ.
        """
        file = self.path / CONFIGURATION
        if not file.is_file():
            return
        held = yaml.safe_load(file.read_text(encoding="utf-8"))
        wanted = asdict(config)
        different = _differences(held, wanted)
        if different:
            raise ValueError(
                f"{str(self.path)!r} holds a run of another configuration; it differs in {', '.join(different)}. "
                "Choose another --out, or remove that folder."
            )

    def run(self, config: Config, on_epoch: Any = lambda epoch: None) -> dict[str, Any]:
        """Train and write everything; returns the content of ``result.json``."""
        self.check_free_for(config)
        files.make_directory(self.path, purpose="--out")
        (self.path / RESULT).unlink(missing_ok=True)
        files.write_text(self.path / CONFIGURATION, yaml.safe_dump(asdict(config), sort_keys=False))
        files.write_json(self.path / ENVIRONMENT, environment.describe())
        lines: list[str] = []

        def record(epoch: Epoch) -> None:
            lines.append(json.dumps(_to_json(asdict(epoch)), allow_nan=False))
            with (self.path / METRICS).open("w" if epoch.epoch == 1 else "a", encoding="utf-8") as file:
                file.write(lines[-1] + "\n")
            on_epoch(epoch)

        outcome = train(config, on_epoch=record)
        self._save_weights(outcome)
        result = outcome.summary()
        files.write_json(self.path / RESULT, result)
        return result

    def _save_weights(self, outcome: Outcome) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in outcome.model.state_dict().items()}
        files.write_bytes(self.path / WEIGHTS, safetensors.torch.save(tensors))


def _to_json(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN or infinity: they are written as strings, so that a diverged run's lines are still JSON."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _from_json(values: dict[str, Any]) -> dict[str, Any]:
    return {k: float(v) if isinstance(v, str) else v for k, v in values.items()}


def _differences(held: Any, wanted: Any, prefix: str = "") -> list[str]:
    if isinstance(held, dict) and isinstance(wanted, dict):
        keys = [*held, *(k for k in wanted if k not in held)]
        return [d for k in keys for d in _differences(held.get(k), wanted.get(k), f"{prefix}.{k}" if prefix else k)]
    return [] if held == wanted else [prefix]
