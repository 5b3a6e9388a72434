"""One step: running the passes of a plan and accumulating their weighted gradients in ``.grad``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradreg.penalties import GradientPenalty
from gradreg.plan import Pass, Plan, StepValues
from gradreg.torch.adapted import AdaptedLayer, LayerNoise
from gradreg.torch.auto_radius import RadiusControl, RadiusMeasurement
from gradreg.torch.closures import Evaluator
from gradreg.torch.directions import Ascent, DirectionInputs, ascent_direction
from gradreg.torch.gradients import ByParameter, Gradients
from gradreg.torch.held_out import HeldOutMeasurement
from gradreg.torch.masks import CoordinateMask
from gradreg.torch.metrics import Alignment
from gradreg.torch.mixing import MixingInputs, add_reused, mix, orthogonal_part, weigh_plain
from gradreg.torch.norms import gradient_norm, local_shards, quotient, tensor_norms
from gradreg.torch.perturbation import Perturbation
from gradreg.torch.state import AVERAGE, REUSED, State

NAN = float("nan")


@dataclass
class Result:
    """The results of a step, besides the gradients in ``.grad``.

    Args:
        loss: the loss of the first pass, detached and summed over the closures.
        aux: the aux of the first pass.
        norm: of the first gradient over the perturbed parameters; NaN if it was not measured.
        cosine: between the first gradient and the next; NaN if it was not measured.
        correction: what a decoupled penalty leaves to be applied separately from the optimizer, without the loss scale.
        lengths: of the first perturbation, a multiple of the L2 norm in each parameter; empty if it was not measured.
    """

    loss: Tensor
    aux: Any
    norm: Tensor | float = NAN
    cosine: Tensor | float = NAN
    correction: ByParameter = field(default_factory=dict)
    lengths: ByParameter = field(default_factory=dict)


@dataclass
class Step:
    """What one call of ``GradientRegularizer.backward`` works on.

    Args:
        penalty: what is penalized; None for nothing.
        values: its numbers at this step.
        plan: the passes to make; not an exact one, which ``gradreg.torch.exact`` runs.
        evaluator: evaluates the closures.
        gradients: reads and writes ``.grad``.
        perturbed: the parameters that are perturbed and counted in the norm.
        indices: the index of each parameter in the model.
        perturbation: perturbs and restores them.
        state: the penalty's state from earlier steps.
        mask: which coordinates are perturbed, or None for all.
        average_direction: under data parallelism, average the first gradient over the ranks before it becomes the direction.
        measure_cosine: measure the cosine between the first gradient and the next.
        measure_norm: measure the norm of the gradient where nothing else needs it.
        check_rounding: whether the radius is large enough to judge rounding by.
        must_reach: whether a first pass that gives no perturbed parameter a gradient is an error.
        radius: measures this step for a radius that sets itself; None for none.
        model: what the parameters are of.
        measure_shares: measure how the perturbation is divided among the parameters.
        averages: whether the gradients are averaged over the ranks with this step's last pass. Not where it is that of one micro-batch of
            several, before the last: they are averaged together.
        held_out: is told the plain gradient, if this step measures held-out data; else None.
        layers: those under adapters, for a direction that perturbs them.
    """

    penalty: GradientPenalty | None
    values: StepValues | None
    plan: Plan
    evaluator: Evaluator
    gradients: Gradients
    perturbed: list[nn.Parameter]
    indices: Mapping[nn.Parameter, int]
    perturbation: Perturbation
    state: State
    mask: CoordinateMask | None
    average_direction: bool
    measure_cosine: bool
    measure_norm: bool
    check_rounding: bool
    must_reach: bool
    radius: RadiusControl | None = None
    model: nn.Module | None = None
    measure_shares: bool = False
    averages: bool = True
    held_out: HeldOutMeasurement | None = None
    layers: Sequence[AdaptedLayer] = ()

    @property
    def averages_last(self) -> bool:
        """Whether the ranks average their gradients after the passes, because each measures its own first."""
        return self.radius is not None and self.evaluator.parallelism.averages and not self.average_direction

    def run(self) -> Result:
        """Make the passes; ``.grad`` holds their result added to what it held before.

        Raises whatever a closure raises; parameters, ``.grad`` and the model's state are then restored.
        """
        return self._one_pass() if self.plan.is_one_plain_pass else self._several_passes()

    def _one_pass(self) -> Result:
        """As without a penalty, except for EMAs that are updated and gradients that are reused."""
        remembers = self.penalty is not None and self.penalty.direction.averages is not None
        if not remembers and not self.plan.reuses:
            alone = self.measure_norm and all(p.grad is None for p in self.evaluator.trainable)
            self.evaluator.run("loss", 1.0, synchronise=True)
            return Result(*self.evaluator.first_values(), self._plain_norm() if alone else NAN)
        with self.gradients.stashed(overwritten=True) as earlier:
            self.evaluator.run("loss", 1.0, synchronise=True)
            result = Result(*self.evaluator.first_values(), self._plain_norm() if self.measure_norm else NAN)
            self._update_ema()
            if self.plan.reuses:
                self._add_reused()
            self.gradients.add_after_averaging(earlier)
        return result

    def _plain_norm(self) -> Tensor:
        _, gradients = self.gradients.held(self.perturbed)
        return self.evaluator.unscaled(gradient_norm(gradients))

    def _add_reused(self) -> None:
        assert self.penalty is not None
        assert self.penalty.reuse is not None
        self.gradients.redistribute()
        gradients = self.gradients.shards()
        parameters = list(gradients)
        add_reused(list(gradients.values()), self.state.shards(REUSED, parameters), self.penalty.reuse.a, parameters)

    def _several_passes(self) -> Result:
        """The passes in order. A gradient that is only summed is weighted through its loss, and accumulates in ``.grad`` in place."""
        assert self.penalty is not None
        assert self.values is not None
        alone = "apart" in [p.keeps for p in self.plan.passes] or self.penalty.direction.averages == "results"
        work = _Work(self, self.penalty, self.values)
        with (
            self.gradients.stashed(overwritten=alone or self.average_direction) as earlier,
            self.evaluator.sharing_state(self.plan),
        ):
            with self.perturbation.restoring():
                for i, this in enumerate(self.plan.passes):
                    last = i == len(self.plan.passes) - 1
                    if last and not alone:
                        self.gradients.add(earlier)  # before the pass, so that both are averaged over the ranks
                    work.make(i, this, last)
            if work.noise is not None and not work.noise.was_drawn:
                raise ValueError(
                    f"closure must run a layer under a low-rank adapter, where {self.penalty.direction} is; got one that ran none of "
                    f"{len(self.layers)} (adapters that are merged into other modules, or a compiled model). Use the model given here."
                )
            if work.measurement is not None:
                work.measurement.guard(None if alone else earlier, all_passes=sum(p.offset != 0 for p in self.plan.passes) > 1)
            if self.averages_last and self.averages:
                self.gradients.average()
            if alone:
                self._mix(work)
                if self.penalty.direction.averages == "results":
                    self._update_ema()
                self.gradients.add_after_averaging(earlier)
        return work.result()

    def _mix(self, work: _Work) -> None:
        """Turn what the passes accumulated into the result, with the plain gradient that was held apart.

        Where only one of them reached a parameter, the other's gradient is 0 there.
        """
        apart, penalty = work.apart, work.penalty
        if not apart:
            return
        for p in apart:
            if p.grad is None:
                p.grad = torch.zeros_like(p, requires_grad=False)
        self.gradients.redistribute()
        shards = self.gradients.shards()
        apart = {p: apart[p] if p in apart else torch.zeros_like(p, requires_grad=False) for p in shards}
        inputs = MixingInputs(list(shards.values()), local_shards(list(apart.values())), list(shards), self.plan.plain_weight)
        inputs.scale = self.evaluator.scale(inputs.plain[0])
        if isinstance(self.plan.plain_weight, Tensor):
            torch._foreach_add_(inputs.result, torch._foreach_mul(inputs.plain, self.plan.plain_weight))
        elif self.plan.plain_weight != 0.0:
            torch._foreach_add_(inputs.result, inputs.plain, alpha=self.plan.plain_weight)
        if penalty.reuse is not None:
            self.state.stage(REUSED, inputs.like, self._without_scale(orthogonal_part(inputs)))
        elif penalty.decoupled:
            torch._foreach_sub_(inputs.result, inputs.plain)
            torch._foreach_add_(inputs.plain, inputs.result, alpha=0.0)  # adds 0, or NaN where a pass overflowed, which a scaler must see
            for p in apart:
                p.grad = apart[p]
            work.correction = dict(zip(apart, self._without_scale(inputs.result), strict=True))
        else:
            mix(penalty.mixing, inputs)

    def _without_scale(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        scale = self.evaluator.scale(tensors[0])
        return list(tensors) if isinstance(scale, float) else list(torch._foreach_mul(list(tensors), 1.0 / scale))

    def _update_ema(self) -> None:
        """Update the EMA of gradients or results with ``.grad``."""
        if self.penalty is None or self.penalty.direction.averages is None:
            return
        gradients = self.gradients.shards(self.perturbed)
        shards, decay = list(gradients.values()), self.penalty.direction.average_decay
        unscaling = self.unscaling(1.0, shards)
        self.state.update_ema(AVERAGE, list(gradients), shards, decay, unscaling, finite_only=self.evaluator.scaler is not None)

    def unscaling(self, weight: float, shards: Sequence[Tensor]) -> float | Tensor:
        """The factor that removes ``weight`` and the loss scale from ``shards``."""
        return 1.0 / (weight * self.evaluator.scale(shards[0])) if shards else 1.0


class _Work:
    """The passes of a step while it runs.

    Args:
        step: the step.
        penalty: its penalty.
        values: the penalty's numbers at it.
    """

    def __init__(self, step: Step, penalty: GradientPenalty, values: StepValues) -> None:
        self.step = step
        self.penalty = penalty
        self.values = values
        self.apart: ByParameter = {}
        self.correction: ByParameter = {}
        self._norm: Tensor | float = NAN
        self._cosine: Tensor | float = NAN
        self._alignment: Alignment | None = None
        self.measurement: RadiusMeasurement | None = None
        self._measured = False
        self.noise: LayerNoise | None = None
        self._lengths: ByParameter = {}
        self._overflow = False
        self._offset: float = 0

    def result(self) -> Result:
        """The results, after all passes."""
        return Result(*self.step.evaluator.first_values(), self._norm, self._cosine, self.correction, self._lengths)

    def make(self, i: int, this: Pass, last: bool) -> None:
        """Make pass ``i`` of the plan: perturb the parameters to its offset, run it, and handle its gradient."""
        step = self.step
        if this.offset * self._offset < 0:
            step.perturbation.mirror()
            self._offset = this.offset
        elif this.offset != 0 and self._offset == 0:
            with torch.no_grad():
                self._perturb(self._direction_without_gradient(), this.offset)  # the plan has no pass that gives a direction
        if this.gives_direction or (this.offset == 0 and this.keeps != "sum"):
            self._make_first(i, this)
            return
        measured = self._alignment if this.offset != 0 else None
        measurement = self.measurement if this.offset != 0 and not self._measured else None
        for one in (measured, measurement):
            if one is not None:
                one.before_pass()
        weight = NAN if self._overflow else this.weight  # after an overflow nothing is perturbed, and NaN tells the scaler
        whole = last or (measurement is not None and step.average_direction)  # the alignment is that of averaged gradients
        synchronise = whole and step.averages and not step.averages_last
        loss = step.evaluator.run(this.of, weight, synchronise=synchronise, returns_loss=measurement is not None)
        if i == 0 and this.offset == 0:
            self._look_at_plain(this)
        if measured is not None:
            self._cosine = measured.after_pass(this.weight)
            self._alignment = None
        if measurement is not None and loss is not None:
            rise = (loss - step.evaluator.first_values()[0]) / (step.evaluator.share if this.offset > 0 else -step.evaluator.share)
            self._cosine = measurement.after_pass(weight, rise)
            self._measured = True

    def _look_at_plain(self, this: Pass) -> None:
        """Measure the norm, and prepare the cosine, of a plain pass that gives no direction."""
        step = self.step
        if step.held_out is not None:
            step.held_out.add_plain(this.weight)
        parameters, first = step.gradients.held(step.perturbed)
        if step.measure_norm:
            self._norm = self._unweighted(gradient_norm(first), this.weight)
        if step.measure_cosine and first and all(p.of == "loss" for p in step.plan.passes):
            self._alignment = Alignment(parameters, first, this.weight)

    def _begin_measurement(self, parameters: Sequence[nn.Parameter], this: Pass) -> None:
        """Prepare what a radius that sets itself is measured by: ``.grad`` holds the gradient of ``this`` pass, the plain one."""
        step = self.step
        if step.radius is None or not parameters:
            return
        stays = this.keeps == "nothing" and self.penalty.direction.is_gradient and not step.evaluator.parallelism.reuses_gradients
        self.measurement = RadiusMeasurement(step.radius, step.evaluator, step.gradients, parameters, this.weight, copies=not stays)

    def _unweighted(self, norm: Tensor, weight: float) -> Tensor | float:
        return quotient(norm, abs(weight) * self.step.evaluator.scale(norm))

    def _make_first(self, i: int, this: Pass) -> None:
        """A pass whose gradient gives the direction, or is held apart."""
        step, evaluator = self.step, self.step.evaluator
        kept = step.gradients.stash(overwritten=step.average_direction) if i > 0 else None
        synchronise = this.gives_direction and step.average_direction
        evaluator.run(this.of, this.weight, synchronise=synchronise)
        parameters, first = step.gradients.held(step.perturbed)
        if step.must_reach and step.perturbed and not first and this.gives_direction:
            raise ValueError(
                f"closure must reach a perturbed parameter; got a loss that gave none of the {len(step.perturbed)} a gradient (or hooks of "
                "the backward pass that took them away, as optimizers that step inside of it do). Select parameters that the loss depends "
                "on: parameters=lambda name, p: ..."
            )
        norm = _Lazily(first)
        climbs = this.offset != 0
        if step.held_out is not None and not climbs and this.of == "loss":
            step.held_out.add_plain(this.weight)
        if step.measure_norm and not climbs:
            norm()
        agreed: ByParameter = {}
        if not climbs and self._looks_at_gradients(this):
            agreed = step.gradients.all_reduced(averaged=synchronise)
        if step.radius is not None and not climbs:
            self._begin_measurement(parameters, this)
        elif step.measure_cosine and first and not climbs:
            self._alignment = Alignment(parameters, first, this.weight)
        if evaluator.scaler is not None and not torch.isfinite(norm()):
            self._overflow = True
        factor: float | Tensor | None = None
        if this.keeps == "sum" and self.penalty.mixing.plain_gradient == "normalized":
            factor = weigh_plain(self.penalty.mixing, step.plan.plain_weight, norm())
            factor = evaluator.scaled(factor) if isinstance(factor, Tensor) else factor
        if this.gives_direction and self._overflow:
            self._offset = step.plan.passes[i + 1].offset
        elif this.gives_direction:
            with torch.no_grad():
                ascent = self._direction(this, parameters, first, norm, agreed)
                self._perturb(ascent, step.plan.passes[i + 1].offset - this.offset)
                del ascent
        if not climbs and norm.measured is not None:
            self._norm = self._unweighted(norm.measured, this.weight)
        del first, norm  # or the first gradient would live on beside the second
        self._put_by(this, agreed, factor)
        if kept is not None:
            step.gradients.restore(kept)

    def _put_by(self, this: Pass, agreed: ByParameter, factor: float | Tensor | None) -> None:
        """Keep, scale or drop the first gradient, as the plan says."""
        gradients = self.step.gradients
        if this.keeps == "apart":
            held_by_ranks = self.step.average_direction and self.step.evaluator.parallelism.reuses_gradients
            self.apart = {p: g.clone() for p, g in agreed.items()} if held_by_ranks else agreed
        if this.keeps != "sum":
            gradients.clear()
        elif factor is not None:
            gradients.redistribute()
            torch._foreach_mul_(list(gradients.shards().values()), factor)

    def _looks_at_gradients(self, this: Pass) -> bool:
        """Whether something other than the perturbation depends on the first gradient, so that all ranks must agree on it."""
        mask = self.step.mask
        return (
            this.keeps == "apart"
            or self.penalty.direction.averages == "gradients"
            or (mask is not None and mask.needs_gradients(self.values.step))
        )

    def _direction_without_gradient(self) -> Ascent:
        step, parameters = self.step, self.step.perturbed
        remembers = self.penalty.direction.averages is not None
        average = step.state.shards(AVERAGE, parameters) if remembers else []
        inputs = DirectionInputs(parameters, step.indices, self.values.step, [], lambda: torch.zeros(()), average, layers=step.layers)
        return self._masked(ascent_direction(self.penalty.direction, inputs), {})

    def _direction(self, this: Pass, parameters: list[nn.Parameter], first: list[Tensor], norm: _Lazily, agreed: ByParameter) -> Ascent:
        """The direction from the gradients ``first`` of ``parameters``; EMAs are updated with ``agreed``."""
        step, shards = self.step, local_shards(first)
        agreed_shards: ByParameter = {}
        if agreed:
            counted = set(step.perturbed)
            found = {p: g for p, g in agreed.items() if p in counted}
            agreed_shards = dict(zip(found, local_shards(list(found.values())), strict=True))
        average: list[Tensor] = []
        if self.penalty.direction.averages == "gradients" and agreed_shards and this.offset == 0:
            average = self._staged_average(this, agreed_shards, parameters)
        inputs = DirectionInputs(
            parameters,
            step.indices,
            self.values.step,
            shards,
            norm,
            average,
            this.weight,
            step.evaluator.scale(shards[0]) if shards else 1.0,
            consumable=this.keeps == "nothing" and not (step.mask is not None and step.mask.needs_gradients(self.values.step)),
            radius=self.values.radius,
            model=step.model,
        )
        ascent = ascent_direction(self.penalty.direction, inputs) if shards else Ascent(parameters, [], norm)
        return self._masked(ascent, agreed_shards if this.offset == 0 else None)

    def _staged_average(self, this: Pass, agreed: Mapping[nn.Parameter, Tensor], wanted: Sequence[nn.Parameter]) -> list[Tensor]:
        """The EMA updated with ``agreed``; it is staged, and committed if the step succeeds."""
        parameters, shards, decay = list(agreed), list(agreed.values()), self.penalty.direction.average_decay
        fresh = self.step.state.next_ema(AVERAGE, parameters, shards, decay, self.step.unscaling(this.weight, shards))
        self.step.state.stage(AVERAGE, parameters, fresh)
        by_parameter = dict(zip(parameters, fresh, strict=True))
        return [by_parameter[p] for p in wanted]

    def _masked(self, ascent: Ascent, agreed: Mapping[nn.Parameter, Tensor] | None) -> Ascent:
        """``ascent`` with zeros in unperturbed coordinates, chosen from ``agreed`` or, with None, as before; its norm is unchanged."""
        mask = self.step.mask
        if mask is not None and ascent.vectors:
            norm = ascent.norm() if callable(ascent.norm) else ascent.norm
            masks = mask.again(ascent.parameters) if agreed is None else mask.at(self.values.step, ascent.parameters, agreed)  # type: ignore[arg-type]  # they are
            vectors = list(torch._foreach_mul(ascent.vectors, masks))
            return replace(ascent, vectors=vectors, norm=norm)
        return ascent

    def _perturb(self, ascent: Ascent, by: float) -> None:
        """Perturb along ``ascent`` by ``by`` times the radius."""
        step = self.step
        if ascent.noise is not None:
            self.noise = ascent.noise
            step.perturbation.perturb_layers(ascent.noise, ascent.distance(self.penalty.power, by * self.values.radius))
        if ascent.vectors:
            if step.measure_shares and not self._lengths:
                self._lengths = dict(zip(ascent.parameters, tensor_norms(ascent.vectors, ascent.parameters), strict=True))
            distance = ascent.distance(self.penalty.power, by * self.values.radius)
            step.perturbation.perturb(ascent.parameters, ascent.vectors, distance, check_rounding=step.check_rounding)
        self._offset += by


class _Lazily:
    """The norm over all ``vectors``, measured at most once, and only if it is needed."""

    def __init__(self, vectors: Sequence[Tensor]) -> None:
        self._vectors = vectors
        self.measured: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.measured is None:
            self.measured = gradient_norm(self._vectors)
        return self.measured
