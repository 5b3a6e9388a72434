"""A radius that sets itself: its state, and what a step measures for it (``gradreg.auto_radius`` has the rule)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradreg import checks
from gradreg.auto_radius import NUMBERS, AutoRadius, Guards, Measurement, SelfSetRadius
from gradreg.lets import Slope
from gradreg.plan import StepValues
from gradreg.torch import norms
from gradreg.torch.closures import Evaluator
from gradreg.torch.gradients import ByParameter, Gradients, Stash
from gradreg.torch.norms import gradient_norm, inner_products, local_shards
from gradreg.torch.parallel import Parallelism


class RadiusControl:
    """A radius that sets itself from step to step; nothing here waits for the device.

    On an accelerator the state is there, as scalar tensors; on a CPU it is Python's floats, because many operations on scalars would cost
    more than those on the gradients. All ranks hold the same one, because what it is updated with is averaged over them.

    Args:
        rule: the specification.
        guards: what it can expect of the loss.
        parameters: what is perturbed; the state is on the device of the first, and in float64 if one of them is.
        parallelism: averages measurements over ranks.
    """

    def __init__(self, rule: SelfSetRadius, guards: Guards, parameters: Sequence[nn.Parameter], parallelism: Parallelism) -> None:
        self.rule: SelfSetRadius = rule
        self._aligned = rule if isinstance(rule, AutoRadius) else None
        self.guards: Guards = guards
        self._first = parameters[0]
        self._dtype = torch.float64 if any(p.dtype in (torch.float64, torch.complex128) for p in parameters) else torch.float32
        self._parallelism = parallelism
        self._pending: list[Any] = []
        self._state = rule.initial

    @property
    def radius(self) -> float | Tensor:
        """The radius of the next step."""
        if norms.reading_is_free(self._first):
            return math.exp(self._state.log_radius)
        return torch.exp(self._here(self._state.log_radius))

    @property
    def is_due(self) -> bool:
        """Whether the next regularized step measures."""
        return self._state.steps % self.rule.every == 0

    def measures(self, values: StepValues) -> bool:
        """Whether the step with these ``values`` measures its two gradients."""
        return self._aligned is not None and values.fresh is True and self.is_due

    def begin(self) -> None:
        """Forget what a failed step measured."""
        self._pending = []

    def keep(self, slope: float | Tensor) -> None:
        """Keep what a step measured on held-out data, the same on all ranks, for ``commit``."""
        self._pending.append(Slope(slope))

    def take(self, measured: Measurement) -> tuple[Any, Any]:
        """Keep what a step measured of its two gradients, averaged over the ranks, for ``commit``.

        Returns:
            The alignment, and whether the perturbed gradient may be part of the result.
        """
        assert self._aligned is not None
        together = self._parallelism.mean_over_ranks(torch.stack([self._here(number) for number in measured]))
        if norms.reading_is_free(self._first):
            averaged, ops = Measurement(*together.tolist()), NUMBERS
        else:
            averaged, ops = Measurement(*together.unbind()), torch
        self._pending.append(averaged)
        return self._aligned.cosine(averaged, ops), self._aligned.usable(averaged, self.guards, ops)

    def agreed(self, number: Tensor) -> Tensor:
        """``number`` averaged over the ranks: not finite on all if it is not on one."""
        return self._parallelism.mean_over_ranks(self._here(number))

    def commit(self, values: StepValues, *, scaled: bool) -> None:
        """After a step that succeeded: the next radius."""
        if values.fresh is not True:
            return
        if self._pending:
            columns = zip(*self._pending, strict=True)
            mean = type(self._pending[0])(*(sum(column[1:], start=column[0]) / len(column) for column in columns))
            state, ops = self._state, NUMBERS
            if isinstance(mean[0], Tensor):
                mean = type(mean)(*map(self._here, mean))
                state, ops = type(state)(*map(self._here, state[:-1]), steps=state.steps), torch
            self._state = self.rule.update(state, mean, self.guards, ops, scaled=scaled)
        else:
            self._state = self._state._replace(steps=self._state.steps + 1)
        self._pending = []

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers."""
        return {name: int(value) if name == "steps" else float(value) for name, value in self._state._asdict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError, TypeError: other keys or values.
        """
        known = self.rule.initial._fields
        if not isinstance(state, Mapping) or set(state) != set(known):  # type: ignore[unnecessary-isinstance]  # a checkpoint's
            got = sorted(state) if isinstance(state, Mapping) else checks.describe(state)  # type: ignore[unnecessary-isinstance]
            raise ValueError(f"radius must hold {' and '.join(known)}; got {got}. Pass what state_dict() of the same rule returned.")
        self._state = self.rule.checked(state)
        self.begin()

    def _here(self, number: Any) -> Tensor:
        return torch.as_tensor(number, dtype=self._dtype, device=self._first.device)


class RadiusMeasurement:
    """What one step measures: begun with the plain gradient, and completed by the first pass at perturbed parameters.

    Args:
        control: receives the measurement.
        evaluator: the evaluations of this step.
        gradients: reads and writes ``.grad``.
        counted: the perturbed parameters that have a gradient, over which the alignment is taken.
        weight: that of the plain pass, whose gradients ``.grad`` holds now.
        copies: whether those gradients are changed before the step ends, so that copies are needed.
    """

    def __init__(
        self,
        control: RadiusControl,
        evaluator: Evaluator,
        gradients: Gradients,
        counted: Sequence[nn.Parameter],
        weight: float | Tensor,
        *,
        copies: bool,
    ) -> None:
        self._control, self._evaluator, self._gradients = control, evaluator, gradients
        self._counted = list(counted)
        self._weight = weight
        self._plain = self._held(evaluator.trainable, copies=copies)
        self._before: ByParameter = {}
        self._usable: bool | Tensor | None = None

    def before_pass(self) -> None:
        """Copy ``.grad`` before the perturbed pass adds to it."""
        self._before = self._held(self._counted, copies=True)

    @torch.no_grad()
    def after_pass(self, weight: float | Tensor, rise: Tensor) -> float | Tensor:
        """The alignment, from what the pass of ``weight`` added to ``.grad``; ``rise``: see ``Measurement``."""
        plain = [self._plain[p] for p in self._counted]
        now = self._held(self._counted, copies=False)
        second = [now[p] if p in now else torch.zeros_like(g) for p, g in zip(self._counted, plain, strict=True)]
        if self._before:
            before = [self._before[p] if p in self._before else torch.zeros_like(g) for p, g in zip(self._counted, plain, strict=True)]
            second = list(torch._foreach_sub(second, before))
        self._before = {}
        squared, product, perturbed = inner_products(plain, second, self._counted)
        scale = self._evaluator.scale(squared)
        first, other = self._weight * scale, weight * scale
        cosine, self._usable = self._control.take(Measurement(squared / first**2, product / (first * other), perturbed / other**2, rise))
        return cosine

    @torch.no_grad()
    def guard(self, earlier: Stash | None, *, all_passes: bool) -> None:
        """Put the plain gradient in place of the result if what a perturbed point gave cannot be used: see ``AutoRadius.usable``.

        Not with a gradient scaler, which must see that.

        Args:
            earlier: what ``.grad`` held before the step, if it has been added to the result already.
            all_passes: whether passes after the measured one are part of the result, so that it must be looked at too.
        """
        usable = self._usable
        if usable is None or self._evaluator.scaler is not None:
            return
        if all_passes:
            norm = self._control.agreed(gradient_norm(list(self._gradients.of(self._evaluator.trainable).values())))
            usable = usable & torch.isfinite(norm)
        if isinstance(usable, bool) or norms.reading_is_free(usable):
            if usable:
                return
            usable = torch.zeros((), dtype=torch.bool, device=self._evaluator.trainable[0].device)
        self._gradients.redistribute()
        held = self._gradients.of(self._evaluator.trainable)
        ours = local_shards(list(held.values()))
        instead = [self._plain[p] if p in self._plain else torch.zeros_like(g) for p, g in zip(held, ours, strict=True)]
        instead = list(torch._foreach_mul(instead, 1.0 / self._weight))
        before = dict(zip(self._evaluator.trainable, earlier or [], strict=False))
        for i, p in enumerate(held):
            present = before.get(p)
            if present is not None:
                instead[i] += local_shards([present.to_dense() if present.is_sparse else present])[0]
        # On an accelerator this runs at every measured step, one operation a tensor, because whether it is needed is known only there.
        for (p, result), into, plain in zip(held.items(), ours, instead, strict=True):
            torch.where(usable.to(into.device), into, plain.to(into.dtype), out=into)
            if result is not p.grad:  # a sparse gradient, of which ``result`` is a dense copy
                p.grad = result

    def _held(self, parameters: Sequence[nn.Parameter], *, copies: bool) -> ByParameter:
        """This rank's shards of what ``.grad`` holds now."""
        shards = self._gradients.shards(parameters)
        with torch.no_grad():
            return dict(zip(shards, torch._foreach_mul(list(shards.values()), 1.0), strict=True)) if copies and shards else shards
