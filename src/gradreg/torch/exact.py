"""Double backpropagation: the gradient of the penalty itself, for ``difference="exact"``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradreg.penalties import GradientPenalty
from gradreg.torch.evaluation import Closure, Evaluation, total
from gradreg.torch.norms import gradient_norm, safe_ratio
from gradreg.torch.parallel import is_sharded
from gradreg.torch.replay import ForwardBuffers


@dataclass
class DoubleBackward:
    """One step of an exact penalty.

    Args:
        evaluation: evaluates the closures.
        closures: the micro-batches.
        perturbed: the parameters counted in the norm.
        buffers: the buffers that only the first pass may change, or None to let every pass change them.
        average_direction: under data parallelism, average the first gradient over the ranks before it becomes the direction.
    """

    evaluation: Evaluation
    closures: Sequence[Closure]
    perturbed: list[nn.Parameter]
    buffers: ForwardBuffers | None
    average_direction: bool

    def run(self, penalty: GradientPenalty, strength: float) -> tuple[Tensor, Tensor]:
        """Double backward of ⟨g(θ), d⟩ with d held fixed, added to the loss: its gradient is g + strength·H·d. Returns loss and norm."""
        if any(is_sharded(p) for p in self.perturbed):
            raise ValueError(
                "difference='exact' needs whole parameters, for the graph of a backward pass does not reach their shards; got DTensors. "
                "Use gradreg.cgr(gamma=..., epsilon=...), or fgr, which need only first derivatives."
            )
        direction: list[Tensor | None] | None = None
        single = len(self.closures) == 1
        if self.buffers is not None and not single:
            self.buffers.watch()
        try:
            if not single:
                direction = self._summed_gradient()
                if self.buffers is not None:
                    self.buffers.keep()
            return self._double_backward(penalty, strength, direction)
        except RuntimeError as error:
            if any(words in str(error) for words in ("derivative for", "double backward", "differentiate twice")):
                raise RuntimeError(
                    f"difference='exact' needs every operation to be twice differentiable; PyTorch says: {error}. "
                    "Use gradreg.fgr(gamma=..., epsilon=...), which needs only first derivatives."
                ) from error
            raise
        finally:
            if self.buffers is not None and not single:
                self.buffers.restore()

    def _double_backward(self, penalty: GradientPenalty, strength: float, direction: list[Tensor | None] | None) -> tuple[Tensor, Tensor]:
        evaluation = self.evaluation
        losses: list[Tensor] = []
        held: list[Tensor | None] = []
        norm = torch.zeros(())
        factor: float | Tensor = 0.0
        for i in range(len(self.closures)):
            with evaluation.parallelism.synchronised(i == len(self.closures) - 1):
                loss = evaluation.loss(self.closures, i)
                gradients = torch.autograd.grad(evaluation.scaled(loss), self.perturbed, create_graph=True, allow_unused=True)
                if i == 0:
                    held = direction if direction is not None else [None if g is None else g.detach() for g in gradients]
                    if self.average_direction:
                        held = self._averaged(held)
                    norm = evaluation.unscaled(gradient_norm([d for d in held if d is not None]))
                    factor = strength if penalty.power == 2 else safe_ratio(strength, norm)
                    factor = factor / evaluation.scale(norm) / evaluation.scale(norm)
                pairs = [(g, d) for g, d in zip(gradients, held, strict=True) if g is not None and d is not None]
                correction = factor * sum(((g * d).sum() for g, d in pairs), start=torch.zeros_like(loss))
                if penalty.power == 2 and evaluation.backward is not None and pairs:
                    # `backward` may divide the loss, as the objective asks; γ/2·‖g‖² divides twice. The product tells by how much.
                    correction.register_hook(lambda received: received * evaluation.unscaled(received))
                evaluation.backpropagate(loss + correction, 1.0)
                losses.append(loss.detach())
        return total(losses), norm

    def _averaged(self, direction: list[Tensor | None]) -> list[Tensor | None]:
        whole = [torch.zeros_like(p) if d is None else d for d, p in zip(direction, self.perturbed, strict=True)]
        self.evaluation.parallelism.average(whole)
        return list(whole)

    def _summed_gradient(self) -> list[Tensor | None]:
        summed: list[Tensor | None] = [None] * len(self.perturbed)
        for i in range(len(self.closures)):
            with self.evaluation.parallelism.synchronised(False):
                loss = self.evaluation.scaled(self.evaluation.loss(self.closures, i))
                gradients = torch.autograd.grad(loss, self.perturbed, allow_unused=True)
            summed = [t if g is None else g if t is None else t + g for t, g in zip(summed, gradients, strict=True)]
        return summed
