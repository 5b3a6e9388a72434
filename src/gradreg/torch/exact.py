"""Double backpropagation: the gradient of the penalty itself, for ``difference="exact"``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradreg.penalties import GradientPenalty
from gradreg.plan import Plan
from gradreg.torch.closures import Evaluator, total
from gradreg.torch.gradients import Gradients, Stash
from gradreg.torch.norms import gradient_norm, is_sharded, safe_ratio
from gradreg.torch.step import Result

Direction = list[Tensor | None]

_HIDDEN = (
    "difference='exact' needs the gradient of the loss as a function of every parameter; got parameters that only loss.backward() reaches, "
    "as inside torch.utils.checkpoint with use_reentrant=True. Checkpoint with use_reentrant=False, or use "
    "gradreg.fgr(gamma=..., epsilon=...)."
)


@dataclass
class DoubleBackward:
    """One step of an exact penalty.

    Args:
        evaluator: evaluates the closures.
        gradients: reads and writes ``.grad``.
        perturbed: the parameters counted in the norm.
        average_direction: under data parallelism, average the first gradient over the ranks before it becomes the direction.
        averages: whether the last backward pass averages the gradients over the ranks.
    """

    evaluator: Evaluator
    gradients: Gradients
    perturbed: list[nn.Parameter]
    average_direction: bool
    averages: bool = True

    def run(self, penalty: GradientPenalty, strength: float, plan: Plan) -> Result:
        """Double backward of ⟨g(θ), d⟩ with d held fixed, added to the loss: its gradient is g + strength·H·d.

        Raises whatever a closure raises; ``.grad`` is then restored.
        """
        if any(is_sharded(p) for p in self.perturbed):
            raise ValueError(
                "difference='exact' needs whole parameters, because the graph of a backward pass does not reach shards; got DTensors. "
                "Use gradreg.cgr(gamma=..., epsilon=...), or fgr, which need only first derivatives."
            )
        try:
            with self.gradients.stashed(overwritten=False) as earlier:
                if self.evaluator.number == 1:
                    return self._double_backward(penalty, strength, None, earlier)
                with self.evaluator.sharing_state(plan):  # the direction comes from all closures, so each is evaluated twice
                    direction, auxiliary = self._summed_gradient()
                    result = self._double_backward(penalty, strength, direction, earlier)
                    result.aux = self.evaluator.aux_of(auxiliary)
                    return result
        except RuntimeError as error:
            if any(words in str(error) for words in ("derivative for", "double backward", "differentiate twice")):
                raise RuntimeError(
                    f"difference='exact' needs every operation to be twice differentiable; PyTorch says: {error}. "
                    "Use gradreg.fgr(gamma=..., epsilon=...), which needs only first derivatives."
                ) from error
            if "use_reentrant" in str(error):
                raise RuntimeError(_HIDDEN) from error
            raise

    def _double_backward(self, penalty: GradientPenalty, strength: float, direction: Direction | None, earlier: Stash) -> Result:
        evaluator = self.evaluator
        losses: list[Tensor] = []
        auxiliary: list[Any] = []
        held: Direction = []
        norm = torch.zeros(())
        factor: float | Tensor = 0.0
        for i in range(evaluator.number):
            with evaluator.parallelism.synchronised(self.averages and i == evaluator.number - 1):
                loss, aux = evaluator.evaluate(i)
                gradients = torch.autograd.grad(evaluator.scaled(loss), self.perturbed, create_graph=True, allow_unused=True)
                if i == 0:
                    held = direction if direction is not None else [None if g is None else g.detach() for g in gradients]
                    if self.average_direction:
                        held = self._averaged(held)
                    norm = evaluator.unscaled(gradient_norm([d.to_dense() if d.is_sparse else d for d in held if d is not None]))
                    factor = strength if penalty.power == 2 else safe_ratio(strength, norm)
                    factor = factor / evaluator.scale(norm) / evaluator.scale(norm) * evaluator.share
                pairs = [(g, d) for g, d in zip(gradients, held, strict=True) if g is not None and d is not None]
                correction = factor * sum(((g * d).sum() for g, d in pairs), start=torch.zeros_like(loss))
                if penalty.power == 2 and evaluator.backward is not None and pairs:
                    # `backward` may divide the loss by a factor of the objective, which γ/2·‖g‖² must be divided by twice. The gradient
                    # that arrives here is that factor.
                    correction.register_hook(lambda received: received * evaluator.unscaled(received))
                if i == evaluator.number - 1:
                    self.gradients.add(earlier)  # before the backward pass, so that both are averaged over the ranks
                unreached = [p for p, g in zip(self.perturbed, gradients, strict=True) if g is None and p.grad is None]
                evaluator.backpropagate(loss + correction, 1.0)
                self._check_unreached(unreached)
                losses.append(loss.detach())
                auxiliary.append(aux)
        return Result(total(losses), evaluator.aux_of(auxiliary), norm)

    def _check_unreached(self, unreached: list[nn.Parameter]) -> None:
        """Raise if ``backward`` reached parameters that ``autograd.grad`` did not: their penalty would be missing."""
        if self.evaluator.parallelism.averages or all(p.grad is None for p in unreached):
            return
        raise RuntimeError(_HIDDEN)

    def _averaged(self, direction: Direction) -> Direction:
        whole = [torch.zeros_like(p) if d is None else d for d, p in zip(direction, self.perturbed, strict=True)]
        self.evaluator.parallelism.average(whole, self.perturbed)
        return list(whole)

    def _summed_gradient(self) -> tuple[Direction, list[Any]]:
        """The gradient of all closures together, and their aux."""
        summed: Direction = [None] * len(self.perturbed)
        auxiliary: list[Any] = []
        for i in range(self.evaluator.number):
            with self.evaluator.parallelism.synchronised(False):
                loss, aux = self.evaluator.evaluate(i)
                auxiliary.append(aux)
                gradients = torch.autograd.grad(self.evaluator.scaled(loss), self.perturbed, allow_unused=True)
            summed = [t if g is None else g if t is None else t + g for t, g in zip(summed, gradients, strict=True)]
        self.evaluator.finish_first("loss")
        return summed, auxiliary
