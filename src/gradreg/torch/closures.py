"""Evaluating closures: forward and backward passes whose weighted gradients accumulate in ``.grad``, all of the same function.

Every later evaluation of a closure starts from the state and the random numbers that its own first evaluation read, and what that first
evaluation wrote is kept at the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Literal, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gradreg import checks
from gradreg.plan import Plan
from gradreg.torch.buffers import ForwardState, Snapshot
from gradreg.torch.parallel import Parallelism

Closure: TypeAlias = Callable[[], Any]
"""Runs a forward pass and returns the scalar loss, or ``(loss, aux)``, without calling ``backward``."""


_ALONE = nullcontext()


class Scaler(Protocol):
    """What multiplies the loss so that its gradients do not underflow: a ``torch.amp.GradScaler``, or any object with this method."""

    def scale(self, outputs: Tensor) -> Tensor: ...


@dataclass
class _Start:
    """What one closure's first evaluation read."""

    state: Snapshot
    synchronises: list[bool]
    """Whether the next forward pass of each DDP module broadcasts buffers."""


@dataclass
class _Group:
    """The closures of the loss or of the ascent, and what their first evaluations read and wrote."""

    closures: Sequence[Closure]
    starts: list[_Start] = field(default_factory=list)
    end: _Start | None = None


class Evaluator:
    """How one call of ``GradientRegularizer.backward`` evaluates losses and their gradients.

    Args:
        closures: the micro-batches; ``ascent`` those of the direction, or None for ``closures``.
        has_aux: whether closures return ``(loss, aux)``.
        in_sequence: whether they were given as a sequence, whose aux are a list.
        parallelism: averages gradients over ranks.
        trainable: the parameters that require a gradient.
        backward: called with a multiple of the loss in place of ``loss.backward()``, or None for that; it may multiply the loss further.
        scaler: what ``backward`` multiplies the loss with beyond the objective's own factors, or None for nothing.
        state: what the forward passes of the model write and draw.
        keep_state: whether all passes over a closure share what they read and write.
        replay_rng: whether they share the random numbers that they draw.
        share: what closures have multiplied their loss with, of the loss that is penalized: 1 / n for one of n micro-batches that are
            each penalized by itself.
    """

    def __init__(
        self,
        closures: Sequence[Closure],
        ascent: Sequence[Closure] | None,
        *,
        has_aux: bool,
        in_sequence: bool,
        parallelism: Parallelism,
        trainable: list[nn.Parameter],
        backward: Callable[[Tensor], object] | None,
        scaler: Scaler | None,
        state: ForwardState,
        keep_state: bool,
        replay_rng: bool,
        share: float = 1.0,
    ) -> None:
        self.share = share
        self.trainable = trainable
        self.parallelism = parallelism
        self.backward = backward
        self.scaler = scaler
        self.repeats_pass: bool = False
        self.number: int = len(closures)
        self._first_values: tuple[Tensor, Any] | None = None
        self._has_aux = has_aux
        self._in_sequence = in_sequence
        self._groups: Mapping[Literal["loss", "ascent"], _Group] = {
            "loss": _Group(closures),
            "ascent": _Group(() if ascent is None else ascent),
        }
        self._most = max(len(closures), 0 if ascent is None else len(ascent))
        self._state = state
        self._shares = {"state": keep_state, "random": replay_rng}
        self._averages = parallelism.averages
        self._sharing = False

    @contextmanager
    def sharing_state(self, plan: Plan) -> Iterator[None]:
        """A context of several passes that all start from the same state; at its end the first evaluation's writes are restored."""
        self._state.begin(self.trainable, closures=self._most, **self._shares)
        self._sharing = True
        group = self._groups[plan.passes[0].of]
        try:
            try:
                yield
            finally:
                self._end(group)
        except BaseException:
            self._end(group)  # again, because an interrupt may have come during the first time
            raise

    @contextmanager
    def leaving_no_trace(self) -> Iterator[None]:
        """A context of one pass after which state and random numbers are those before it."""
        self._state.begin(self.trainable, closures=self._most, state=True, random=True)
        start = self._here()
        try:
            yield
        finally:
            self._state.settle([start.state], self.trainable)
            self._go_to(start)
            self._state.search_again()

    def _end(self, group: _Group) -> None:
        self._sharing = self.repeats_pass = False
        if group.end is not None:
            self._go_to(group.end)  # without the flag for DDP's next broadcast, which stays as the last pass left it

    def run(self, of: Literal["loss", "ascent"], weight: float | Tensor, *, synchronise: bool, returns_loss: bool = False) -> Tensor | None:
        """Forward and backward through every closure, accumulating ``weight`` times its gradient; see ``first_values``.

        Returns:
            With ``returns_loss`` the summed, detached loss.
        """
        group = self._groups[of]
        first = not group.starts
        wanted = self._first_values is None
        losses: list[Tensor] = []
        auxiliary: list[Any] = []
        for i in range(len(group.closures)):
            synchronised = synchronise and i == len(group.closures) - 1
            with self.parallelism.synchronised(synchronised) if self._averages else _ALONE:
                loss, aux = self._evaluate(group, i)
                if wanted or returns_loss:
                    losses.append(loss.detach().clone())  # CUDA graphs of torch.compile reuse its memory in the next pass
                    auxiliary.append(aux)
                self.backpropagate(loss, weight)
        if first:
            self.finish_first(of)
        if wanted:
            self._first_values = total(losses), self.aux_of(auxiliary)
        return total(losses) if returns_loss else None

    def first_values(self) -> tuple[Tensor, Any]:
        """The summed, detached loss of the first pass, and the closures' aux: one, or a list for a sequence of closures."""
        assert self._first_values is not None  # a pass has been made
        return self._first_values

    def aux_of(self, auxiliary: list[Any]) -> Any:
        """The aux that a step returns: a list for a sequence of closures, even one of length 1."""
        return auxiliary if self._in_sequence else auxiliary[0]

    def finish_first(self, of: Literal["loss", "ascent"]) -> None:
        """Record what the closures of a group wrote, after all of them have been evaluated for the first time."""
        group = self._groups[of]
        if not self._sharing or not group.starts:
            return
        self._state.settle([start.state for start in group.starts], self.trainable)
        group.end = self._here()
        group.end.synchronises = []

    def evaluate(self, i: int) -> tuple[Tensor, Any]:
        """The checked loss and aux of closure ``i`` of the loss."""
        return self._evaluate(self._groups["loss"], i)

    def _evaluate(self, group: _Group, i: int) -> tuple[Tensor, Any]:
        self.repeats_pass = self._sharing and i < len(group.starts)
        fresh = i == 0 and not self._reached()
        if self._sharing:
            if i < len(group.starts):
                self._go_to(group.starts[i])
            else:
                other = self._groups["ascent" if group is self._groups["loss"] else "loss"]
                if i == 0 and other.starts:  # a different function, which starts from the same state as the first one
                    self._go_to(other.starts[0])
                group.starts.append(self._here())
        loss, aux = self._checked(group.closures[i]())
        if fresh and self._reached():
            raise ValueError("closure must only run the forward pass; it called backward() itself. Return the loss and leave that out.")
        if not loss.requires_grad:
            raise ValueError(
                "closure must return a loss that requires grad; got one that does not depend on any trainable parameter. "
                "Compute it from the model's output, without torch.no_grad() or .detach()."
            )
        return loss if loss.dim() == 0 else loss.reshape(()), aux

    def _reached(self) -> bool:
        """Whether ``.grad`` of any parameter holds something."""
        for p in self.trainable:  # noqa: SIM110  # asked several times in a step, where a generator takes longer
            if p.grad is not None:
                return True
        return False

    def _here(self) -> _Start:
        state = self._state.snapshot()
        return _Start(state, self.parallelism.forward_synchronisation() if self._averages and state.slots else [])

    def _go_to(self, start: _Start) -> None:
        self._state.restore(start.state)
        if start.synchronises:
            self.parallelism.set_forward_synchronisation(start.synchronises)

    def _checked(self, returned: Any) -> tuple[Tensor, Any]:
        aux = None
        if self._has_aux:
            if not isinstance(returned, tuple) or len(returned) != 2:
                raise TypeError(
                    f"closure must return (loss, aux) with has_aux=True; got {checks.describe(returned)}. Leave has_aux out, or add aux."
                )
            returned, aux = returned
            aux = tree_map_only(Tensor, Tensor.detach, aux)
        if not isinstance(returned, Tensor):
            hint = "Pass has_aux=True to return (loss, aux)." if isinstance(returned, tuple) else "Return loss, not loss.item()."
            raise TypeError(f"closure must return the loss as a tensor; got {checks.describe(returned)}. {hint}")
        if returned.numel() != 1:
            raise ValueError(
                f"closure must return a scalar loss; got a tensor of shape {tuple(returned.shape)}. Reduce it with .mean() or .sum()."
            )
        return returned, aux

    def backpropagate(self, loss: Tensor, weight: float | Tensor) -> None:
        """Add ``weight`` times the scaled loss's gradient to ``.grad``."""
        try:
            # By a product, not backward(weight): a gradient that is given makes PyTorch import SymPy at the first step, half a second.
            if self.backward is not None:
                self.backward(_times(loss, weight))
                self._refuse_graphs()
            else:
                _times(self.scaled(loss), weight).backward()
        except RuntimeError as error:
            if self.repeats_pass and "second time" in str(error):
                raise RuntimeError(
                    "closure must run the forward pass itself, because it is evaluated again at perturbed parameters; got a loss whose "
                    "graph was made outside of it, or in an earlier evaluation. Write regularizer.backward(lambda: criterion(model(x), y))."
                ) from error
            raise

    def _refuse_graphs(self) -> None:
        """Raise if gradients have a graph, which moving the parameters would break for whoever differentiates them."""
        first = next((p.grad for p in self.trainable if p.grad is not None), None)
        if self._sharing and first is not None and first.requires_grad:
            raise RuntimeError(
                "backward must not make gradients with a graph (create_graph=True) in a step of this penalty, which changes the parameters "
                "that the graph was made with; got one that does, as optimizers that differentiate the gradient need it (AdaHessian, "
                "SophiaH). Use an optimizer that needs none, or gradreg.exact(gamma=...), or penalty=None."
            )

    def scaled(self, value: Tensor) -> Tensor:
        """``value`` times the loss scale."""
        return value if self.scaler is None else self.scaler.scale(value)

    def unscaled(self, value: Tensor) -> Tensor:
        """``value``, which is linear in the gradients, divided by ``scale``."""
        return value if self.scaler is None and self.share == 1.0 else value / self.scale(value)

    def scale(self, like: Tensor) -> float | Tensor:
        """What multiplies the gradients of the loss that is penalized: the loss scale, on the device of ``like``, times ``share``."""
        return self.share if self.scaler is None else self.share * self.scaler.scale(torch.ones((), dtype=like.dtype, device=like.device))


