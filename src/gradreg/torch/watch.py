"""Checks against silently wrong gradients: parameters that joined the model later, and optimizers that step inside backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from operator import is_, methodcaller

import torch
from torch import nn

from gradreg.torch.perturbation import Perturbation

_HOOKS = ("_post_accumulate_grad_hooks", "_in_backward_optimizers")
"""Attributes of a parameter that has hooks which run when its gradient is ready."""

_VALUES = methodcaller("values")


class Watch:
    """The modules and parameters of ``model`` as they were when the regularizer was built."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._held = [dictionary for m in model.modules() for dictionary in (m._parameters, m._modules)]
        self._members = self._present()
        self._known = set(model.parameters())
        self.first: bool = True
        """Whether no step that perturbs parameters has succeeded yet."""

    def check(self) -> None:
        """Raise if a trainable parameter joined the model, or took the place of another.

        Raises:
            ValueError: naming one of them and the remedy.
        """
        present = self._present()
        if len(present) == len(self._members) and all(map(is_, present, self._members)):
            return
        joined = [name for name, p in self._model.named_parameters() if p.requires_grad and p not in self._known]
        if joined:
            raise ValueError(
                f"model must keep the parameters that it had when the regularizer was built; got {len(joined)} new ones, {joined[0]!r} for "
                "one (a layer that was added, an embedding that was resized, load_state_dict(assign=True)). Build a new "
                "GradientRegularizer, and load_state_dict() the old one's state into it."
            )

    def _present(self) -> list[nn.Parameter | nn.Module | None]:
        """The parameters and children of every module that was there."""
        return list(chain.from_iterable(map(_VALUES, self._held)))

    @contextmanager
    def first_step(self, perturbation: Perturbation) -> Iterator[None]:
        """A context for the first step that perturbs parameters, which checks that its passes do not change them otherwise.

        Raises:
            RuntimeError: hooks of the backward pass changed them, as an optimizer does that steps inside of it; they are restored.
        """
        hooked = [p for p in self._model.parameters() if any(getattr(p, name, None) for name in _HOOKS)]
        before = [p.detach().clone() for p in hooked]
        perturbation.looks_for_writes = hooked
        try:
            yield
        finally:
            perturbation.looks_for_writes = ()
            if perturbation.was_written or any(not torch.equal(p.detach(), old) for p, old in zip(hooked, before, strict=True)):
                with torch.no_grad():
                    for p, old in zip(hooked, before, strict=True):
                        p.copy_(old)
                raise RuntimeError(
                    "the optimizer must not step inside the backward pass, of which a penalty needs several; got parameters that its hooks "
                    "changed (an optimizer step in register_post_accumulate_grad_hook, a layer-wise optimizer). "
                    "Step the optimizer after regularizer.backward(), or use penalty=None."
                )
        self.first = False
