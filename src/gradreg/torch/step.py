"""One step: running the closures at the places of a plan and gathering the weighted gradients in ``.grad``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from gradreg import checks
from gradreg.penalties import GradientPenalty
from gradreg.torch.parallel import Parallelism, is_sharded, local_shards, placed_like
from gradreg.torch.passes import plan
from gradreg.torch.perturbation import Perturbation, gradient_norm, ratio_or_zero, safe_ratio
from gradreg.torch.replay import ForwardBuffers, RandomNumbers

Closure: TypeAlias = Callable[[], Tensor]
"""Runs a forward pass and returns the scalar loss, without calling ``backward``."""


class Scaler(Protocol):
    """What multiplies the loss so that its gradients do not underflow: a ``torch.amp.GradScaler``, or any object with this method."""

    def scale(self, outputs: Tensor) -> Tensor: ...


@dataclass
class Step:
    """What one call of ``GradientRegularizer.backward`` works on.

    Args:
        parallelism: averages gradients over ranks, and drops copies of moved parameters.
        closures: the micro-batches.
        ascents: the closures of the direction, or None for ``closures``.
        backward: called with a multiple of the loss in place of ``loss.backward()``, or None for that; it may multiply the loss further.
        scaler: what ``backward`` multiplies the loss with beyond the objective's own factors, or None for nothing.
        trainable: the parameters that require a gradient.
        perturbed: those among them that are moved and counted in the norm.
        perturbation: moves and restores them.
        buffers: the buffers that only the first pass may change, or None to let every pass change them.
        random_numbers: the generators to replay, or None to let every pass draw afresh.
        average_direction: under data parallelism, average the first gradient over the ranks before it becomes the direction.
    """

    parallelism: Parallelism
    closures: Sequence[Closure]
    ascents: Sequence[Closure] | None
    backward: Callable[[Tensor], object] | None
    scaler: Scaler | None
    trainable: list[nn.Parameter]
    perturbed: list[nn.Parameter]
    perturbation: Perturbation
    buffers: ForwardBuffers | None
    random_numbers: RandomNumbers | None
    average_direction: bool
    _drawn: dict[int, list[list[Tensor]]] = field(default_factory=dict)

    def plain(self) -> tuple[Tensor, Tensor | float]:
        """One pass, as without a penalty: returns the loss and the gradient's norm (NaN if ``.grad`` held something before)."""
        fresh = all(p.grad is None for p in self.trainable)
        loss = self._run(self.closures, 1.0, synchronise=True)
        return loss, self._unscaled(gradient_norm(self._gradients()[1])) if fresh else float("nan")

    def finite_difference(self, penalty: GradientPenalty, coefficient: float, radius: float) -> tuple[Tensor, Tensor]:
        """The passes of ``plan``: returns the loss at the unperturbed parameters and the norm of the gradient there.

        The first gradient arrives already weighted (its loss is), and the others accumulate onto it, so one gradient is all that is held.
        """
        if self.ascents is not None and penalty.mixing == "unit":
            raise ValueError(
                "ascent must be None with mixing='unit', which needs the plain gradient first; got closures. Use mixing='plain'."
            )
        steps = plan(penalty, coefficient, separate_ascent=self.ascents is not None)
        if self.average_direction:
            self.parallelism.check_averaging()
        earlier = [p.grad for p in self.trainable]
        if self.average_direction and self.parallelism.reuses_gradients:
            earlier = [None if g is None else g.clone() for g in earlier]
        for p in self.trainable:
            p.grad = None
        try:
            first, *others = steps.passes
            if self.buffers is not None:
                self.buffers.watch()
            direction = self.closures if self.ascents is None else self.ascents
            loss = self._run(direction, first.weight, synchronise=self.average_direction)
            if self.buffers is not None:
                self.buffers.keep()
            moved, gradients = self._gradients()
            norm = gradient_norm(gradients)
            overflow = self.scaler is not None and not torch.isfinite(norm)
            place = others[0].place
            if penalty.power == 1:
                # The weighted gradient is w·g and its norm |w|·‖g‖: the sign of w is all that is left of it, and nothing of a loss scale.
                distance: float | Tensor = safe_ratio(place * (radius if first.weight > 0 else -radius), norm)
            else:
                distance = place * radius / first.weight / self._scale(norm)
            if not overflow:
                self.perturbation.move(moved, gradients, distance)
                self.parallelism.drop_copies()
            del gradients  # or the first gradient would live on beside the second
            if not steps.keeps_first:
                for p in self.trainable:
                    p.grad = None
            elif penalty.mixing == "unit":
                kept = [p.grad for p in self.trainable if p.grad is not None]
                torch._foreach_mul_(local_shards(kept), self._scaled(ratio_or_zero(1.0 - coefficient, norm)))
            for i, this in enumerate(others):
                if this.place == 0:
                    self.perturbation.restore()
                elif this.place != place:
                    self.perturbation.mirror()
                if this.place != place:
                    self.parallelism.drop_copies()
                place = this.place
                last = i == len(others) - 1
                if last:
                    self._add_to_gradients(earlier)
                # After an overflow the parameters stay where they are (other ranks may be waiting in this pass), and NaN tells the scaler.
                evaluated = self._run(self.closures, float("nan") if overflow else this.weight, synchronise=last)
                if this.place == 0:
                    loss = evaluated
        except BaseException:
            for p, gradient in zip(self.trainable, earlier, strict=True):
                p.grad = gradient
            raise
        finally:
            self.perturbation.restore()
            self.parallelism.drop_copies()
            if self.buffers is not None:
                self.buffers.restore()
        return loss, self._unscaled(norm if first.weight == 1.0 else norm / abs(first.weight))

    def exact(self, penalty: GradientPenalty, strength: float) -> tuple[Tensor, Tensor | float]:
        """Double backward of ⟨g(θ), d⟩ with d held fixed, added to the loss: its gradient is g + strength·H·d."""
        if self.ascents is not None:
            raise ValueError("ascent must be None for an exact penalty, which takes no finite step; got closures. Use fgr() or gnp().")
        if not self.perturbed:  # all that were selected are frozen: the penalty does not depend on anything
            return self.plain()
        if any(is_sharded(p) for p in self.perturbed):
            raise ValueError(
                "difference='exact' needs whole parameters, for the graph of a backward pass does not reach their shards; got DTensors. "
                "Use gradreg.cgr(gamma=..., epsilon=...), or fgr, which need only first derivatives."
            )
        if self.average_direction:
            self.parallelism.check_averaging()
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
        losses: list[Tensor] = []
        held: list[Tensor | None] = []
        norm = torch.zeros(())
        factor: float | Tensor = 0.0
        for i in range(len(self.closures)):
            with self.parallelism.synchronised(i == len(self.closures) - 1):
                loss = self._evaluate(self.closures, i)
                gradients = torch.autograd.grad(self._scaled(loss), self.perturbed, create_graph=True, allow_unused=True)
                if i == 0:
                    held = direction if direction is not None else [None if g is None else g.detach() for g in gradients]
                    if self.average_direction:
                        held = self._averaged(held)
                    norm = self._unscaled(gradient_norm([d for d in held if d is not None]))
                    factor = (strength if penalty.power == 2 else safe_ratio(strength, norm)) / self._scale(norm) / self._scale(norm)
                pairs = [(g, d) for g, d in zip(gradients, held, strict=True) if g is not None and d is not None]
                correction = factor * sum(((g * d).sum() for g, d in pairs), start=torch.zeros_like(loss))
                if penalty.power == 2 and self.backward is not None and pairs:
                    # `backward` may divide the loss, as the objective asks; γ/2·‖g‖² divides twice. The product tells by how much.
                    correction.register_hook(lambda received: received * self._unscaled(received))
                self._backward(loss + correction, 1.0)
                losses.append(loss.detach())
        return _total(losses), norm

    def _averaged(self, direction: list[Tensor | None]) -> list[Tensor | None]:
        whole = [torch.zeros_like(p) if d is None else d for d, p in zip(direction, self.perturbed, strict=True)]
        self.parallelism.average(whole)
        return list(whole)

    def _summed_gradient(self) -> list[Tensor | None]:
        total: list[Tensor | None] = [None] * len(self.perturbed)
        for i in range(len(self.closures)):
            with self.parallelism.synchronised(False):
                loss = self._scaled(self._evaluate(self.closures, i))
                gradients = torch.autograd.grad(loss, self.perturbed, allow_unused=True)
            total = [t if g is None else g if t is None else t + g for t, g in zip(total, gradients, strict=True)]
        return total

    def _scaled(self, value: Tensor) -> Tensor:
        """``value`` times the loss scale."""
        return value if self.scaler is None else self.scaler.scale(value)

    def _unscaled(self, value: Tensor) -> Tensor:
        """``value`` divided by the loss scale."""
        return value if self.scaler is None else value / self._scale(value)

    def _scale(self, like: Tensor) -> float | Tensor:
        """The loss scale on the device of ``like``; nobody waits for its value."""
        return 1.0 if self.scaler is None else self.scaler.scale(torch.ones((), dtype=like.dtype, device=like.device))

    def _run(self, closures: Sequence[Closure], weight: float, *, synchronise: bool) -> Tensor:
        """Forward and backward through every closure, ``weight`` times its gradient accumulating; returns the summed, detached loss."""
        losses: list[Tensor] = []
        for i in range(len(closures)):
            with self.parallelism.synchronised(synchronise and i == len(closures) - 1):
                loss = self._evaluate(closures, i)
                losses.append(loss.detach().clone())  # CUDA graphs of torch.compile reuse its memory in the next pass
                self._backward(loss, weight)
        return _total(losses)

    def _backward(self, loss: Tensor, weight: float) -> None:
        if self.backward is not None:
            self.backward(loss if weight == 1.0 else loss * weight)
            return
        scaled = self._scaled(loss)
        scaled.backward(None if weight == 1.0 else torch.full_like(scaled, weight))

    def _evaluate(self, closures: Sequence[Closure], i: int) -> Tensor:
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

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """The perturbed parameters that have a gradient, and their gradients."""
        pairs = [(p, p.grad) for p in self.perturbed if p.grad is not None]
        parameters: list[Tensor] = [p for p, _ in pairs]
        return parameters, placed_like([g for _, g in pairs], parameters)

    def _add_to_gradients(self, earlier: Sequence[Tensor | None]) -> None:
        """Before the last pass: add what ``.grad`` held before the step to what this step has gathered, so that both are synchronised."""
        both: list[tuple[Tensor, Tensor]] = []
        for p, before in zip(self.trainable, earlier, strict=True):
            if before is not None and p.grad is None:
                p.grad = before.clone()
            elif before is not None and p.grad is not None:
                both.append((p.grad, before))
        if both:
            torch._foreach_add_(local_shards([g for g, _ in both]), local_shards([g for _, g in both]))


def _total(losses: Sequence[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(list(losses)).sum()