def _times(loss: Tensor, weight: float | Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return loss * weight.to(loss.device, loss.dtype)
    return loss if weight == 1.0 else loss * weight


def total(losses: Sequence[Tensor]) -> Tensor:
    """The sum of ``losses``."""
    return losses[0] if len(losses) == 1 else torch.stack(list(losses)).sum()


def as_closures(name: str, value: object) -> Sequence[Closure]:
    """``value``, a closure or a sequence of them, as a list.

    Raises:
        TypeError: anything else.
    """
    if callable(value):
        return [value]
    if not isinstance(value, Sequence) or not value or not all(callable(c) for c in value):
        raise TypeError(
            f"{name} must be a callable or a non-empty sequence of callables; got {checks.describe(value)}. "
            f"Write regularizer.backward(lambda: criterion(model(x), y))."
        )
    closures = list(cast("Sequence[Closure]", value))
    _warn_of_late_binding(name, closures)
    return closures


def _warn_of_late_binding(name: str, closures: Sequence[Closure]) -> None:
    """Warn of two functions made by the same line that read the same variables: both see the values of the loop's last iteration."""
    seen: dict[Any, Closure] = {}
    for closure in closures:
        if not isinstance(closure, FunctionType) or not (closure.__code__.co_freevars or closure.__code__.co_names):
            continue
        cells = tuple(id(cell) for cell in closure.__closure__ or ())
        arguments = tuple(id(default) for default in (*(closure.__defaults__ or ()), *(closure.__kwdefaults__ or {}).values()))
        other = seen.setdefault((closure.__code__, id(closure.__globals__), cells, arguments), closure)
        if other is not closure:
            warnings.warn(
                f"{name} has two closures made by the same line that read the same variables: in a loop, both see the last turn's values, "
                "and the last micro-batch counts for all. Bind them when each is made: lambda x=x, y=y: criterion(model(x), y).",
                stacklevel=4,
            )
            return
