"""How well the gradient at the moved parameters agrees with the one at the unmoved: their cosine, measured on request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradreg.torch.gradients import dense
from gradreg.torch.norms import gradient_norm, ratio_or_zero
from gradreg.torch.parallel import local_shards


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
        """Remember what ``.grad`` holds before the second pass adds to it."""
        self._before = [
            torch.zeros_like(f) if p.grad is None else dense(p.grad.detach()).clone()
            for p, f in zip(self._parameters, self._first, strict=True)
        ]

    @torch.no_grad()
    def after_pass(self, weight: float) -> Tensor:
        """The cosine, from what the pass of ``weight`` added: 1 − ‖û − v̂‖²/2 of the normalised two; 0 if one of them is 0."""
        second = [
            torch.zeros_like(b) if p.grad is None else dense(p.grad.detach()).clone()
            for p, b in zip(self._parameters, self._before, strict=True)
        ]
        torch._foreach_sub_(local_shards(second), local_shards(self._before))
        norms = gradient_norm(self._first), gradient_norm(second)
        torch._foreach_mul_(local_shards(self._first), ratio_or_zero(1.0 if self._weight > 0 else -1.0, norms[0]))
        torch._foreach_mul_(local_shards(second), ratio_or_zero(1.0 if weight > 0 else -1.0, norms[1]))
        torch._foreach_sub_(local_shards(second), local_shards(self._first))
        cosine = 1.0 - gradient_norm(second).square() / 2.0
        return torch.where((norms[0] > 0) & (norms[1] > 0), cosine, torch.zeros_like(cosine))
