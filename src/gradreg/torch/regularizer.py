"""The gradient oracle for PyTorch: fills ``.grad`` with the gradient of the regularized loss, and leaves everything else as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from gradreg import checks
from gradreg.held_out import HeldOut
from gradreg.penalties import GradientPenalty
from gradreg.plan import PLAIN, Plan, StepValues, resting
from gradreg.registry import check_known
from gradreg.schedules import Schedule
from gradreg.torch import calls
from gradreg.torch.adapted import adapted_layers
from gradreg.torch.auto_radius import RadiusControl
from gradreg.torch.buffers import ForwardState
from gradreg.torch.calls import Perturb, Scope
from gradreg.torch.closures import Closure, Evaluator, Scaler, as_closures
from gradreg.torch.decoupled import Correction
from gradreg.torch.directions import ascent_direction
from gradreg.torch.exact import DoubleBackward
from gradreg.torch.gradients import Gradients
from gradreg.torch.held_out import HeldOutMeasurement, HelpControl, Measured
from gradreg.torch.masks import CoordinateMask, check_mask, perturbed_parameters
from gradreg.torch.metrics import Metrics
from gradreg.torch.microbatches import each_by_itself
from gradreg.torch.mixing import check_mixing
from gradreg.torch.parallel import Parallelism
from gradreg.torch.perturbation import Perturbation
from gradreg.torch.state import State, own_names, remembered_kinds
from gradreg.torch.step import Result, Step
from gradreg.torch.watch import Watch


class GradientRegularizer:
    """Gives a training loop the gradient of ``loss + penalty`` instead of the plain one.

    ::

        regularizer = GradientRegularizer(model, gradreg.fgr(gamma=0.5, epsilon=0.5))
        for x, y in loader:
            optimizer.zero_grad()
            loss = regularizer.backward(lambda: criterion(model(x), y))
            optimizer.step()

    This is not an optimizer; use it with any. Schedulers, clipping and checkpoints work as before. Like an optimizer, build it when the
    model's parameters are final (on their device, wrapped, adapters added).

    All passes of a step over a closure evaluate the same function: each later evaluation starts from the buffers, frozen parameters, module
    attributes and random numbers that the closure's own first evaluation read, and what that first evaluation wrote is kept at the end.
    What ``closure`` computes must come from the model, its arguments and those sources. It must run the forward pass itself.

    Args:
        model: the module whose parameters are perturbed and whose state is restored. If the loss has parameters, they must be
            part of it: outside they would accumulate the plain gradients of all passes.
        penalty: what is penalized; None trains without a penalty, through the same calls.
        parameters: ``(name, parameter) -> bool``: which parameters are perturbed and counted in the norm; all by default. The others are
            not perturbed in the second pass, and their two gradients are combined by the same rule. Parameters that do not require a
            gradient are never touched or counted; this may change between steps.
        scope: under ``DistributedDataParallel``, "local" perturbs each rank by its own gradient (one all-reduce a step; the m-sharpness of
            the SAM paper), "global" perturbs all by the averaged gradient (two all-reduces). Without it they are the same.
        freeze_batch_statistics: the state that a forward pass changes (running statistics, codebooks, queues, momentum teachers in frozen
            parameters, counters) is that of the first pass at the end of a step, and later passes start from what it read. False lets
            every pass read and write what the previous one left.
        replay_rng: every pass over a closure draws the same random numbers (dropout masks) from the global generators of PyTorch, of the
            CPU and of the parameters' devices, of NumPy and of Python, and from generators that modules hold as attributes. A generator
            that only the closure holds is not replayed.
        measure_cosine: put the cosine between the two gradients into ``metrics``; costs two more copies of the gradients during a step. Not
            under ``DistributedDataParallel``, where the second gradient is available only after it was averaged with the first.
        measure_norm: put the norm of the gradient into ``metrics`` also at steps that do not need it otherwise: those of one plain pass, of
            a penalty on the squared norm, and of a direction that is not normalized by it. With False it is NaN there, which saves a
            read of all gradients (about 1 % of a step of a small multi-layer perceptron). May be changed from step to step, to measure
            only what is logged.
        measure_shares: put into ``metrics.shares`` which part of the perturbation lies in each parameter; costs a read of the perturbation
            and no device sync. May be changed from step to step.
        held_out: the rule by which the closures that ``backward(..., held_out=)`` receives switch the penalty off and on; None is
            ``HeldOut()``. Not for a radius that is learned from them (``LETS``).

    Memory: one copy of the perturbed parameters from the first regularized step on, the penalty's state (see its constructor), and
    two copies of the state that forward passes write. Where c = strength / radius is not 1,
    the first gradient is part of the result and stays in ``.grad`` through the second pass, as in gradient accumulation.

    Raises:
        TypeError, ValueError: a model without trainable parameters, a predicate that selects none, a part of the penalty that this engine
            has no function for, or a value of the wrong kind.
    """

    def __init__(
        self,
        model: nn.Module,
        penalty: GradientPenalty | None,
        *,
        parameters: Callable[[str, nn.Parameter], bool] | None = None,
        scope: Scope = "local",
        freeze_batch_statistics: bool = True,
        replay_rng: bool = True,
        measure_cosine: bool = False,
        measure_norm: bool = True,
        measure_shares: bool = False,
        held_out: HeldOut | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {checks.describe(model)}. Pass the module, not its parameters.")
        if penalty is not None and not isinstance(penalty, GradientPenalty):
            raise TypeError(f"penalty must be a GradientPenalty or None; got {checks.describe(penalty)}. Use gradreg.sam(rho=0.05), say.")
        checks.choice("scope", scope, ("local", "global"))
        parallelism = Parallelism(model)
        if penalty is not None:
            check_known(penalty.direction, ascent_direction, engine="PyTorch")
            check_mixing(penalty.mixing)
            check_mask(penalty.mask)
            if scope == "local" and penalty.difference != "exact":
                parallelism.check_local(str(penalty))
        if measure_cosine and parallelism.averages:
            raise ValueError(
                "measure_cosine must be False under DistributedDataParallel, which averages the gradients together; got True. "
                "Measure it in a run of one process."
            )
        named = list(model.named_parameters())
        if not any(p.requires_grad for _, p in named):
            raise ValueError(
                f"model must have at least one parameter with requires_grad=True; got {len(named)} parameters, none trainable. "
                "Unfreeze what is to be trained before building the regularizer."
            )
        selected = perturbed_parameters(model, penalty, parameters)
        mask = None if penalty is None else penalty.mask
        self._layers = adapted_layers(model, selected) if penalty is not None and penalty.direction.perturbs_adapted_layers else []
        self.model = model
        self.penalty = penalty
        self.scope: Scope = scope
        self.freeze_batch_statistics = freeze_batch_statistics
        self.replay_rng = replay_rng
        self.measure_cosine = measure_cosine
        self.measure_norm = measure_norm
        self.measure_shares = measure_shares
        self._parameters = [p for _, p in named]
        self._indices = {p: index for index, p in enumerate(self._parameters)}
        self._perturbed = list(selected)
        self._names = own_names(model)
        self._state = State(self._names, remembered_kinds(penalty))
        self._mask = CoordinateMask(mask, self._state, self._indices) if mask is not None and mask.level == "coordinates" else None
        self._correction = Correction()
        self._remembers = penalty is not None and penalty.keeps_tensors
        if held_out is not None and not isinstance(held_out, HeldOut):  # type: ignore[unnecessary-isinstance]
            raise TypeError(
                f"held_out must be a HeldOut or None; got {checks.describe(held_out)}. The closures belong to backward(..., held_out=...)."
            )
        self._help = HelpControl(held_out or HeldOut(), self._perturbed)
        rule = None if penalty is None else penalty.auto_radius
        self._radius = None
        if penalty is not None and rule is not None:
            self._radius = RadiusControl(rule, penalty.guards, self._perturbed, parallelism)
        self._learns = None if penalty is None else penalty.learned_radius
        if self._learns is not None and held_out is not None:
            raise ValueError(
                f"held_out must be None with {rule}, to which the held-out closures of backward() belong; got {held_out}. Leave it out, or "
                "use AutoRadius(), whose penalty held-out closures switch off and on."
            )
        self._decoupled = penalty is not None and penalty.decoupled
        self._averages = parallelism.averages
        self._parallelism = parallelism
        self._perturbation = Perturbation(parallelism.drop_copies)
        self._watch = Watch(model)
        self._checked_backward = False
        self._forward_state = ForwardState(model)
        self._evaluators: list[Evaluator] = []
        self._step = 0
        self._evaluations: int | float = 0
        nan = float("nan")
        self._metrics = Metrics({"gradient_norm": nan, "strength": nan, "radius": nan, "coefficient": nan, "cosine": nan, "evaluations": 0})

    @property
    def step(self) -> int:
        """Regularized steps done, the clock of the penalty's schedules and warm-ups."""
        return self._step

    @property
    def repeats_pass(self) -> bool:
        """Whether the closure under evaluation was already evaluated in this step: ask it before logging or counting in a closure."""
        return any(evaluator.repeats_pass for evaluator in self._evaluators)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The model's parameters whose ``.grad`` a step fills: all that require a gradient."""
        return [p for p in self._parameters if p.requires_grad]

    @property
    def metrics(self) -> Metrics:
        """What the last step did (see ``Metrics``); values on a device are synchronized only when they are read."""
        return self._metrics

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to resume: plain numbers and, for a penalty with state, ``memory``: tensors by parameter name.

        For a radius that sets itself also ``radius``, and once held-out closures have switched a penalty ``held_out``: their state in
        plain numbers, read from the device.

        Raises:
            RuntimeError: between ``backward`` and ``decoupled_step``, where half a step is pending.
        """
        self._perturbation.recover()
        self._correction.check_applied("state_dict()")
        state: dict[str, Any] = {"step": self._step, "evaluations": self._evaluations}
        if self._remembers:
            state["memory"] = self._state.state_dict()
        if self._radius is not None:
            state["radius"] = self._radius.state_dict()
        if self._help.was_used:
            state["held_out"] = self._help.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from ``state_dict()``'s result; a pending ``decoupled_step`` is discarded.

        Raises:
            ValueError: a missing or unknown key, a negative count, or a memory that does not fit the model.
        """
        keys = ["step", "evaluations", *(["memory"] if self._remembers else []), *(["radius"] if self._radius is not None else [])]
        if set(state) - {"held_out"} != set(keys):
            named = " and ".join(keys)
            raise ValueError(f"state must have the keys {named}; got {sorted(state)}. Pass what state_dict() returned.")
        step = checks.whole("step", state["step"], minimum=0)
        evaluations = checks.non_negative("evaluations", state["evaluations"])
        if self._radius is not None:
            self._radius.load_state_dict(state["radius"])
        held_out = HelpControl(self._help.rule, self._perturbed)
        if "held_out" in state:
            held_out.load_state_dict(state["held_out"])
        self._help = held_out
        if self._remembers:
            self._state.load_state_dict(state["memory"])
        self._step, self._evaluations = step, _whole(evaluations)
        self._correction = Correction()

    def decoupled_step(self, optimizer: torch.optim.Optimizer, *others: torch.optim.Optimizer) -> None:
        """After ``optimizer.step()``: subtract ``lr·(P − g)`` from the parameters, the part that a decoupled penalty keeps out of it.

        ``lr`` is the current learning rate of each parameter's group. It does nothing for other penalties, or after a step that a gradient
        scaler skips, so a training loop may always call it.

        Args:
            optimizer: the optimizer of the model's parameters.
            others: where several optimizers share the parameters (Muon and AdamW), the others, after all of them have stepped. One whose
                step a gradient scaler skips is left out.

        Raises:
            ValueError: no optimizer holds a parameter that must be changed, or two do.
        """
        self._correction.apply((optimizer, *others))

    @overload
    def backward(
        self,
        closure: Callable[[], Tensor] | Sequence[Callable[[], Tensor]],
        *,
        has_aux: Literal[False] = False,
        ascent: Callable[[], Tensor] | Sequence[Callable[[], Tensor]] | None = None,
        ascent_share: float = 1.0,
        held_out: Closure | Sequence[Closure] | None = None,
        perturb: Perturb = "all",
        backward: Callable[[Tensor], object] | None = None,
        scaler: Scaler | None = None,
        step: int | None = None,
    ) -> Tensor: ...
    @overload
    def backward(
        self,
        closure: Closure | Sequence[Closure],
        *,
        has_aux: Literal[True],
        ascent: Closure | Sequence[Closure] | None = None,
        ascent_share: float = 1.0,
        held_out: Closure | Sequence[Closure] | None = None,
        perturb: Perturb = "all",
        backward: Callable[[Tensor], object] | None = None,
        scaler: Scaler | None = None,
        step: int | None = None,
    ) -> tuple[Tensor, Any]: ...
    def backward(
        self,
        closure: Closure | Sequence[Closure],
        *,
        has_aux: bool = False,
        ascent: Closure | Sequence[Closure] | None = None,
        ascent_share: float = 1.0,
        held_out: Closure | Sequence[Closure] | None = None,
        perturb: Perturb = "all",
        backward: Callable[[Tensor], object] | None = None,
        scaler: Scaler | None = None,
        step: int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Evaluate the closure as often as the penalty needs, and leave the regularized gradient in ``.grad``.

        Args:
            closure: runs a forward pass and returns the scalar loss; it must not call ``backward``. Or a sequence of such closures
                (micro-batches): their gradients add up, as in successive ``loss.backward()`` calls, and one perturbation is made
                from the whole sum. For the gradient of the mean, multiply each loss by its share of the samples. Functions made in a loop
                must bind what differs between them: ``lambda x=x, y=y: criterion(model(x), y) / n``.
            has_aux: whether closures return ``(loss, aux)``; aux is any nest of tuples, lists and dictionaries.
            ascent: closure(s) from which the direction comes instead, usually part of the batch: then ``closure`` is evaluated only at
                the perturbed parameters if c = strength / radius = 1, and otherwise at the unperturbed ones first. Not for "exact",
                a mixing other than "plain", ``reuse``, ``decoupled``, or a direction that needs no gradient.
            ascent_share: which part of the batch ``ascent`` evaluates, in (0, 1]: what it adds to ``metrics.evaluations``.
            held_out: closure(s) over data that are not trained on, which return the loss alone. They are evaluated at every
                tenth penalized step (``HeldOut.every``), change no state and no random numbers, and switch the penalty off while its
                correction points against their gradient and, with ``HeldOut.steps_per_epoch``, until there is overfitting to prevent
                (``gradreg.HeldOut``); for the latter their loss has the scale of ``closure``'s. Without a penalty they are not evaluated.
                With a radius that is learned (``LETS``) they are evaluated at every ``LETS.every``-th penalized step, and move that
                alone; their sum must be the same loss as that of ``closure``, on other data: with n closures whose gradients
                ``backward`` divides by n, give n of these too.
                Give them at every step: what they measured is part of ``state_dict()``. Not for "exact", directions that need no gradient,
                and ``ascent`` with c = 1, where no pass gives the plain gradient.
            perturb: "all" makes one perturbation from the sum of the closures' gradients; "each" gives every closure of a sequence of n a
                perturbation of its own, as n ranks with scope "local" have it (m-sharpness): the result is the mean of the regularized
                gradients of the losses n·closure(). So closures are the same in both, each the mean over its micro-batch times its
                share 1/n. Closures that draw or write state follow one another. For scope "local"; not with ``ascent``, a penalty that
                keeps tensors, or mixes otherwise than by a sum.
            backward: replaces ``loss.backward()``, for instance ``accelerator.backward``. It is called with a multiple of the loss and
                must be linear in it. Its factors are part of the objective, except for the scale of ``scaler``: the
                division by ``gradient_accumulation_steps`` makes a sequence of closures the mean of its micro-batches.
            scaler: the ``torch.amp.GradScaler`` in use (``accelerator.scaler``). Without ``backward`` it scales the losses here; with it,
                ``backward`` must do so. The direction is formed from unscaled values; ``.grad`` stays scaled for ``scaler.unscale_`` and
                ``scaler.step``. After a first pass that overflows, the remaining passes run at the unperturbed parameters and give NaN
                gradients, so that the scaler skips the step. Detecting this takes one device sync.
            step: the optimizer step, ≥ 0, for loops that keep their own count: this step uses it, and the clock is then ``step + 1``.

        A gradient already in ``.grad`` is added to, and never enters the norm; with ``.grad is None`` that costs nothing.
        After it returns or raises, the parameters are bit for bit what they were before; if a penalized step raises, so is ``.grad``.

        Returns:
            The detached loss of the first pass, summed over the closures: what plain training would log. With ``has_aux``
            ``(loss, aux)``, where aux is that of the first pass with its tensors detached; for a sequence of closures a list of aux.
            (With ``ascent`` and c = 1, loss and aux are those of ``ascent``, because ``closure`` is not evaluated at the unperturbed
            parameters; for a direction that needs no gradient and c = 1 they are those at the perturbed parameters.)

        Cost: see ``GradientPenalty.evaluations_at``; one evaluation at steps where the strength is 0. The same with ``perturb="each"``,
        which perturbs the parameters n times. Source of that: Foret et al. 2021, arXiv 2010.01412, section 4.1; gain rises as the
        micro-batches get smaller (arXiv 2509.18001).

        Raises:
            TypeError, ValueError: a closure that is not callable, returns no scalar or a loss without a gradient, or calls ``backward``;
                parameters that joined the model later.
            RuntimeError: the last step's ``decoupled_step`` is missing; a loss computed outside of the closure; an optimizer that steps
                inside the backward pass; gradients with a graph (``create_graph=True``) in a step of several passes.
        """
        self._perturbation.recover()  # from a step that was interrupted twice
        closures = [closure] if callable(closure) else as_closures("closure", closure)
        ascents = None if ascent is None else as_closures("ascent", ascent)
        share = 1.0 if ascent_share == 1.0 else checks.probability("ascent_share", ascent_share)
        if ascents is None and share != 1.0:
            raise ValueError(f"ascent_share must be left out without ascent; got {share:g}. Pass ascent=... too.")
        penalty = self.penalty
        number = self._step if step is None else checks.whole("step", step, minimum=0, remedy="Pass the number of optimizer steps done.")
        run = calls.checked_backward(backward, scaler, penalty, first=not self._checked_backward)
        self._watch.check()
        trainable = self.parameters
        if not trainable:
            raise ValueError("model must have at least one parameter with requires_grad=True; got none. Unfreeze some before this step.")
        if self._decoupled:
            self._correction.check_applied("the next backward()")
        if penalty is not None and ascents is not None:
            penalty.check_ascent("closures")
        if perturb != "all":
            calls.check_each(perturb, penalty, self.scope, has_ascent=ascents is not None)
        control = self._radius
        values = None if penalty is None else penalty.at(number, radius=None if control is None else control.radius)
        calls.check_given(held_out, penalty, self._help.rule)
        acting, penalized = values, values is not None and values.fresh is True
        if self._learns is not None:
            measures = penalized and control is not None and control.is_due
        else:
            measures = held_out is not None and penalized and self._help.is_due
            if measures:
                self._help.begin_measurement()
            if values is not None and not self._help.helps:
                values = resting(values)
            if not measures:
                acting = values
        plan = PLAIN if penalty is None or acting is None else penalty.plan(acting, separate_ascent=ascents is not None)
        held = as_closures("held_out", held_out) if measures and held_out is not None else None
        if held is not None:
            calls.check_held_out(plan, penalty, self._parallelism)
        if self._averages:
            calls.check_averaging(plan, penalty, self.scope, self._parallelism)
        perturbed = [p for p in self._perturbed if p.requires_grad]
        in_sequence = not callable(closure if plan.passes[0].of == "loss" else ascent)
        parts = [[one] for one in closures] if perturb == "each" and not plan.is_one_plain_pass and len(closures) > 1 else [closures]
        common: dict[str, Any] = {
            "parallelism": self._parallelism,
            "trainable": trainable,
            "backward": run,
            "scaler": scaler,
            "state": self._forward_state,
        }
        own: dict[str, Any] = {
            **common,
            "has_aux": has_aux,
            "in_sequence": in_sequence and len(parts) == 1,
            "keep_state": self.freeze_batch_statistics,
            "replay_rng": self.replay_rng,
            "share": 1.0 / len(parts),
        }
        self._evaluators = [Evaluator(part, ascents, **own) for part in parts]
        if self._remembers:
            self._state.discard_staged()
        if control is not None:
            control.begin()
        try:
            with torch.enable_grad():
                if held is None:
                    result, measured = self._results(perturbed, acting, plan), None
                else:
                    evaluator = Evaluator(held, None, has_aux=False, in_sequence=True, keep_state=True, replay_rng=True, **common)
                    result, measured = self._measured_results(evaluator, perturbed, acting, plan)
        except BaseException:
            self._perturbation.restore()  # in case the interrupt came while the step's own contexts were exiting
            raise
        finally:
            self._evaluators = []
        self._checked_backward = True
        if self._remembers:
            self._state.commit(finite_only=scaler is not None)
        if self._decoupled:
            self._correction.keep(result.correction, finite_only=scaler is not None)
        if control is not None and acting is not None:
            control.commit(acting, scaled=scaler is not None)
        if held_out is not None and penalized and self._learns is None:
            self._help.commit(measured)
        self._record(number, values, plan, result, share, held_out=0 if held is None else 1)
        return (result.loss, result.aux) if has_aux else result.loss

    def _measured_results(
        self, held_out: Evaluator, perturbed: list[nn.Parameter], values: StepValues | None, plan: Plan
    ) -> tuple[Result, Measured | None]:
        """The result of a step that measures held-out data, and whether the penalty helps, by which it may be off: then it is plain.

        For a radius that is learned the latter is not asked.
        """
        gradients = Gradients(held_out.trainable, self._parallelism)
        with gradients.stashed(overwritten=True) as earlier:
            measurement = HeldOutMeasurement(held_out, gradients, self._parallelism)
            result = self._results(perturbed, values, plan, measurement)
            averaged = self.scope == "global"
            measured = None
            if self._learns is not None and self._radius is not None:
                self._radius.keep(measurement.slope(self._learns, result.correction, result.loss, averaged=averaged))
            else:
                measured = measurement.measured(self._help.rule, result.correction, averaged=averaged)
                if not self._help.helps:
                    measurement.put_plain()
                    result.correction = {}
            gradients.add_after_averaging(earlier)
        return result, measured

    def _results(
        self, perturbed: list[nn.Parameter], values: StepValues | None, plan: Plan, held_out: HeldOutMeasurement | None = None
    ) -> Result:
        """The result of the step, whose micro-batches have steps of their own where there are several evaluators."""

        def step(evaluator: Evaluator, last: bool) -> Result:
            return self._result(evaluator, perturbed, values, plan, averages=last, held_out=held_out)

        first, *others = self._evaluators
        if not others:
            return step(first, True)
        return each_by_itself(self._evaluators, Gradients(first.trainable, self._parallelism), step)

    def _result(
        self,
        evaluator: Evaluator,
        perturbed: list[nn.Parameter],
        values: StepValues | None,
        plan: Plan,
        *,
        averages: bool,
        held_out: HeldOutMeasurement | None,
    ) -> Result:
        penalty, gradients = self.penalty, Gradients(evaluator.trainable, self._parallelism)
        if plan.exact and penalty is not None and values is not None:
            if perturbed:
                double = DoubleBackward(evaluator, gradients, perturbed, self.scope == "global", averages)
                return double.run(penalty, values.strength, plan)
            plan = PLAIN  # without perturbed parameters an exact penalty does not depend on anything
        step = Step(
            penalty=penalty,
            values=values,
            plan=plan,
            evaluator=evaluator,
            gradients=gradients,
            perturbed=perturbed,
            indices=self._indices,
            perturbation=self._perturbation,
            state=self._state,
            mask=self._mask,
            average_direction=self.scope == "global",
            measure_cosine=self.measure_cosine,
            measure_norm=self.measure_norm,
            check_rounding=_is_full(penalty, values),
            must_reach=self._watch.first,
            radius=self._radius if self._radius is not None and values is not None and self._radius.measures(values) else None,
            model=self.model,
            measure_shares=self.measure_shares,
            averages=averages,
            held_out=held_out,
            layers=self._layers,
        )
        if not self._watch.first or all(p.offset == 0 for p in plan.passes):
            return step.run()
        with self._watch.first_step(self._perturbation):
            return step.run()

    def _record(self, number: int, values: StepValues | None, plan: Plan, result: Result, ascent_share: float, *, held_out: int) -> None:
        nan = float("nan")
        self._evaluations = _whole(self._evaluations + plan.evaluations(ascent_share) + held_out)
        self._step = number + 1
        self._metrics = Metrics(
            {
                "gradient_norm": result.norm,
                "strength": 0.0 if values is None else values.strength,
                "radius": nan if values is None or values.radius is None else values.radius,
                "coefficient": nan if values is None or values.coefficient is None else values.coefficient,
                "cosine": result.cosine,
                "evaluations": self._evaluations,
            },
            {self._names[p]: length for p, length in result.lengths.items()},
        )


def _is_full(penalty: GradientPenalty | None, values: StepValues | None) -> bool:
    """Whether the radius of a step is at least half its largest: the start of a warm-up says nothing about rounding."""
    if penalty is None or values is None or penalty.radius is None:
        return False
    return not isinstance(penalty.radius, Schedule) or penalty.auto_radius is not None or values.radius >= penalty.radius.bounds()[1] / 2


def _whole(count: float) -> int | float:
    """``count`` as an int if it is whole."""
    return int(count) if float(count).is_integer() else count
