"""The gradient oracle for PyTorch: fills ``.grad`` with the gradient of the regularized loss, and leaves everything else as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from gradreg import checks
from gradreg.penalties import GradientPenalty
from gradreg.torch.metrics import Metrics
from gradreg.torch.parallel import Parallelism
from gradreg.torch.perturbation import Perturbation
from gradreg.torch.replay import ForwardBuffers, RandomNumbers
from gradreg.torch.step import Closure, Scaler, Step

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

    Memory: one copy of the perturbed parameters from the first regularized step on, and nothing else. Where c = strength / radius is not 1,
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
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {checks.describe(model)}. Pass the module, not its parameters.")
        if penalty is not None and not isinstance(penalty, GradientPenalty):
            raise TypeError(f"penalty must be a GradientPenalty or None; got {checks.describe(penalty)}. Use gradreg.sam(rho=0.05), say.")
        checks.choice("scope", scope, ("local", "global"))
        parallelism = Parallelism(model)
        named = list(model.named_parameters())
        if not any(p.requires_grad for _, p in named):
            raise ValueError(
                f"model must have at least one parameter with requires_grad=True; got {len(named)} parameters, none trainable. "
                "Unfreeze what is to be trained before building the regularizer."
            )
        selected = [p for name, p in named if parameters is None or parameters(name, p)]
        if not selected:
            raise ValueError(
                f"parameters must select at least one of the model's {len(named)} parameters; got none. "
                f"Their names look like {named[0][0]!r}."
            )
        self.model = model
        self.penalty = penalty
        self.scope: Scope = scope
        self.freeze_batch_statistics = freeze_batch_statistics
        self.replay_rng = replay_rng
        self._parameters = [p for _, p in named]
        self._perturbed = selected
        self._parallelism = parallelism
        self._perturbation = Perturbation()
        self._checked_backward = False
        self._buffers = ForwardBuffers(model)
        self._step = 0
        self._evaluations = 0
        nan = float("nan")
        self._metrics = Metrics({"gradient_norm": nan, "strength": nan, "radius": nan, "coefficient": nan, "evaluations": 0})

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
        """What a checkpoint must hold for the schedules and counts to go on: plain numbers."""
        return {"step": self._step, "evaluations": self._evaluations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict()``'s result.

        Raises:
            ValueError: a missing or unknown key, or a negative count.
        """
        if set(state) != {"step", "evaluations"}:
            raise ValueError(f"state must have the keys step and evaluations; got {sorted(state)}. Pass what state_dict() returned.")
        step = checks.whole("step", state["step"], minimum=0)
        evaluations = checks.whole("evaluations", state["evaluations"], minimum=0)
        self._step, self._evaluations = step, evaluations

    def backward(
        self,
        closure: Closure | Sequence[Closure],
        *,
        ascent: Closure | Sequence[Closure] | None = None,
        backward: Callable[[Tensor], object] | None = None,
        scaler: Scaler | None = None,
    ) -> Tensor:
        """Evaluate the closure as often as the penalty asks, and leave the regularized gradient in ``.grad``.

        Args:
            closure: runs a forward pass and returns the scalar loss; it must not call ``backward``. Or a sequence of such closures
                (micro-batches): their gradients add up, as those of successive ``loss.backward()`` calls do, and one perturbation is made
                from the whole sum. Divide each loss by their number for the gradient of the mean.
            ascent: closure(s) from which the direction comes instead, usually a part of the batch: then ``closure`` is evaluated only at
                the perturbed parameters if c = strength / radius = 1, and last of all at the unperturbed ones if not. Not for "exact" and
                unit mixing.
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
            (With ``ascent`` and c = 1 that is the ascent closures' loss, there being no other.)

        Cost: see ``GradientPenalty``; one evaluation at steps where the strength is 0.

        Raises:
            TypeError, ValueError: a closure that is not callable, returns no scalar or a loss without a gradient, or calls ``backward``.
        """
        closures = _closures("closure", closure)
        ascents = None if ascent is None else _closures("ascent", ascent)
        run = _checked(backward, scaler)
        squared = self.penalty is not None and self.penalty.power == 2
        if run is not None and scaler is None and squared and not self._checked_backward:
            run = _refuse_scaling(run)
        trainable = self.parameters
        if not trainable:
            raise ValueError("model must have at least one parameter with requires_grad=True; got none. Unfreeze some before this step.")

        strength = 0.0 if self.penalty is None else self.penalty.strength_at(self._step)
        step = Step(
            parallelism=self._parallelism,
            closures=closures,
            ascents=ascents,
            backward=run,
            scaler=scaler,
            trainable=trainable,
            perturbed=[p for p in self._perturbed if p.requires_grad],
            perturbation=self._perturbation,
            buffers=self._buffers if self.freeze_batch_statistics else None,
            random_numbers=RandomNumbers(p.device for p in trainable) if self.replay_rng else None,
            average_direction=self.scope == "global",
        )
        with torch.enable_grad():
            if self.penalty is None or strength == 0.0:
                loss, norm = step.plain()
            elif self.penalty.difference == "exact":
                loss, norm = step.exact(self.penalty, strength)
            else:
                coefficient = cast(float, self.penalty.coefficient_at(self._step))
                radius = cast(float, self.penalty.radius_at(self._step))
                loss, norm = step.finite_difference(self.penalty, coefficient, radius)
        self._checked_backward = True
        self._record(strength, norm)
        return loss

    def _record(self, strength: float, norm: Tensor | float) -> None:
        radius = coefficient = None
        if self.penalty is not None:
            self._evaluations += self.penalty.evaluations_at(self._step)
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
                "evaluations": self._evaluations,
            }
        )


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
