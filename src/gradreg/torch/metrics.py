"""What a regularized step did, for loggers; there is no device sync until a value is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradreg.torch.norms import gradient_norm, local_shards, ratio_or_zero


class Metrics(Mapping[str, float]):
    """A read-only mapping of names to numbers, also reachable as attributes (``metrics.gradient_norm``).

    Keys:
        gradient_norm: L2 norm of the first pass's gradient over all perturbed parameters; NaN before the first step, and at steps of one
            plain pass that began with a gradient already in ``.grad`` or without ``measure_norm``. Reading it takes a device sync.
        strength: the penalty's strength at that step (λ or γ); 0 while held-out data say that it does not help.
        radius: its radius at that step (r, ρ or ε); NaN for an exact penalty.
        coefficient: c = strength / radius, the weight of the second gradient; NaN for an exact penalty.
        cosine: between the gradient at the unperturbed parameters and the first one at perturbed ones, -1 to 1; NaN unless
            ``measure_cosine``, and where no perturbed parameter has a gradient.
        evaluations: gradient evaluations so far, over all steps.

    Beside them ``shares``, which is no key, because it is not one number.

    Args:
        values: the numbers by key.
        lengths: a multiple of the L2 norm of the perturbation in each parameter, by its name.
    """

    def __init__(self, values: dict[str, float | torch.Tensor], lengths: Mapping[str, Tensor] | None = None) -> None:
        self._values = values
        self._lengths = lengths or {}
        self._shares: dict[str, float] | None = None

    @property
    def shares(self) -> dict[str, float]:
        """By parameter name, its share of the squared norm of the step's (first) perturbation; they sum to 1.

        Empty unless ``measure_shares``, at steps without a perturbation, and where it is zero. Reading it takes one device sync.
        """
        if self._shares is None:
            lengths = (
                torch.stack([n.detach().to("cpu", torch.float64) for n in self._lengths.values()]) if self._lengths else torch.zeros(0)
            )
            squares = (lengths / lengths.max()).square() if len(lengths) and lengths.max() > 0 else lengths.new_zeros(0)
            found = (squares / squares.sum()).tolist()
            self._shares = dict(zip(self._lengths, found, strict=False)) if found else {}
        return dict(self._shares)

    def __getitem__(self, key: str) -> float:
        value = self._values[key]
        if isinstance(value, torch.Tensor):
            value = self._values[key] = float(value)
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copying and pickling ask for these before there are any values
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


class Alignment:
    """The cosine between the first gradient and the one that a later pass adds to ``.grad``.

    Costs two copies of the gradients while it is measured, which is why it is only done on request.

    Args:
        parameters: the perturbed parameters that have a gradient.
        first: their gradients after the first pass.
        weight: the weight with which the first pass entered.
    """

    def __init__(self, parameters: Sequence[Tensor], first: Sequence[Tensor], weight: float) -> None:
        self._parameters = list(parameters)
        self._first = [g.detach().clone() for g in first]
        self._weight = weight
        self._before: list[Tensor] = []

    def before_pass(self) -> None:
        """Copy ``.grad`` before the second pass adds to it."""
        self._before = self._gathered()

    @torch.no_grad()
    def after_pass(self, weight: float) -> Tensor:
        """The cosine, from what the pass of ``weight`` added: 1 − ‖û − v̂‖²/2 of the normalized gradients; 0 if one of them is 0."""
        second = self._gathered()
        torch._foreach_sub_(local_shards(second), local_shards(self._before))
        norms = gradient_norm(self._first), gradient_norm(second)
        torch._foreach_mul_(local_shards(self._first), ratio_or_zero(1.0 if self._weight > 0 else -1.0, norms[0]))
        torch._foreach_mul_(local_shards(second), ratio_or_zero(1.0 if weight > 0 else -1.0, norms[1]))
        torch._foreach_sub_(local_shards(second), local_shards(self._first))
        cosine = 1.0 - gradient_norm(second).square() / 2.0
        return torch.where((norms[0] > 0) & (norms[1] > 0), cosine, torch.zeros_like(cosine))

    def _gathered(self) -> list[Tensor]:
        """Copies of what ``.grad`` holds now."""
        held: list[Tensor] = []
        for p, f in zip(self._parameters, self._first, strict=True):
            gradient = None if p.grad is None else p.grad.detach()
            held.append(torch.zeros_like(f) if gradient is None else gradient.to_dense() if gradient.is_sparse else gradient.clone())
        return held
