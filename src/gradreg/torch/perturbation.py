"""Moving the parameters along a direction and putting them back bit for bit: all arithmetic in a few ``torch._foreach`` operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradreg.torch.parallel import local_shards
from gradreg.torch.precision import LOW_PRECISION, warn_of_rounding


class Perturbation:
    """θ → θ + step·G → … → θ, with one preallocated copy of the parameters and nothing else.

    The copy is what restores them, so that they come back bit for bit: adding and subtracting the same step does not do that.
    """

    def __init__(self) -> None:
        self._copies: dict[Tensor, Tensor] = {}
        self._moved: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._checked_rounding = False

    @torch.no_grad()
    def move(self, parameters: Sequence[Tensor], vectors: list[Tensor], step: float | Tensor) -> None:
        """θ ← θ + step·v, remembering θ as it was before the first of several moves.

        ``step`` is a number, or a 0-dimensional tensor so that nobody waits for its value. ``vectors``, of sharded parameters this
        rank's shards, are only read. Without parameters (those selected have no gradient in this step) nothing moves.
        """
        if not parameters:
            return
        here, first = local_shards(parameters), not self._moved
        fresh = [(p, shard) for p, shard in zip(parameters, here, strict=True) if p not in self._moved]
        for p, shard in fresh:
            self._moved[p] = shard, self._copy_of(p, shard)
        copies = [self._moved[p][1] for p in parameters]
        if fresh:
            torch._foreach_copy_([self._moved[p][1] for p, _ in fresh], [shard for _, shard in fresh])
        if not isinstance(step, Tensor):
            torch._foreach_add_(here, vectors, alpha=step)
        elif first and step.device.type != "cpu" and all(p.device == step.device for p in here):
            # On an accelerator addcmul with a broadcast factor would launch a kernel a tensor; these three are fused over all of them.
            torch._foreach_copy_(here, vectors)
            torch._foreach_mul_(here, step)
            torch._foreach_add_(here, copies)
        else:
            torch._foreach_addcmul_(here, vectors, [step.to(p.device) for p in here])
        if not self._checked_rounding:
            self._checked_rounding = True
            if any(p.dtype in LOW_PRECISION for p in here):
                warn_of_rounding(copies, here, vectors, step)

    @torch.no_grad()
    def mirror(self) -> None:
        """θ + δ → θ − δ, by 2θ − (θ + δ)."""
        if self._moved:
            moved, copies = zip(*self._moved.values(), strict=True)
            torch._foreach_lerp_(moved, copies, 2.0)

    @torch.no_grad()
    def restore(self) -> None:
        """Put θ back, bit for bit; nothing happens if it has not been moved."""
        if self._moved:
            moved, copies = zip(*self._moved.values(), strict=True)
            torch._foreach_copy_(moved, copies)
            self._moved = {}

    def _copy_of(self, parameter: Tensor, shard: Tensor) -> Tensor:
        copy = self._copies.get(parameter)
        if copy is None or copy.shape != shard.shape or copy.dtype != shard.dtype or copy.device != shard.device:
            copy = self._copies[parameter] = torch.empty_like(shard, requires_grad=False)
        return copy
