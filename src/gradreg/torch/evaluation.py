"""Running closures: forward and backward passes whose weighted gradients gather in ``.grad``, under the same random numbers each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from gradreg import checks
from gradreg.torch.parallel import Parallelism
from gradreg.torch.replay import RandomNumbers

Closure: TypeAlias = Callable[[], Tensor]
"""Runs a forward pass and returns the scalar loss, without calling ``backward``."""


class Scaler(Protocol):
    """What multiplies the loss so that its gradients do not underflow: a ``torch.amp.GradScaler``, or any object with this method."""

    def scale(self, outputs: Tensor) -> Tensor: ...


@dataclass
class Evaluation:
    """How one call of ``GradientRegularizer.backward`` evaluates losses and their gradients.

    Args:
        parallelism: averages gradients over ranks.
        trainable: the parameters that require a gradient.
        backward: called with a multiple of the loss in place of ``loss.backward()``, or None for that; it may multiply the loss further.
        scaler: what ``backward`` multiplies the loss with beyond the objective's own factors, or None for nothing.
        random_numbers: the generators to replay, or None to let every pass draw afresh.
    """

    parallelism: Parallelism
    trainable: list[nn.Parameter]
    backward: Callable[[Tensor], object] | None
    scaler: Scaler | None
    random_numbers: RandomNumbers | None
    _drawn: dict[int, list[list[Tensor]]] = field(default_factory=dict)

    def run(self, closures: Sequence[Closure], weight: float, *, synchronise: bool) -> Tensor:
        """Forward and backward through every closure, ``weight`` times its gradient accumulating; returns the summed, detached loss."""
        losses: list[Tensor] = []
        for i in range(len(closures)):
            with self.parallelism.synchronised(synchronise and i == len(closures) - 1):
                loss = self.loss(closures, i)
                losses.append(loss.detach().clone())  # CUDA graphs of torch.compile reuse its memory in the next pass
                self.backpropagate(loss, weight)
        return total(losses)

    def backpropagate(self, loss: Tensor, weight: float) -> None:
        """Add ``weight`` times the scaled loss's gradient to ``.grad``."""
        if self.backward is not None:
            self.backward(loss if weight == 1.0 else loss * weight)
            return
        scaled = self.scaled(loss)
        scaled.backward(None if weight == 1.0 else torch.full_like(scaled, weight))

    def loss(self, closures: Sequence[Closure], i: int) -> Tensor:
        """The checked loss of closure ``i``, under the random numbers of its first evaluation in this step."""
        fresh = i == 0 and all(p.grad is None for p in self.trainable)
        if self.random_numbers is not None:
            drawn = self._drawn.setdefault(id(closures), [])
            if i < len(drawn):
                self.random_numbers.restore(drawn[i])
            else:
                drawn.append(self.random_numbers.capture())
        loss = closures[i]()
        if not isinstance(loss, Tensor):
            raise TypeError(f"closure must return the loss as a tensor; got {checks.describe(loss)}. Return loss, not loss.item().")
        if loss.numel() != 1:
            raise ValueError(
                f"closure must return a scalar loss; got a tensor of shape {tuple(loss.shape)}. Reduce it with .mean() or .sum()."
            )
        if fresh and any(p.grad is not None for p in self.trainable):
            raise ValueError("closure must only run the forward pass; it called backward() itself. Return the loss and leave that out.")
        if not loss.requires_grad:
            raise ValueError(
                "closure must return a loss that requires grad; got one that does not depend on any trainable parameter. "
                "Compute it from the model's output, without torch.no_grad() or .detach()."
            )
        return loss if loss.dim() == 0 else loss.reshape(())

    def scaled(self, value: Tensor) -> Tensor:
        """``value`` times the loss scale."""
        return value if self.scaler is None else self.scaler.scale(value)

    def unscaled(self, value: Tensor) -> Tensor:
        """``value`` divided by the loss scale."""
        return value if self.scaler is None else value / self.scale(value)

    def scale(self, like: Tensor) -> float | Tensor:
        """The loss scale on the device of ``like``; nobody waits for its value."""
        return 1.0 if self.scaler is None else self.scaler.scale(torch.ones((), dtype=like.dtype, device=like.device))


def total(losses: Sequence[Tensor]) -> Tensor:
    """The sum of ``losses``."""
    return losses[0] if len(losses) == 1 else torch.stack(list(losses)).sum()
