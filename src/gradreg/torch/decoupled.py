"""The part of a step that a decoupled penalty keeps out of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gradreg.torch.norms import local_shards, norm_of_shards


class Correction:
    """What a step leaves to be subtracted from the parameters separately from the optimizer, until that is done."""

    def __init__(self) -> None:
        self._pending: dict[nn.Parameter, Tensor] | None = None
        self._overflow = False

    def keep(self, correction: Mapping[nn.Parameter, Tensor], *, finite_only: bool) -> None:
        """Hold ``correction``, this rank's shards; with ``finite_only``, which takes a device sync, note whether it is finite.

        Where it is not, a gradient scaler skips the step of the optimizer with those parameters, so the other half must be skipped too.
        """
        self._overflow = finite_only and not _is_finite(correction)
        self._pending = dict(correction) or None  # a step that overflowed may still be pending: it is void

    def check_applied(self, before: str) -> None:
        """Raise ``RuntimeError`` if a correction is still pending."""
        if self._pending is not None and not self._overflow:
            raise RuntimeError(
                f"regularizer.decoupled_step(optimizer) must come after optimizer.step() and before {before}; it is missing, and half of "
                "the last step with it. Call it, or use a penalty that is not decoupled."
            )

    @torch.no_grad()
    def apply(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Subtract lr times the pending correction, with the lr of each parameter's group in one of ``optimizers``."""
        pending, placed = self._pending or {}, set[nn.Parameter]()
        groups: list[tuple[float | Tensor, list[nn.Parameter]]] = []
        for optimizer in optimizers:
            mine = [(group["lr"], [p for p in group["params"] if p in pending]) for group in optimizer.param_groups]
            held = [p for _, here in mine for p in here]
            if placed.intersection(held):
                raise ValueError(
                    f"optimizers must hold each parameter once; got {len(placed.intersection(held))} that two of them hold. "
                    "Give every parameter to one optimizer."
                )
            placed.update(held)
            if not self._overflow or _is_finite({p: pending[p] for p in held}):
                groups += mine
        if len(placed) < len(pending):
            raise ValueError(
                f"optimizer must hold all parameters that the regularizer trains; got {'one' if len(optimizers) == 1 else 'some'} that "
                f"{'lacks' if len(optimizers) == 1 else 'lack'} {len(pending) - len(placed)} of {len(pending)}. Pass the optimizer that "
                "updates the model, or all of them: decoupled_step(muon, adamw)."
            )
        for rate, here in groups:
            if not here:
                continue
            if isinstance(rate, Tensor):
                torch._foreach_add_(local_shards(here), torch._foreach_mul([pending[p] for p in here], -rate))
            else:
                torch._foreach_add_(local_shards(here), [pending[p] for p in here], alpha=-rate)
        self._pending = None


def _is_finite(correction: Mapping[nn.Parameter, Tensor]) -> bool:
    return not correction or bool(torch.isfinite(norm_of_shards(list(correction.values()), list(correction))))
