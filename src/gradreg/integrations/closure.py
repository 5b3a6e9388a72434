"""For loops that insist on ``optimizer.step(closure)``: any optimizer, made to step along the regularized gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradreg import checks
from gradreg.torch import GradientRegularizer


def regularize_closures(optimizer: torch.optim.Optimizer, regularizer: GradientRegularizer) -> RemovableHandle:
    """Make ``optimizer.step(closure)`` use the regularized gradient, with the closure that PyTorch documents for LBFGS.

    ::

        regularize_closures(optimizer, GradientRegularizer(model, gradreg.fgr(gamma=0.5, epsilon=0.5)))

        def closure():
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)

    The optimizer stays the object it was: schedulers, checkpoints and ``param_groups`` know nothing of it. Where the loop is your own,
    prefer ``regularizer.backward``, which holds one gradient less and averages once under data parallelism.

    Args:
        optimizer: any ``torch.optim.Optimizer``, also one that calls its closure several times.
        regularizer: for the same parameters; not with an exact penalty, whose double backward a closure cannot give.

    Returns:
        A handle whose ``remove()`` makes the optimizer a plain one again.

    Raises:
        TypeError, ValueError: no optimizer, or an exact penalty.
        RuntimeError: later, from ``optimizer.step()`` without a closure, which would train without the penalty.

    Memory: one gradient beyond what ``regularizer.backward`` holds.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {checks.describe(optimizer)}. Pass the one that steps.")
    if regularizer.penalty is not None and regularizer.penalty.difference == "exact":
        raise ValueError(
            f"penalty must be a finite difference, for a closure that calls backward() cannot be derived twice; got {regularizer.penalty}. "
            "Use gradreg.fgr(gamma=..., epsilon=...)."
        )
    if hasattr(regularizer.model, "no_sync"):
        raise ValueError(
            "model must not be a DistributedDataParallel one, whose averaging would run twice; got one that is. Use regularizer.backward()."
        )
    return optimizer.register_step_pre_hook(lambda _, args, kwargs: _with_regularized_closure(regularizer, args, kwargs))


def _with_regularized_closure(regularizer: GradientRegularizer, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    arguments = args[1:] if args and isinstance(args[0], torch.optim.Optimizer) else args
    closure: Callable[[], Tensor] | None = kwargs.get("closure", arguments[0] if arguments else None)
    if closure is None:
        raise RuntimeError(
            "optimizer.step() needs a closure here, for the gradient is evaluated more than once; got none. "
            "Write optimizer.step(closure), or call regularizer.backward(...) and remove the handle of regularize_closures."
        )
    parameters = list(regularizer.model.parameters())

    def forward() -> Tensor:
        accumulated = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        with torch.enable_grad():
            loss = closure()
        gradients = [p.grad for p in parameters]
        for p, gradient in zip(parameters, accumulated, strict=True):
            p.grad = gradient
        return _WithGradients.apply(torch.as_tensor(loss).detach(), gradients, *parameters)  # type: ignore[no-any-return]

    def regularized() -> Tensor:
        for p in parameters:  # zero_grad() of the closure would have dropped them
            p.grad = None
        return regularizer.backward(forward)

    rest = args[: len(args) - len(arguments)]
    return (*rest, *arguments[1:]), {**kwargs, "closure": regularized}


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known: what ``backward`` gives for ``parameters`` is a multiple of ``gradients``."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *received: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, *(None if g is None else received[0] * g for g in ctx.gradients)
