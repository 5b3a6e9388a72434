"""What the last regularized step did, for loggers: read without cost, and without a device synchronisation until a value is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch


class Metrics(Mapping[str, float]):
    """A read-only mapping of names to numbers, also reachable as attributes (``metrics.gradient_norm``).

    Keys:
        gradient_norm: L2 norm of the first pass's gradient over all perturbed parameters; NaN before the first step, and at steps of one
            plain pass that began with a gradient already in ``.grad`` or without ``measure_norm``. Reading it is what waits for the device.
        strength: the penalty's strength at that step (λ or γ).
        radius: its radius at that step (r, ρ or ε); NaN for an exact penalty.
        coefficient: c = strength / radius, the weight of the second gradient; NaN for an exact penalty.
        cosine: between the gradient at the unmoved parameters and the first one at moved ones, -1 to 1; NaN unless ``measure_cosine``, and
            where no perturbed parameter has a gradient.
        evaluations: gradient evaluations so far, over all steps.
    """

    def __init__(self, values: dict[str, float | torch.Tensor]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> float:
        value = self._values[key]
        if isinstance(value, torch.Tensor):
            value = self._values[key] = float(value)
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for by copying and pickling before there is anything to look into
            raise AttributeError(name)
        if name not in self._values:
            raise AttributeError(f"metrics has no {name!r}; it has {', '.join(self._values)}.")
        return self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Metrics({dict(self)})"
