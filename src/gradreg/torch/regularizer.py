"""The gradient oracle for PyTorch: fills ``.grad`` with the gradient of the regularized loss, and leaves everything else as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from gradreg import checks
from gradreg.masks import OnlyNorms, Sparse
from gradreg.mixing import Decoupled, GradientMixing, Reuse
from gradreg.penalties import GradientPenalty
from gradreg.torch import directions, masks, mixing
from gradreg.torch.decoupled import Correction
from gradreg.torch.evaluation import Closure, Evaluation, Scaler
from gradreg.torch.exact import DoubleBackward
from gradreg.torch.gradients import Grads
from gradreg.torch.masks import SparseMask, in_norm_layers
from gradreg.torch.memory import Memory
from gradreg.torch.metrics import Metrics
from gradreg.torch.parallel import Parallelism
from gradreg.torch.perturbation import Perturbation
from gradreg.torch.replay import ForwardBuffers, RandomNumbers
from gradreg.torch.step import Step

Scope = Literal["local", "global"]


class GradientRegularizer:
    """Gives a training loop the gradient of ``loss + penalty`` in place of the plain one.

    ::

        regularizer = GradientRegularizer(model, gradreg.fgr(gamma=0.5, epsilon=0.5))
        for x, y in loader:
            optimizer.zero_grad()
            loss = regularizer.backward(lambda: criterion(model(x), y))
            optimizer.step()

    It is no optimizer: any optimizer, schedule, clipping and checkpoint works as before. Build it, like an optimizer, when the model's
    parameters are final (moved, wrapped, adapters added).

    Args:
        model: the module whose parameters are perturbed and whose buffers are kept. A loss with parameters of its own must be
            part of it: those outside would gather the plain gradients of all passes.
        penalty: what is penalised; None trains without a penalty, through the same calls.
        parameters: ``(name, parameter) -> bool``: which parameters are perturbed and counted in the norm; all by default. The others stay
            where they are in the second pass, and their two gradients are combined by the same rule. Parameters that do not require a
            gradient are never touched or counted, whenever that changes.
        scope: under ``DistributedDataParallel``, "local" perturbs each rank by its own gradient (one all-reduce a step; the m-sharpness of
            the SAM paper), "global" perturbs all by the averaged gradient (two all-reduces). Without it they are the same.
        freeze_batch_statistics: buffers that a forward pass changes (running statistics of normalization layers, of any type) are changed
            by the first pass only.
        replay_rng: every pass over a closure draws the same random numbers (dropout masks) from the default generators of the CPU and of
            the parameters' devices. A ``torch.Generator`` of the closure's own is not replayed.
        measure_cosine: put the cosine between the two gradients into ``metrics``; costs two more copies of the gradients during a step. Not
            under ``DistributedDataParallel``, where the second gradient is seen only after it was averaged with the first.
        measure_norm: put the norm of the gradient into ``metrics`` also at steps that do nothing else with it, those of one plain pass;
            with False it is NaN there, and a read of all gradients is saved (about 1 % of a step of a small multi-layer perceptron). May
            be changed from step to step, to measure where something is logged.

    Memory: one copy of the perturbed parameters from the first regularized step on, what the penalty remembers (see its constructor), and
    nothing else. Where c = strength / radius is not 1,
    the first gradient is part of the result and stays in ``.grad`` through the second pass, as it does in gradient accumulation.

    Raises:
        TypeError, ValueError: a model without trainable parameters, a predicate that selects none, or a value of the wrong kind.
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
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {checks.describe(model)}. Pass the module, not its parameters.")
        if penalty is not None and not isinstance(penalty, GradientPenalty):
            raise TypeError(f"penalty must be a GradientPenalty or None; got {checks.describe(penalty)}. Use gradreg.sam(rho=0.05), say.")
        checks.choice("scope", scope, ("local", "global"))
        parallelism = Parallelism(model)
        if measure_cosine and isinstance(model, nn.parallel.DistributedDataParallel):
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
        selected = {p: name for name, p in named if parameters is None or parameters(name, p)}
        if not selected:
            raise ValueError(
                f"parameters must select at least one of the model's {len(named)} parameters; got none. "
                f"Their names look like {named[0][0]!r}."
            )
        if penalty is not None and isinstance(penalty.mask, OnlyNorms):
            norms = in_norm_layers(model)
            selected = {p: name for p, name in selected.items() if p in norms}
            if not selected:
                raise ValueError(
                    "mask OnlyNorms must find parameters of normalization layers (modules whose class name contains 'Norm') among those "
                    "selected; got none. Leave the mask out, or select parameters by name: parameters=lambda name, p: 'norm' in name."
                )
        self.model = model
        self.penalty = penalty
        self.scope: Scope = scope
        self.freeze_batch_statistics = freeze_batch_statistics
        self.replay_rng = replay_rng
        self.measure_cosine = measure_cosine
        self.measure_norm = measure_norm
        self._parameters = [p for _, p in named]
        self._places = {p: place for place, p in enumerate(self._parameters)}
        self._perturbed = list(selected)
        self._memory = Memory({p: name for name, p in named}, _remembered_kinds(penalty))
        mask = None if penalty is None else penalty.mask
        self._mask = SparseMask(mask, self._memory, self._places) if isinstance(mask, Sparse) else None
        self._correction = Correction()
        self._parallelism = parallelism
        self._perturbation = Perturbation()
        self._checked_backward = False
        self._buffers = ForwardBuffers(model)
        self._step = 0
        self._evaluations: int | float = 0
        nan = float("nan")
        self._metrics = Metrics({"gradient_norm": nan, "strength": nan, "radius": nan, "coefficient": nan, "cosine": nan, "evaluations": 0})

    @property
    def step(self) -> int:
        """Regularized steps done, the clock of the penalty's schedules and warm-ups."""
        return self._step

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The model's parameters whose ``.grad`` a step fills: all that require a gradient."""
        return [p for p in self._parameters if p.requires_grad]

    @property
    def metrics(self) -> Metrics:
        """What the last step did (see ``Metrics``); a value on a device is waited for only when it is read."""
        return self._metrics

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on: plain numbers and, of a penalty that remembers, ``memory``: tensors by parameter name.

        Raises:
            RuntimeError: between ``backward`` and ``decoupled_step``, where half a step is pending.
        """
        self._correction.check_applied("state_dict()")
        state: dict[str, Any] = {"step": self._step, "evaluations": self._evaluations}
        if self.penalty is not None and self.penalty.has_memory:
            state["memory"] = self._memory.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict()``'s result; a step whose ``decoupled_step`` is pending is given up.

        Raises:
            ValueError: a missing or unknown key, a negative count, or a memory that does not fit the model.
        """
        remembers = self.penalty is not None and self.penalty.has_memory
        keys = ["step", "evaluations", *(["memory"] if remembers else [])]
        if set(state) != set(keys):
            named = " and ".join(keys)
            raise ValueError(f"state must have the keys {named}; got {sorted(state)}. Pass what state_dict() returned.")
        step = checks.whole("step", state["step"], minimum=0)
        evaluations = checks.non_negative("evaluations", state["evaluations"])
        if remembers:
            self._memory.load_state_dict(state["memory"])
        self._step, self._evaluations = step, _whole(evaluations)
        self._correction = Correction()

    def decoupled_step(self, optimizer: torch.optim.Optimizer) -> None:
        """After ``optimizer.step()``: subtract ``lr·(P − g)`` from the parameters, the part that ``Decoupled`` keeps out of the optimizer.

        ``lr`` is the present learning rate of each parameter's group. Nothing happens for other penalties, and after a step that a gradient
        scaler skips, so a training loop may always call it.

        Args:
            optimizer: the optimizer of the model's parameters.

        Raises:
            ValueError: the optimizer does not hold a parameter that is to be changed.
        """
        self._correction.apply(optimizer)

    def backward(
        self,
        closure: Closure | Sequence[Closure],
        *,
        ascent: Closure | Sequence[Closure] | None = None,
        ascent_share: float = 1.0,
        backward: Callable[[Tensor], object] | None = None,
        scaler: Scaler | None = None,
    ) -> Tensor:
        """Evaluate the closure as often as the penalty asks, and leave the regularized gradient in ``.grad``.

        Args:
            closure: runs a forward pass and returns the scalar loss; it must not call ``backward``. Or a sequence of such closures
                (micro-batches): their gradients add up, as those of successive ``loss.backward()`` calls do, and one perturbation is made
                from the whole sum. For the gradient of the mean, multiply each loss by its share of the samples.
            ascent: closure(s) from which the direction comes instead, usually a part of the batch: then ``closure`` is evaluated only at
                the perturbed parameters if c = strength / radius = 1, and last of all at the unperturbed ones if not. Not for "exact",
                for a mixing other than "plain", and for a direction that needs no gradient.
            ascent_share: which part of the batch ``ascent`` evaluates, in (0, 1]: what it adds to ``metrics.evaluations``.
            backward: replaces ``loss.backward()``, for instance ``accelerator.backward``. It is called with a multiple of the loss and
                must be linear in it. What it multiplies the loss with belongs to the objective, except for the scale of ``scaler``: the
                division by ``gradient_accumulation_steps`` makes a sequence of closures the mean of its micro-batches.
            scaler: the ``torch.amp.GradScaler`` in use (``accelerator.scaler``). Without ``backward`` it scales the losses here; with it,
                ``backward`` must do so. The direction is formed from unscaled values, ``.grad`` stays scaled for ``scaler.unscale_`` and
                ``scaler.step``. A first pass that overflows is followed by passes at the unperturbed parameters whose gradients are
                NaN, so that the scaler skips the step; to see that, the norm is waited for.

        A gradient already in ``.grad`` is kept and added to, and never enters the norm; with ``.grad is None`` that costs nothing.
        After it returns or raises, the parameters hold bit for bit what they held before; if a finite difference raises, so does ``.grad``.

        Returns:
            The detached loss of the first pass at the unperturbed parameters, summed over the closures: what plain training would log.
            (With ``ascent`` and c = 1 that is the ascent closures' loss, there being no other; for a direction that needs no gradient and
            c = 1 it is the loss at the perturbed parameters.)

        Cost: see ``GradientPenalty.evaluations_at``; one evaluation at steps where the strength is 0.

        Raises:
            TypeError, ValueError: a closure that is not callable, returns no scalar or a loss without a gradient, or calls ``backward``.
            RuntimeError: the last step's ``decoupled_step`` is missing.
        """
        closures = _closures("closure", closure)
        ascents = None if ascent is None else _closures("ascent", ascent)
        share = checks.probability("ascent_share", ascent_share)
        if ascents is None and share != 1.0:
            raise ValueError(f"ascent_share must be left out without ascent; got {share:g}. Pass ascent=... too.")
        run = _checked(backward, scaler)
        penalty, number = self.penalty, self._step
        if run is not None and scaler is None and penalty is not None and not self._checked_backward and not _is_scale_free(penalty):
            run = _refuse_scaling(run)
        trainable = self.parameters
        if not trainable:
            raise ValueError("model must have at least one parameter with requires_grad=True; got none. Unfreeze some before this step.")
        self._correction.check_applied("the next backward()")
        strength = 0.0 if penalty is None else penalty.strength_at(number)
        if penalty is not None and ascents is not None:
            penalty.check_ascent("closures")
        self._check_averaging(strength)

        parallelism, perturbed = self._parallelism, [p for p in self._perturbed if p.requires_grad]
        buffers = self._buffers if self.freeze_batch_statistics else None
        several = penalty is not None and strength != 0.0
        random_numbers = RandomNumbers(p.device for p in trainable) if several and self.replay_rng else None
        evaluation = Evaluation(parallelism, trainable, run, scaler, random_numbers)
        step = Step(
            number=number,
            evaluation=evaluation,
            grads=Grads(trainable, parallelism),
            closures=closures,
            ascents=ascents,
            perturbed=perturbed,
            places=self._places,
            perturbation=self._perturbation,
            buffers=buffers,
            memory=self._memory,
            mask=self._mask,
            average_direction=self.scope == "global",
            measure_cosine=self.measure_cosine,
            measure_norm=self.measure_norm,
        )
        self._memory.forget_proposals()
        with torch.enable_grad():
            if penalty is None or strength == 0.0 or (penalty.difference == "exact" and not perturbed):
                loss, norm = step.plain(penalty)  # without perturbed parameters an exact penalty does not depend on anything
            elif isinstance(penalty.mixing, Reuse) and penalty.reuses_at(number):
                loss, norm = step.reusing(penalty, penalty.mixing)
            elif penalty.difference == "exact":
                loss, norm = DoubleBackward(evaluation, closures, perturbed, buffers, self.scope == "global").run(penalty, strength)
            else:
                coefficient, radius = cast(float, penalty.coefficient_at(number)), cast(float, penalty.radius_at(number))
                loss, norm = step.finite_difference(penalty, coefficient, radius)
        self._checked_backward = True
        self._memory.commit(finite_only=scaler is not None)
        self._correction.keep(step.correction, finite_only=scaler is not None)
        self._record(strength, norm, step.cosine, None if ascents is None else share)
        return loss

    def _check_averaging(self, strength: float) -> None:
        """Fail where the step needs gradients averaged over the ranks and the caller has switched that off."""
        penalty, remedy = self.penalty, "build the regularizer with scope='local'"
        if strength != 0.0 and self.scope == "global":
            self._parallelism.check_averaging("scope must be 'local'", "'global'", remedy)
        if penalty is not None and (penalty.has_memory or isinstance(penalty.mixing, GradientMixing)):
            rule = "penalty must neither remember gradients nor mix them otherwise than by a sum"
            self._parallelism.check_averaging(rule, str(penalty), "use another penalty")

    def _record(self, strength: float, norm: Tensor | float, cosine: Tensor | float, ascent_share: float | None) -> None:
        radius = coefficient = None
        if self.penalty is not None:
            share = {} if ascent_share is None else {"ascent_share": ascent_share}
            self._evaluations = _whole(self._evaluations + self.penalty.evaluations_at(self._step, **share))
            radius, coefficient = self.penalty.radius_at(self._step), self.penalty.coefficient_at(self._step)
        else:
            self._evaluations += 1
        nan = float("nan")
        self._step += 1
        self._metrics = Metrics(
            {
                "gradient_norm": norm,
                "strength": strength,
                "radius": nan if radius is None else radius,
                "coefficient": nan if coefficient is None else coefficient,
                "cosine": cosine,
                "evaluations": self._evaluations,
            }
        )


