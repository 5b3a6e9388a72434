"""What stands in ``.grad``: setting aside what was there before a step, reading what a step has gathered, and adding the two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradreg.torch.parallel import Parallelism, local_shards, placed_like

Gradients = dict[nn.Parameter, Tensor]
"""Gradients by parameter."""

Earlier = list[Tensor | None]
"""What ``.grad`` of each trainable parameter held before a step."""


class Grads:
    """The gradients of ``trainable``.

    Args:
        trainable: the parameters that require a gradient.
        parallelism: averages gradients over ranks.
    """

    def __init__(self, trainable: Sequence[nn.Parameter], parallelism: Parallelism) -> None:
        self._trainable = trainable
        self._parallelism = parallelism

    def set_aside(self, *, overwritten: bool) -> Earlier:
        """Empty ``.grad`` and return what was there; ``overwritten``: ranks average gradients before it is added again."""
        earlier: Earlier = [p.grad for p in self._trainable]
        if overwritten and self._parallelism.reuses_gradients:
            earlier = [None if g is None else g.clone() for g in earlier]
        self.clear()
        return earlier

    def clear(self) -> None:
        """Empty ``.grad``."""
        for p in self._trainable:
            p.grad = None

    def put_back(self, earlier: Earlier) -> None:
        """Have in ``.grad`` what ``set_aside`` returned, and nothing else."""
        for p, gradient in zip(self._trainable, earlier, strict=True):
            p.grad = gradient

    def of(self, parameters: Sequence[nn.Parameter]) -> Gradients:
        """The gradients of those ``parameters`` that have one, whole and placed as they are."""
        held = [p for p in parameters if p.grad is not None]
        return dict(zip(held, placed_like([dense(p.grad) for p in held if p.grad is not None], held), strict=True))

    def shards(self, parameters: Sequence[nn.Parameter] | None = None) -> Gradients:
        """This rank's shards of the gradients of those ``parameters`` (all trainable ones by default) that have one."""
        found = self.of(self._trainable if parameters is None else parameters)
        return dict(zip(found, local_shards(list(found.values())), strict=True))

    def agreed(self, *, averaged: bool) -> Gradients:
        """The gradients on which all ranks agree: as they are if ``averaged`` already, else averages of copies, 0 where a rank has none."""
        if averaged or not self._parallelism.averages:
            return self.of(self._trainable)
        whole = [torch.zeros_like(p, requires_grad=False) if p.grad is None else p.grad.clone() for p in self._trainable]
        self._parallelism.average(whole)
        return dict(zip(self._trainable, whole, strict=True))

    def settle(self) -> None:
        """Have the gradients placed as their parameters are, for arithmetic that is not linear in them."""
        for p, gradient in self.of(self._trainable).items():
            if gradient is not p.grad:
                p.grad = gradient

    def add(self, earlier: Earlier) -> None:
        """Add ``earlier`` to what this step has gathered."""
        both: list[tuple[Tensor, Tensor]] = []
        for p, before in zip(self._trainable, earlier, strict=True):
            if before is not None and p.grad is None:
                p.grad = before.clone()
            elif before is not None and p.grad is not None and p.grad.is_sparse:
                p.grad = before + p.grad
            elif before is not None and p.grad is not None:
                both.append((p.grad, before))
        if both:
            torch._foreach_add_(local_shards([g for g, _ in both]), local_shards([g for _, g in both]))

    def add_after_averaging(self, earlier: Earlier) -> None:
        """``add`` once the ranks have averaged what this step has gathered: ``earlier`` is averaged for itself."""
        if all(g is None for g in earlier):
            return
        if self._parallelism.averages:
            whole = [
                torch.zeros_like(p, requires_grad=False) if g is None else g.clone() for g, p in zip(earlier, self._trainable, strict=True)
            ]
            self._parallelism.average(whole)
            earlier = [None if p.grad is None and g is None else w for w, g, p in zip(whole, earlier, self._trainable, strict=True)]
        self.add(earlier)


def dense(gradient: Tensor) -> Tensor:
    """``gradient`` itself, or a whole copy of the few rows that a layer with ``sparse=True`` leaves."""
    return gradient.to_dense() if gradient.is_sparse else gradient
