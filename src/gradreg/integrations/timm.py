"""timm's ``train.py`` with the gradient of ``loss + penalty``: a scaler in the place of its ``NativeScaler``, and four more lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any

from gradreg import checks
from gradreg.extras import needing
from gradreg.integrations.refusals import refuse_learned
from gradreg.penalties import GradientPenalty

with needing("gradreg.integrations.timm", "timm"):
    import torch
    from timm.utils import NativeScaler, unwrap_model
    from timm.utils.clip_grad import dispatch_clip_grad
    from torch import Tensor, nn

    from gradreg.torch import GradientRegularizer
    from gradreg.torch.calls import Scope

Selection = Callable[[str, nn.Parameter], bool]
Forward = Callable[[], tuple[Tensor, Any]]


class RegularizedScaler:
    """Takes the place of ``NativeScaler`` in timm's ``train.py``: the same call, with the regularized gradient.

    ::

        loss_scaler = RegularizedScaler(gradreg.sam(rho=0.05), loss_scaler)  # after train.py has chosen one, or None

        @loss_scaler.deferred(task)  # in train_one_epoch, above the function that it has already
        def _forward(): ...

    ``examples/patches/timm-train.patch`` has these lines. ``train.py`` goes on as before: ``loss, result = _forward()``, then
    ``loss_scaler(loss, optimizer, ...)``. But ``_forward()`` now returns a stand-in for the loss, and ``None``; the call of the scaler
    evaluates the function as often as the penalty needs, and writes the first pass's loss into the stand-in, which ``train.py`` logs.

    With ``--grad-accum-steps`` one perturbation is made from the whole accumulated gradient: micro-batches are deferred until the last one,
    whose stand-in gets the loss of all; the others get 0. So the mean that ``train.py`` logs in brackets is that of plain training, and the
    number before it, of the last micro-batch, so many times too large.

    Clipping (all of ``--clip-mode``) is of the result, once. The penalty's clock counts updates. Checkpoints hold the loss scale, the
    clock and the penalty's state, under the key ``regularized_scaler``, and ``--resume`` reads them.

    Args:
        penalty: what is penalized; None trains without a penalty, through the same calls.
        scaler: ``train.py``'s own: a ``NativeScaler``, or None without float16.
        parameters: ``(name, parameter) -> bool`` with the model's own names: see ``parameters`` of ``GradientRegularizer``.
        scope: "local" or "global", under data parallelism: see ``GradientRegularizer``.

    Raises:
        TypeError: another kind of scaler; Apex has its own backward pass.
    """

    state_dict_key = "regularized_scaler"
    """Where timm's checkpoints have the state."""

    def __init__(
        self,
        penalty: GradientPenalty | None,
        scaler: NativeScaler | None = None,
        *,
        parameters: Selection | None = None,
        scope: Scope = "local",
    ) -> None:
        GradientRegularizer(_Number(), penalty, scope=scope)  # so that a bad value raises here
        refuse_learned(penalty, "timm")
        if scaler is not None and not isinstance(scaler, NativeScaler):  # type: ignore[unnecessary-isinstance]  # ApexScaler is none
            raise TypeError(f"scaler must be a timm.utils.NativeScaler or None; got {checks.describe(scaler)}. Use --amp without Apex.")
        self.penalty = penalty
        self.parameters = parameters
        self.scope: Scope = scope
        self.regularizer: GradientRegularizer | None = None
        self._scaler: torch.amp.GradScaler | None = None if scaler is None else scaler._scaler
        self._saved: dict[str, Any] | None = None
        self._newest: _MicroBatch | None = None
        self._waiting: list[_MicroBatch] = []
        self._checked = False

    def deferred(self, model: nn.Module) -> Callable[[Forward], Forward]:
        """A decorator of the function that runs the forward pass of a batch and returns ``(loss, anything)``.

        Args:
            model: holds all that is trained: timm's ``task``, or the model itself.
        """
        if self.regularizer is None:
            self._build(model)
        device = next(p.device for p in model.parameters())

        def decorate(forward: Forward) -> Forward:
            bound = _bound(forward)

            def stand_in() -> tuple[Tensor, Any]:
                self._newest = _MicroBatch(bound, torch.ones((), device=device, requires_grad=True))
                return self._newest.stand_in, None

            return stand_in

        return decorate

    def __call__(
        self,
        loss: Tensor,
        optimizer: torch.optim.Optimizer,
        clip_grad: float | None = None,
        clip_mode: str = "norm",
        parameters: Iterable[Tensor] | None = None,
        create_graph: bool = False,
        need_update: bool = True,
    ) -> None:
        """What ``NativeScaler`` does with ``loss``, and with the penalty: backward pass, clipping, step, update of the loss scale.

        Args:
            loss: what the deferred function returned, or a multiple of it.
            optimizer: steps if ``need_update``.
            clip_grad: the largest norm or value, or None.
            clip_mode: "norm", "value" or "agc".
            parameters: those that are clipped.
            create_graph: must be False: such optimizers (AdaHessian) differentiate the gradient.
            need_update: whether this micro-batch ends an accumulation.

        Raises:
            ValueError: a loss from elsewhere, ``create_graph``, or ``clip_grad`` without ``parameters``.
        """
        newest, self._newest = self._newest, None
        if newest is None or self.regularizer is None:
            raise ValueError(
                "loss must come from the function under @loss_scaler.deferred(task), which the penalty evaluates again; got another. Put "
                "that line above def _forward() in train_one_epoch."
            )
        if create_graph:
            raise ValueError(
                "create_graph must be False, because the penalty changes the parameters that the graph was made with; got True. Use an "
                "optimizer that needs no second-order graph."
            )
        if clip_grad is not None and parameters is None:
            raise ValueError("parameters must be given with clip_grad; got None. Pass those to clip.")
        newest.factor = self._factor(loss, newest.stand_in)
        self._waiting.append(newest)
        if not need_update:
            newest.fill(0.0)
            return
        waiting, self._waiting = self._waiting, []
        _, losses = self.regularizer.backward(waiting, has_aux=True, scaler=self._scaler)
        newest.fill(sum(losses))
        if clip_grad is not None:
            if self._scaler is not None:
                self._scaler.unscale_(optimizer)
            dispatch_clip_grad(parameters, clip_grad, mode=clip_mode)  # type: ignore[arg-type]
        if self._scaler is None:
            optimizer.step()
        else:
            self._scaler.step(optimizer)
            self._scaler.update()
        self.regularizer.decoupled_step(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The loss scale, and what the regularizer needs to resume."""
        state = self._saved if self.regularizer is None else self.regularizer.state_dict()
        return {"scaler": None if self._scaler is None else self._scaler.state_dict(), "regularizer": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume; the regularizer, which is built in the first step, gets its part then."""
        if self._scaler is not None and state_dict["scaler"] is not None:
            self._scaler.load_state_dict(state_dict["scaler"])
        self._saved, self.regularizer = state_dict["regularizer"], None

    def _build(self, model: nn.Module) -> None:
        """Build the regularizer, when the model is compiled and wrapped."""
        inner: Any = model.get_trainable_module() if hasattr(model, "get_trainable_module") else model  # type: ignore[operator]
        names = {id(p): name for name, p in unwrap_model(inner).named_parameters()}
        choose = self.parameters
        parameters = None if choose is None else lambda name, p: choose(names.get(id(p), name), p)
        self.regularizer = GradientRegularizer(model, self.penalty, parameters=parameters, scope=self.scope)
        if self._saved is not None:
            self.regularizer.load_state_dict(self._saved)

    def _factor(self, loss: Tensor, stand_in: Tensor) -> Tensor:
        """By what the stand-in, whose value is 1, was multiplied. That nothing else was done is checked once, because it reads a device."""
        if loss is stand_in:
            return loss.detach().clone()
        if not self._checked:
            self._checked = True
            gradient = torch.autograd.grad(loss, stand_in, retain_graph=True, allow_unused=True)[0] if loss.requires_grad else None
            if gradient is None or not torch.isclose(gradient, loss.detach(), rtol=1e-4):
                raise ValueError(
                    "loss must be a multiple of what the deferred function returned, which is a stand-in; got something else. Compute all "
                    "of the loss in _forward()."
                )
        return loss.detach().clone()


@dataclass
class _MicroBatch:
    """A deferred micro-batch; called, it is the closure ``(loss times factor, loss)``."""

    forward: Forward
    stand_in: Tensor
    factor: Tensor | float = 1.0

    def __call__(self) -> tuple[Tensor, Tensor]:
        loss = self.forward()[0]
        return loss * self.factor, loss

    def fill(self, value: Tensor | float) -> None:
        """Write the value that is logged for it."""
        with torch.no_grad():
            self.stand_in.copy_(torch.as_tensor(value))


def _bound(forward: Forward) -> Forward:
    """``forward`` with the values that its variables have now: those of a loop, input and target, are others when it is evaluated."""
    if not isinstance(forward, FunctionType) or forward.__closure__ is None:
        return forward
    cells = tuple(CellType(cell.cell_contents) for cell in forward.__closure__)
    return FunctionType(forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, cells)


class _Number(nn.Module):
    """A model of one parameter, whose making draws no random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(()))
