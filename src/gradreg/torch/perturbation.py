"""Moving the parameters along a direction and putting them back bit for bit: all arithmetic in a few ``torch._foreach`` operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm over all ``gradients`` together, a 0-dimensional tensor on the first one's device; no synchronisation."""
    if not gradients:
        return torch.zeros(())
    return torch.nn.utils.get_total_norm(gradients, foreach=True)


def safe_ratio(numerator: float, norm: Tensor) -> Tensor:
    """``numerator / norm``, and 0 where the norm is 0: a zero gradient has no direction, and is not perturbed rather than made NaN."""
    return torch.where(norm > 0, numerator / norm, 0.0)


class Perturbation:
    """θ → θ + step·G → … → θ, with one preallocated copy of the parameters and nothing else.

    The copy is what restores them, so that they come back bit for bit: adding and subtracting the same step does not do that.
    """

    def __init__(self) -> None:
        self._copies: dict[Tensor, Tensor] = {}
        self._moved: list[Tensor] = []

    @torch.no_grad()
    def move(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: float | Tensor) -> None:
        """θ ← θ + step·G, remembering θ; ``step`` is a number, or a 0-dimensional tensor so that nobody waits for its value.

        ``gradients`` are only read. Without parameters (those selected have no gradient in this step) nothing moves.
        """
        if not parameters:
            return
        copies = [self._copy_of(p) for p in parameters]
        torch._foreach_copy_(copies, list(parameters))
        self._moved = list(parameters)
        if not isinstance(step, Tensor):
            torch._foreach_add_(self._moved, list(gradients), alpha=step)
        elif step.device.type != "cpu" and all(p.device == step.device for p in self._moved):
            # On an accelerator addcmul with a broadcast factor would launch a kernel a tensor; these three are fused over all of them.
            torch._foreach_copy_(self._moved, list(gradients))
            torch._foreach_mul_(self._moved, step)
            torch._foreach_add_(self._moved, copies)
        else:
            torch._foreach_addcmul_(self._moved, list(gradients), [step.to(p.device) for p in self._moved])

    @torch.no_grad()
    def mirror(self) -> None:
        """θ + δ → θ − δ, by 2θ − (θ + δ)."""
        if self._moved:
            torch._foreach_lerp_(self._moved, [self._copies[p] for p in self._moved], 2.0)

    @torch.no_grad()
    def restore(self) -> None:
        """Put θ back, bit for bit; nothing happens if it has not been moved."""
        if self._moved:
            torch._foreach_copy_(self._moved, [self._copies[p] for p in self._moved])
            self._moved = []

    def _copy_of(self, parameter: Tensor) -> Tensor:
        copy = self._copies.get(parameter)
        if copy is None or copy.shape != parameter.shape or copy.dtype != parameter.dtype or copy.device != parameter.device:
            copy = self._copies[parameter] = torch.empty_like(parameter, requires_grad=False)
        return copy
