"""An optimizer for code that requires ``optimizer.step(closure)``: it regularizes or raises, and never trains without the penalty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gradreg import checks
from gradreg.extras import needing
from gradreg.integrations.refusals import refuse_learned

with needing("gradreg.integrations.closure", "torch"):
    import torch
    from torch import Tensor
    from torch.overrides import TorchFunctionMode

    from gradreg.torch import GradientRegularizer

_READS_GRADIENT = torch.Tensor.grad.__get__  # type: ignore[attr-defined]  # a getset descriptor of C


class RegularizedOptimizer(torch.optim.Optimizer):
    """Wraps ``optimizer`` so that ``step(closure)`` uses the gradient of ``loss + penalty``.

    ::

        regularizer = GradientRegularizer(model, gradreg.sam(rho=0.05))
        optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), regularizer)

        def closure():
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)

    The closure is the usual one; ``backward`` in it is optional. It is evaluated as often as the penalty needs. Parameter groups, state
    and hooks are the base optimizer's own, so schedulers and checkpoints work with either.

    Args:
        optimizer: the base optimizer, over parameters of the regularizer's model.
        regularizer: computes the gradient. Its clock and counts are part of this optimizer's ``state_dict()``.

    Raises:
        TypeError: arguments of another kind, or ``torch.optim.LBFGS``.
        ValueError: ``optimizer`` trains parameters outside of the regularizer's model.
    """

    # No super().__init__(): it would make separate groups, state and hooks, and only those of the base optimizer may exist.
    def __init__(self, optimizer: torch.optim.Optimizer, regularizer: GradientRegularizer) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer; got {checks.describe(optimizer)}. "
                "Build it first: torch.optim.SGD(model.parameters(), lr=0.1), say."
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "optimizer must take one gradient a step; got LBFGS, whose line search compares losses, which a penalty on the gradient "
                "leaves as they are. Use SGD or Adam."
            )
        if not isinstance(regularizer, GradientRegularizer):
            raise TypeError(
                f"regularizer must be a GradientRegularizer; got {checks.describe(regularizer)}. Write GradientRegularizer(model, penalty)."
            )
        refuse_learned(regularizer.penalty, "a closure-based loop")
        known = {id(p) for p in regularizer.model.parameters()}
        foreign = sum(id(p) not in known for group in optimizer.param_groups for p in group["params"])
        if foreign:
            raise ValueError(
                f"optimizer must train parameters of the regularizer's model only; got {foreign} others. "
                "Build the regularizer from a module that holds them all."
            )
        self.optimizer = optimizer
        self.regularizer = regularizer

    def __getattr__(self, name: str) -> Any:
        if name in ("optimizer", "regularizer"):
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"RegularizedOptimizer({self.regularizer.penalty}, {self.optimizer!r})"

    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """Evaluate ``closure`` as often as the penalty needs, from cleared gradients, and take the base optimizer's step.

        Args:
            closure: runs a forward pass and calls ``backward`` on the loss or, if it does not, returns the loss. ``zero_grad`` in it has
                no effect. To clip, register a step pre-hook, because the gradient does not exist while the closure runs.

        Returns:
            The first pass's detached loss.

        Raises:
            TypeError: no closure.
            ValueError: a closure that computes gradients other than by ``loss.backward()``, or reads them.
            RuntimeError: a base optimizer that differentiates the gradients.
        """
        if closure is None:
            raise TypeError(
                "step needs a closure, to evaluate the loss a second time at perturbed parameters; got none. Write "
                "optimizer.step(closure). Where that cannot be (under a GradScaler), call regularizer.backward(closure, scaler=scaler) "
                "and step the base optimizer."
            )
        if not callable(closure):
            raise TypeError(
                f"closure must be callable; got {checks.describe(closure)}. Write optimizer.step(lambda: criterion(model(x), y))."
            )
        parameters = [p for p in self.regularizer.model.parameters() if p.requires_grad]
        for p in parameters:
            p.grad = None
        loss = self.regularizer.backward(lambda: _loss_of(closure, parameters))
        try:
            self.optimizer.step()
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise RuntimeError(
                f"optimizer must take gradients without a graph; got {type(self.optimizer).__name__}, which differentiates them, as "
                "AdaHessian and SophiaH do. Use SGD or Adam."
            ) from error
        self.regularizer.decoupled_step(self.optimizer)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The base optimizer's."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, and under ``"regularizer"`` the regularizer's."""
        return {**self.optimizer.state_dict(), "regularizer": self.regularizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from ``state_dict()``'s result.

        Raises:
            ValueError: the state of an optimizer without a regularizer.
        """
        if "regularizer" not in state_dict:
            raise ValueError(
                f"state must hold the key regularizer; got {sorted(state_dict)}. To resume plain training, load it into the base "
                "optimizer: optimizer.optimizer.load_state_dict(state)."
            )
        self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != "regularizer"})
        self.regularizer.load_state_dict(state_dict["regularizer"])


def _loss_of(closure: Callable[[], Any], parameters: Sequence[torch.nn.Parameter]) -> Any:
    """The loss that ``closure`` calls ``backward`` on (the sum, if several), or else what it returns; ``.grad`` is unchanged."""
    gathered = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        with _Captured() as captured:
            returned = closure()
        if any(p.grad is not None for p in parameters):
            raise ValueError(
                "closure must compute its gradients by loss.backward(); got gradients from somewhere else. "
                "Leave them out and return the loss."
            )
    finally:
        for p, gradient in zip(parameters, gathered, strict=True):
            p.grad = gradient
    return sum(captured.losses[1:], captured.losses[0]) if captured.losses else returned


class _Captured(TorchFunctionMode):
    """Records the losses on which ``backward`` is called instead of running it."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:
            self._capture(*args, **kwargs)
            return None
        if self.losses and func == _READS_GRADIENT:
            raise ValueError(
                "closure must not use the gradients, which are there only when all its evaluations are done; got one that reads .grad "
                "after backward(). To clip them, give optimizer.register_step_pre_hook a function that clips and returns None."
            )
        return func(*args, **kwargs)

    def _capture(
        self, loss: Tensor, gradient: Tensor | None = None, retain_graph: bool | None = None, create_graph: bool = False, inputs: Any = None
    ) -> None:
        if inputs is not None or create_graph:
            raise ValueError(
                "closure must call backward() for all parameters and to first order; got inputs= or create_graph=True. "
                "Freeze parameters by requires_grad_(False); for double backward use gradreg.exact(gamma=...). Optimizers that need "
                "create_graph (AdaHessian, SophiaH) cannot be wrapped."
            )
        self.losses.append(loss if gradient is None else (loss * gradient).sum())
