"""The part of a step that a decoupled penalty keeps out of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradreg.torch.norms import local_shards, norm_of_shards


class Correction:
    """What a step leaves to be subtracted from the parameters separately from the optimizer, until that is done."""

    def __init__(self) -> None:
        self._pending: dict[nn.Parameter, Tensor] | None = None

    def keep(self, correction: Mapping[nn.Parameter, Tensor], *, finite_only: bool) -> None:
        """Hold ``correction``, this rank's shards; with ``finite_only``, which takes a device sync, drop it if it is not finite.

        A gradient scaler then skips the optimizer's step, so the other half must be skipped too.
        """
        if not correction:
            return
        finite = not finite_only or bool(torch.isfinite(norm_of_shards(list(correction.values()), list(correction))))
        self._pending = dict(correction) if finite else None

    def check_applied(self, before: str) -> None:
        """Raise ``RuntimeError`` if a correction is still pending."""
        if self._pending is not None:
            raise RuntimeError(
                f"regularizer.decoupled_step(optimizer) must come after optimizer.step() and before {before}; it is missing, and half of "
                "the last step with it. Call it, or use a penalty that is not decoupled."
            )

    @torch.no_grad()
    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        """Subtract lr times the pending correction, with the lr of each parameter's group in ``optimizer``."""
        pending, placed = self._pending or {}, set()
        groups: list[tuple[float | Tensor, list[nn.Parameter]]] = []
        for group in optimizer.param_groups:
            here = [p for p in group["params"] if p in pending]
            placed.update(here)
            groups.append((group["lr"], here))
        if len(placed) < len(pending):
            raise ValueError(
                f"optimizer must hold all parameters that the regularizer trains; got one that lacks {len(pending) - len(placed)} of "
                f"{len(pending)}. Pass the optimizer that updates the model."
            )
        for rate, here in groups:
            if not here:
                continue
            if isinstance(rate, Tensor):
                torch._foreach_add_(local_shards(here), torch._foreach_mul([pending[p] for p in here], -rate))
            else:
                torch._foreach_add_(local_shards(here), [pending[p] for p in here], alpha=-rate)
        self._pending = None
