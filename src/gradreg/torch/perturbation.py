"""Moving the parameters along a direction and putting them back bit for bit: all arithmetic in a few ``torch._foreach`` operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradreg.torch.parallel import local_shards, squared_norm_groups
from gradreg.torch.precision import LOW_PRECISION, warn_of_rounding

_SMALLEST_NORM = 1e-30
"""Gradients shorter than this are lengthened less than the radius asks, for 1 / norm must stay finite in float32."""


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm over all ``gradients`` together, a 0-dimensional tensor on the first one's device; no synchronisation.

    Sharded gradients count whole, whichever ranks hold them. Half precision is summed in float32, where its squares fit.
    """
    if not gradients:
        return torch.zeros(())
    norms: list[Tensor] = []
    for over, shards in squared_norm_groups(gradients):
        norm = _norm_of(shards)
        if over:
            from torch.distributed import all_reduce

            square = norm.square()
            for group in over:
                all_reduce(square, group=group)
            norm = square.sqrt()
        norms.append(norm)
    return norms[0] if len(norms) == 1 else _norm_of(norms)


def _norm_of(tensors: list[Tensor]) -> Tensor:
    low = [t for t in tensors if t.dtype in LOW_PRECISION]
    high = tensors if not low else [t for t in tensors if t.dtype not in LOW_PRECISION]
    norms: list[Tensor] = []
    if high:
        norms.extend(torch._foreach_norm(high, 2))
    if low:
        norms.extend(torch._foreach_norm(low, 2, dtype=torch.float32))
    device = tensors[0].device
    return torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]), 2)


def safe_ratio(numerator: float, norm: Tensor) -> Tensor:
    """``numerator / norm``, finite where the norm is 0: times a gradient of zeros it gives zeros, so nothing is perturbed or made NaN."""
    return numerator / norm.clamp_min(_SMALLEST_NORM)


def ratio_or_zero(numerator: float, norm: Tensor) -> Tensor:
    """``numerator / norm``, and 0 where the norm is 0: for what is multiplied with more than the gradient that has this norm."""
    return (numerator / norm).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


class Perturbation:
    """θ → θ + step·G → … → θ, with one preallocated copy of the parameters and nothing else.

    The copy is what restores them, so that they come back bit for bit: adding and subtracting the same step does not do that.
    """

    def __init__(self) -> None:
        self._copies: dict[Tensor, Tensor] = {}
        self._moved: list[Tensor] = []
        self._moved_copies: list[Tensor] = []
        self._checked_rounding = False

    @torch.no_grad()
    def move(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: float | Tensor) -> None:
        """θ ← θ + step·G, remembering θ; ``step`` is a number, or a 0-dimensional tensor so that nobody waits for its value.

        ``gradients`` are only read. Of sharded parameters and gradients this rank's shards are moved. Without
        parameters (those selected have no gradient in this step) nothing moves.
        """
        if not parameters:
            return
        here, gradients = local_shards(parameters), local_shards(gradients)
        self._moved_copies = copies = [self._copy_of(p, shard) for p, shard in zip(parameters, here, strict=True)]
        torch._foreach_copy_(copies, here)
        self._moved = here
        if not isinstance(step, Tensor):
            torch._foreach_add_(self._moved, gradients, alpha=step)
        elif step.device.type != "cpu" and all(p.device == step.device for p in self._moved):
            # On an accelerator addcmul with a broadcast factor would launch a kernel a tensor; these three are fused over all of them.
            torch._foreach_copy_(self._moved, gradients)
            torch._foreach_mul_(self._moved, step)
            torch._foreach_add_(self._moved, copies)
        else:
            torch._foreach_addcmul_(self._moved, gradients, [step.to(p.device) for p in self._moved])
        if not self._checked_rounding:
            self._checked_rounding = True
            if any(p.dtype in LOW_PRECISION for p in here):
                warn_of_rounding(copies, here, gradients, step)

    @torch.no_grad()
    def mirror(self) -> None:
        """θ + δ → θ − δ, by 2θ − (θ + δ)."""
        if self._moved:
            torch._foreach_lerp_(self._moved, self._moved_copies, 2.0)

    @torch.no_grad()
    def restore(self) -> None:
        """Put θ back, bit for bit; nothing happens if it has not been moved."""
        if self._moved:
            torch._foreach_copy_(self._moved, self._moved_copies)
            self._moved, self._moved_copies = [], []

    def _copy_of(self, parameter: Tensor, shard: Tensor) -> Tensor:
        copy = self._copies.get(parameter)
        if copy is None or copy.shape != shard.shape or copy.dtype != shard.dtype or copy.device != shard.device:
            copy = self._copies[parameter] = torch.empty_like(shard, requires_grad=False)
        return copy
