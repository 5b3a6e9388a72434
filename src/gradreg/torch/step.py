"""One step: running the passes of a plan and gathering the weighted gradients in ``.grad``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gradreg.directions import Friendly, Random, Remembered
from gradreg.mixing import Decoupled, Reuse, SurrogateGap
from gradreg.penalties import GradientPenalty
from gradreg.torch import directions, mixing
from gradreg.torch.alignment import Alignment
from gradreg.torch.directions import Ascent
from gradreg.torch.evaluation import Closure, Evaluation
from gradreg.torch.gradients import Gradients, Grads
from gradreg.torch.masks import SparseMask
from gradreg.torch.memory import Memory
from gradreg.torch.norms import gradient_norm, ratio_or_zero
from gradreg.torch.parallel import local_shards
from gradreg.torch.passes import Plan, plan
from gradreg.torch.perturbation import Perturbation
from gradreg.torch.replay import ForwardBuffers


@dataclass
class Step:
    """What one call of ``GradientRegularizer.backward`` works on.

    Args:
        number: the optimizer step.
        evaluation: evaluates the closures.
        grads: what they leave in ``.grad``.
        closures: the micro-batches.
        ascents: the closures of the direction, or None for ``closures``.
        perturbed: the parameters that are moved and counted in the norm.
        places: the place of each parameter in the model.
        perturbation: moves and restores them.
        buffers: the buffers that only the first pass may change, or None to let every pass change them.
        memory: what earlier steps left.
        mask: which coordinates are moved, or None for all.
        average_direction: under data parallelism, average the first gradient over the ranks before it becomes the direction.
        measure_cosine: measure the cosine between the first gradient and the next.
        measure_norm: measure the norm of the gradient where it is of no other use.
        cosine: what was measured; NaN if nothing was.
        correction: what ``Decoupled`` leaves to be applied beside the optimizer, without the loss scale.
    """

    number: int
    evaluation: Evaluation
    grads: Grads
    closures: Sequence[Closure]
    ascents: Sequence[Closure] | None
    perturbed: list[nn.Parameter]
    places: Mapping[nn.Parameter, int]
    perturbation: Perturbation
    buffers: ForwardBuffers | None
    memory: Memory
    mask: SparseMask | None
    average_direction: bool
    measure_cosine: bool
    measure_norm: bool
    cosine: float | Tensor = float("nan")
    correction: Gradients = field(default_factory=dict)

    def plain(self, penalty: GradientPenalty | None) -> tuple[Tensor, Tensor | float]:
        """One pass, as without a penalty: returns the loss and the gradient's norm, NaN if not measured or ``.grad`` held something.

        What ``penalty`` remembers takes in the gradient.
        """
        if penalty is None or not penalty.direction.has_memory:
            alone = self.measure_norm and all(p.grad is None for p in self.evaluation.trainable)
            loss = self.evaluation.run(self.closures, 1.0, synchronise=True)
            return loss, self._plain_norm() if alone else float("nan")
        return self._alone(penalty, reused=None)

    def reusing(self, penalty: GradientPenalty, reuse: Reuse) -> tuple[Tensor, Tensor | float]:
        """One pass, to whose gradient the reused part of an earlier one is added; returns the loss and the plain gradient's norm."""
        return self._alone(penalty, reused=reuse)

    def _alone(self, penalty: GradientPenalty, reused: Reuse | None) -> tuple[Tensor, Tensor | float]:
        """One pass whose gradient is looked at apart from what was in ``.grad`` before."""
        earlier = self.grads.set_aside(overwritten=True)
        try:
            loss = self.evaluation.run(self.closures, 1.0, synchronise=True)
        except BaseException:
            self.grads.put_back(earlier)
            raise
        norm = self._plain_norm() if self.measure_norm else float("nan")
        self._remember(penalty)
        if reused is not None:
            self.grads.settle()
            gradients = self.grads.shards()
            parameters = list(gradients)
            mixing.add_reused(list(gradients.values()), self.memory.shards(mixing.KIND, parameters), reused.a, parameters)
        self.grads.add_after_averaging(earlier)
        return loss, norm

    def _plain_norm(self) -> Tensor:
        return self.evaluation.unscaled(gradient_norm(list(self.grads.of(self.perturbed).values())))

    def finite_difference(self, penalty: GradientPenalty, coefficient: float, radius: float) -> tuple[Tensor, Tensor | float]:
        """The passes of ``plan``: returns the loss at the unperturbed parameters and the norm of the gradient there.

        The first gradient arrives already weighted (its loss is), and the others accumulate onto it, so one gradient is all that is held,
        unless the mixing needs it aside. Without a pass at the unperturbed parameters, the loss is the moved one and the norm NaN.
        """
        passes = plan(penalty, coefficient, separate_ascent=self.ascents is not None)
        alone = passes.keeps_first == "aside" or isinstance(penalty.direction, Remembered)
        earlier = self.grads.set_aside(overwritten=alone or self.average_direction)
        try:
            if self.buffers is not None:
                self.buffers.watch()
            loss, norm, overflow, aside, alignment = self._to_the_first_place(penalty, passes, coefficient, radius)
            for _ in range(1, passes.ascent_steps):
                overflow = self._ascend_further(penalty, radius, overflow)
            place = passes.moved[0].place
            for i, this in enumerate(passes.moved):
                if this.place == 0:
                    self.perturbation.restore()
                elif this.place != place:
                    self.perturbation.mirror()
                if this.place != place:
                    self.evaluation.parallelism.drop_copies()
                place = this.place
                last = i == len(passes.moved) - 1
                if last and not alone:
                    self.grads.add(earlier)  # before the pass, so that both are synchronised
                # After an overflow the parameters stay where they are (other ranks may be waiting in this pass), and NaN tells the scaler.
                if alignment is not None and i == 0:
                    alignment.before_pass()
                evaluated = self.evaluation.run(self.closures, float("nan") if overflow else this.weight, synchronise=last)
                if alignment is not None and i == 0:
                    self.cosine = alignment.after_pass(this.weight)
                if loss is None and self.buffers is not None:
                    self.buffers.keep()
                if loss is None or this.place == 0:
                    loss = evaluated
            if alone:
                self._mix(penalty, aside, passes.at_theta)
                if isinstance(penalty.direction, Remembered):
                    self._remember(penalty)
                self.grads.add_after_averaging(earlier)
        except BaseException:
            self.grads.put_back(earlier)
            raise
        finally:
            self.perturbation.restore()
            self.evaluation.parallelism.drop_copies()
            if self.buffers is not None:
                self.buffers.restore()
        assert loss is not None  # a plan has a moved pass
        return loss, norm

    def _to_the_first_place(
        self, penalty: GradientPenalty, passes: Plan, coefficient: float, radius: float
    ) -> tuple[Tensor | None, Tensor | float, bool, Gradients, Alignment | None]:
        """The first pass, if there is one, and the first move: loss, norm of the gradient, overflow, gradient held aside, alignment."""
        radius = passes.moved[0].place * radius
        if passes.first is None:
            self._move(penalty, self._without_gradient(penalty), radius)
            return None, float("nan"), False, {}, None
        weight = passes.first.weight
        loss = self.evaluation.run(self._direction_closures, weight, synchronise=self.average_direction)
        if self.buffers is not None:
            self.buffers.keep()
        first = self.grads.of(self.perturbed)
        norm = gradient_norm(list(first.values()))
        agreed = self.grads.agreed(averaged=self.average_direction) if self._looks_at_gradients(penalty, passes) else {}
        alignment = Alignment(list(first), list(first.values()), weight) if self.measure_cosine and first else None
        overflow = self._overflows(norm)
        if not overflow:
            if penalty.direction.needs_gradient:
                consumable = passes.keeps_first == "none" and not self._mask_looks_at_gradients
                vectors, scale = local_shards(list(first.values())), self.evaluation.scale(norm)
                ascent = Ascent(list(first), vectors, norm, weight, scale, consumable)
                self._move(penalty, self._along(penalty, ascent, agreed), radius)
            else:
                self._move(penalty, self._without_gradient(penalty), radius)
        del first  # or the first gradient would live on beside the second
        if passes.keeps_first == "aside":
            if self.average_direction and self.evaluation.parallelism.reuses_gradients:
                agreed = {p: g.clone() for p, g in agreed.items()}
        else:
            agreed = {}
        if passes.keeps_first != "accumulated":
            self.grads.clear()
        elif penalty.mixing == "unit":
            self.grads.settle()
            kept = list(self.grads.shards().values())
            torch._foreach_mul_(kept, self.evaluation.scaled(ratio_or_zero(1.0 - coefficient, norm)))
        return loss, self.evaluation.unscaled(norm if weight == 1.0 else norm / abs(weight)), overflow, agreed, alignment

    @property
    def _direction_closures(self) -> Sequence[Closure]:
        return self.closures if self.ascents is None else self.ascents

    def _looks_at_gradients(self, penalty: GradientPenalty, passes: Plan) -> bool:
        """Whether something but the move depends on the first gradient, on which all ranks must then agree."""
        return passes.keeps_first == "aside" or isinstance(penalty.direction, Friendly) or self._mask_looks_at_gradients

    @property
    def _mask_looks_at_gradients(self) -> bool:
        return self.mask is not None and self.mask.looks_at_gradients(self.number)

    def _overflows(self, norm: Tensor) -> bool:
        return self.evaluation.scaler is not None and not torch.isfinite(norm)

    def _without_gradient(self, penalty: GradientPenalty) -> Ascent:
        if isinstance(penalty.direction, Remembered):
            return self._masked(directions.remembered(penalty.direction, self.memory, self.perturbed), {})
        assert isinstance(penalty.direction, Random)  # the only other one that needs no gradient
        return self._masked(directions.drawn(penalty.direction, self.number, self.perturbed, self.places), {})

    @torch.no_grad()
    def _along(self, penalty: GradientPenalty, ascent: Ascent, agreed: Gradients) -> Ascent:
        """``ascent`` along the gradient turned into the penalty's direction; what is remembered takes in ``agreed``."""
        counted = set(self.perturbed)
        found = {p: g for p, g in agreed.items() if p in counted}
        parameters, shards = list(found), local_shards(list(found.values()))
        agreed = dict(zip(parameters, shards, strict=True))
        average: list[Tensor] = []
        if isinstance(penalty.direction, Friendly) and agreed:
            factor = self._unscaling(ascent.weight, shards)
            fresh = self.memory.average(directions.KIND, parameters, shards, penalty.direction.beta, factor)
            self.memory.propose(directions.KIND, parameters, fresh)
            by_parameter = dict(zip(parameters, fresh, strict=True))
            average = [by_parameter[p] for p in ascent.parameters]
        return self._masked(directions.along_gradient(penalty.direction, ascent, average), agreed)

    def _masked(self, ascent: Ascent, agreed: Gradients | None) -> Ascent:
        """``ascent`` without the coordinates that are not to be moved, chosen by ``agreed`` or, with None, as before; its norm stays."""
        if self.mask is not None and ascent.vectors:
            masks = self.mask.again(ascent.parameters) if agreed is None else self.mask.at(self.number, ascent.parameters, agreed)
            ascent.vectors = list(torch._foreach_mul(ascent.vectors, masks))
        return ascent

    def _move(self, penalty: GradientPenalty, ascent: Ascent, radius: float) -> None:
        self.perturbation.move(ascent.parameters, ascent.vectors, ascent.distance(penalty.power, radius / penalty.ascent_steps))
        self.evaluation.parallelism.drop_copies()

    def _ascend_further(self, penalty: GradientPenalty, radius: float, overflow: bool) -> bool:
        """One more ascent step, from where the last one ended; returns whether anything has overflowed by now."""
        kept = self.grads.set_aside(overwritten=self.average_direction)
        self.evaluation.run(self._direction_closures, 1.0, synchronise=self.average_direction)
        gradients = self.grads.of(self.perturbed)
        norm = gradient_norm(list(gradients.values()))
        overflow = overflow or self._overflows(norm)
        if not overflow:
            ascent = Ascent(list(gradients), local_shards(list(gradients.values())), norm, 1.0, self.evaluation.scale(norm))
            self._move(penalty, self._masked(ascent, None), radius)
        self.grads.put_back(kept)
        return overflow

    def _mix(self, penalty: GradientPenalty, aside: Gradients, at_theta: float) -> None:
        """Turn what the moved passes gathered into the result, with the plain gradient that was held ``aside``.

        Where only one of them reached a parameter, the other's gradient is 0 there.
        """
        if not aside:
            return
        for p in aside:
            if p.grad is None:
                p.grad = torch.zeros_like(p, requires_grad=False)
        self.grads.settle()
        shards = self.grads.shards()
        aside = {p: aside[p] if p in aside else torch.zeros_like(p, requires_grad=False) for p in shards}
        parameters, result, plain = list(shards), list(shards.values()), local_shards(list(aside.values()))
        if at_theta != 0.0:
            torch._foreach_add_(result, plain, alpha=at_theta)
        if isinstance(penalty.mixing, SurrogateGap):
            mixing.surrogate_gap(result, plain, penalty.mixing.a, parameters)
        elif isinstance(penalty.mixing, Reuse):
            part = mixing.orthogonal_part(result, plain, parameters)
            self.memory.propose(mixing.KIND, parameters, self._without_scale(part))
        elif isinstance(penalty.mixing, Decoupled):
            torch._foreach_sub_(result, plain)
            torch._foreach_add_(plain, result, alpha=0.0)  # 0, or NaN where a moved pass overflowed: a scaler must see that
            for p in parameters:
                p.grad = aside[p]
            self.correction = dict(zip(parameters, self._without_scale(result), strict=True))

    def _without_scale(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        scale = self.evaluation.scale(tensors[0])
        return list(tensors) if isinstance(scale, float) else list(torch._foreach_mul(list(tensors), 1.0 / scale))

    def _remember(self, penalty: GradientPenalty) -> None:
        """Have what is remembered take in ``.grad``."""
        direction = penalty.direction
        if isinstance(direction, (Friendly, Remembered)):
            decay = direction.beta if isinstance(direction, Friendly) else direction.decay
            gradients = self.grads.shards(self.perturbed)
            shards = list(gradients.values())
            finite_only = self.evaluation.scaler is not None
            self.memory.take_in(directions.KIND, list(gradients), shards, decay, self._unscaling(1.0, shards), finite_only=finite_only)

    def _unscaling(self, weight: float, shards: Sequence[Tensor]) -> float | Tensor:
        """What takes ``weight`` and the loss scale off ``shards``."""
        return 1.0 / (weight * self.evaluation.scale(shards[0])) if shards else 1.0
