"""Reading and writing ``.grad``: stashing what it held before a step, reading what a step has accumulated, and adding the two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gradreg.torch.norms import local_shards, placed_like
from gradreg.torch.parallel import Parallelism

ByParameter = dict[nn.Parameter, Tensor]
"""Gradients by parameter."""

Stash = list[Tensor | None]
"""What ``.grad`` of each trainable parameter held."""


class Gradients:
    """The gradients of ``trainable``.

    Args:
        trainable: the parameters that require a gradient.
        parallelism: averages gradients over ranks.
    """

    def __init__(self, trainable: Sequence[nn.Parameter], parallelism: Parallelism) -> None:
        self._trainable = trainable
        self._parallelism = parallelism

    @contextmanager
    def stashed(self, *, overwritten: bool) -> Iterator[Stash]:
        """A context in which ``.grad`` is empty; its value is what was there, which is restored if anything is raised."""
        stash = self.present()  # before anything is emptied, so that it is complete at any interrupt
        try:
            stash = self._emptied(stash, overwritten)
            yield stash
        except BaseException:
            self.restore(stash)
            raise

    def stash(self, *, overwritten: bool) -> Stash:
        """Empty ``.grad`` and return what was there; ``overwritten``: ranks average gradients before it is added again."""
        return self._emptied(self.present(), overwritten)

    def present(self) -> Stash:
        """What ``.grad`` holds."""
        return [p.grad for p in self._trainable]

    def _emptied(self, stash: Stash, overwritten: bool) -> Stash:
        if overwritten and self._parallelism.reuses_gradients:
            stash = [None if g is None else g.clone() for g in stash]
        self.clear()
        return stash

    def clear(self) -> None:
        """Empty ``.grad``."""
        for p in self._trainable:
            p.grad = None

    def restore(self, stash: Stash) -> None:
        """Set ``.grad`` to what ``stash`` or ``present`` returned."""
        for p, gradient in zip(self._trainable, stash, strict=True):
            p.grad = gradient

    def held(self, parameters: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[Tensor]]:
        """Those ``parameters`` that have a gradient, and their gradients with their present placements."""
        held = [(p, g) for p in parameters if (g := p.grad) is not None]
        owners = [p for p, _ in held]
        return owners, placed_like([g.to_dense() if g.is_sparse else g for _, g in held], owners)

    def of(self, parameters: Sequence[nn.Parameter]) -> ByParameter:
        """``held`` as a dictionary."""
        return dict(zip(*self.held(parameters), strict=True))

    def shards(self, parameters: Sequence[nn.Parameter] | None = None) -> ByParameter:
        """This rank's shards of the gradients of those ``parameters`` (all trainable ones by default) that have one."""
        found = self.of(self._trainable if parameters is None else parameters)
        return dict(zip(found, local_shards(list(found.values())), strict=True))

    def all_reduced(self, *, averaged: bool) -> ByParameter:
        """The gradients averaged over all ranks: as they are if ``averaged`` already, else averages of copies, 0 where a rank has none."""
        if averaged or not self._parallelism.averages:
            return self.of(self._trainable)
        whole = [torch.zeros_like(p, requires_grad=False) if p.grad is None else p.grad.clone() for p in self._trainable]
        self._parallelism.average(whole, self._trainable)
        return dict(zip(self._trainable, whole, strict=True))

    def redistribute(self) -> None:
        """Redistribute the gradients to the placements of their parameters, for arithmetic that is not linear in them."""
        for p, gradient in self.of(self._trainable).items():
            if gradient is not p.grad:
                p.grad = gradient

    def average(self) -> None:
        """Average ``.grad`` over the ranks, after passes that did not; None where no rank has a gradient, as DDP leaves it."""
        averaged = [p for p in self._trainable if self._parallelism.is_averaged(p)]
        if self._parallelism.finds_unused:
            reached = torch.tensor([float(p.grad is not None) for p in averaged], device=averaged[0].device)
            shares = self._parallelism.mean_over_ranks(reached).tolist()
            averaged = [p for p, share in zip(averaged, shares, strict=True) if share > 0.0]
        for p in averaged:
            if p.grad is None:
                p.grad = torch.zeros_like(p, requires_grad=False)
            elif p.grad.is_sparse:
                p.grad = p.grad.to_dense()
        self._parallelism.average([p.grad for p in averaged if p.grad is not None], averaged)

    def add(self, stash: Stash) -> None:
        """Add ``stash`` to what this step has accumulated."""
        both: list[tuple[Tensor, Tensor]] = []
        for p, before in [(p, g) for p, g in zip(self._trainable, stash, strict=True) if g is not None]:
            if p.grad is None:
                p.grad = before.clone()
            elif p.grad.is_sparse:
                p.grad = before + p.grad
            else:
                both.append((p.grad, before))
        if both:
            torch._foreach_add_(local_shards([g for g, _ in both]), local_shards([g for _, g in both]))

    def add_after_averaging(self, stash: Stash) -> None:
        """``add`` after the ranks have averaged this step's gradients: ``stash`` is averaged separately."""
        if self._parallelism.averages and any(g is not None for g in stash):
            whole = [
                torch.zeros_like(p, requires_grad=False) if g is None else g.clone() for g, p in zip(stash, self._trainable, strict=True)
            ]
            self._parallelism.average(whole, self._trainable)
            stash = [None if p.grad is None and g is None else w for w, g, p in zip(whole, stash, self._trainable, strict=True)]
        self.add(stash)