def _remembered_kinds(penalty: GradientPenalty | None) -> dict[str, torch.dtype | None]:
    """What ``penalty`` remembers of each parameter, and in which dtype if not one of the memory's choice."""
    kinds: dict[str, torch.dtype | None] = {}
    if penalty is not None and penalty.direction.has_memory:
        kinds[directions.KIND] = None
    if penalty is not None and isinstance(penalty.mixing, Reuse):
        kinds[mixing.KIND] = None
    if penalty is not None and penalty.mask is not None and penalty.mask.has_memory:
        kinds[masks.KIND] = torch.bool
    return kinds


def _is_scale_free(penalty: GradientPenalty) -> bool:
    """Whether an unannounced factor on all gradients of a step only multiplies its result."""
    return penalty.power == 1 and not penalty.has_memory and not isinstance(penalty.mixing, Decoupled)


def _whole(count: float) -> int | float:
    """``count`` as an int if it is whole."""
    return int(count) if float(count).is_integer() else count


def _checked(backward: Callable[[Tensor], object] | None, scaler: Scaler | None) -> Callable[[Tensor], object] | None:
    if backward is not None and not callable(backward):
        raise TypeError(f"backward must be callable; got {checks.describe(backward)}. Pass accelerator.backward, say.")
    if scaler is not None and not callable(getattr(scaler, "scale", None)):
        raise TypeError(f"scaler must have a method scale(tensor); got {checks.describe(scaler)}. Pass the torch.amp.GradScaler in use.")
    return backward


def _refuse_scaling(backward: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
    """``backward``, failing if it multiplies the loss by more than 1: a loss scale that would go into the perturbation unseen."""

    def checked(loss: Tensor) -> None:
        received: list[Tensor] = []
        handle = loss.register_hook(received.append)
        backward(loss)
        handle.remove()
        if received and abs(float(received[0])) > 1.0:
            raise ValueError(
                f"backward must not scale the loss unless scaler is given; got one that multiplies it by {float(received[0]):g}, and a "
                "penalty on the squared norm would be off by that factor. Pass scaler=accelerator.scaler (or the GradScaler in use); "
                "a factor of the objective belongs in the closure."
            )

    return checked


def _closures(name: str, value: object) -> Sequence[Closure]:
    if callable(value):
        return [cast(Closure, value)]
    if not isinstance(value, Sequence) or not value or not all(callable(c) for c in value):
        raise TypeError(
            f"{name} must be a callable or a non-empty sequence of callables; got {checks.describe(value)}. "
            f"Write regularizer.backward(lambda: criterion(model(x), y))."
        )
    return cast("list[Closure]", list(value))
