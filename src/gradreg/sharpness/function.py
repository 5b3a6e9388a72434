"""The loss as a function of the parameters: evaluated at any point of a measurement, and the model left bit for bit as it was.

Every evaluation of a closure starts from the buffers, frozen parameters, module attributes and random numbers that its first one read, as
in ``gradreg.torch``, whose perturbation and state are used here. In addition nothing that a measurement does remains: what forward passes
wrote, random numbers they drew, ``.grad`` and the mode are restored at its end, whatever is raised.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from gradreg import checks
from gradreg.sharpness.results import Passes
from gradreg.sharpness.space import Space, Vector
from gradreg.torch.buffers import ForwardState, Snapshot
from gradreg.torch.closures import Closure, as_closures
from gradreg.torch.gradients import Gradients
from gradreg.torch.masks import check_memory
from gradreg.torch.norms import dtensor_class, local_shards
from gradreg.torch.parallel import Parallelism
from gradreg.torch.perturbation import Perturbation

Mode: TypeAlias = Literal["train", "eval"]
Work: TypeAlias = Callable[[int, Tensor, Any], None]
"""Called with the number of a closure, its loss and what it returned beside it."""

_HOOKS = "_post_accumulate_grad_hooks"


@dataclass(frozen=True)
class Point:
    """What was found at the parameters as they are.

    Args:
        loss: the loss.
        gradient: its gradient.
        norm: the gradient's L2 norm.
        reached: the parameters that the backward pass reached.
    """

    loss: float
    gradient: Vector
    norm: float
    reached: frozenset[nn.Parameter]


class LossFunction:
    """The weighted sum of closures as a function of the selected parameters of ``model``.

    Args:
        model: the module whose parameters the loss depends on.
        closure: runs a forward pass and returns the scalar loss, or a tuple of it and the outputs it is computed from; or a sequence of
            such closures, evaluated one after the other (streamed batches).
        parameters: ``(name, parameter) -> bool``: the coordinates; all trainable parameters by default.
        sizes: the number of samples of each closure, whose losses are averaged with these weights; None adds them up.
        mode: "train" or "eval" for the time of a measurement; None measures the model in the mode it is in.
    """

    def __init__(
        self,
        model: nn.Module,
        closure: Closure | Sequence[Closure],
        *,
        parameters: Callable[[str, nn.Parameter], bool] | None = None,
        sizes: Sequence[int] | None = None,
        mode: Mode | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {checks.describe(model)}. Pass the module, not its parameters.")
        self.closures: Sequence[Closure] = [closure] if callable(closure) else as_closures("closure", closure)
        self.weights: list[float] = _weights(sizes, len(self.closures))
        if mode is not None:
            checks.choice("mode", mode, ("train", "eval"))
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("model must have at least one parameter with requires_grad=True; got none. Unfreeze what is to be measured.")
        selected = {name: p for name, p in named if parameters is None or parameters(name, p)}
        if not selected:
            raise ValueError(
                f"parameters must select at least one of the model's {len(named)} trainable parameters; got none. "
                f"Their names look like {named[0][0]!r}."
            )
        for name, p in selected.items():
            if p.is_complex():
                raise TypeError(
                    f"sharpness is measured along real coordinates; got the complex parameter {name!r}. Leave it out: "
                    "parameters=lambda name, p: not p.is_complex()."
                )
        check_memory({p: name for name, p in selected.items()})
        self.model = model
        self.parallelism: Parallelism = Parallelism(model)
        self.parallelism.check_local("a measurement of sharpness")
        self.space: Space = Space(selected)
        self.passes: Passes = Passes()
        self.notes: list[str] = []
        self._warnings: list[str] = []
        self._mode = mode
        self._trainable = [p for _, p in named]
        self._gradients = Gradients(self._trainable, self.parallelism)
        self._perturbation = Perturbation(self.parallelism.drop_copies)
        self._state = ForwardState(model)
        self._start: Snapshot | None = None
        self._flags: list[bool] = []
        self._random: list[list[Any] | None] = []
        self._settled = False
        self._point: Point | None = None

    @property
    def is_open(self) -> bool:
        """Whether a measurement is under way."""
        return self._start is not None

    @property
    def point(self) -> Point:
        """Loss and gradient at the parameters as they are: the first evaluation of a measurement.

        Raises:
            ValueError: a loss or gradient that is not finite, or that depends on none of the parameters.
        """
        if self._point is None:
            self._point = self._first()
        return self._point

    @property
    def mode(self) -> str:
        """The mode of a measurement: "train", "eval", or "mixed" where modules differ."""
        if self._mode is not None:
            return self._mode
        found = {m.training for m in self.model.modules()}
        return "mixed" if len(found) == 2 else "train" if found == {True} else "eval"

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """A context of evaluations, at whose end the model is as it was."""
        if self.is_open:
            yield
            return
        modes = [(m, m.training) for m in self.model.modules()]
        gradients = [p.grad for p in self._trainable]
        hooks = [(held, dict(held)) for p in self._trainable if (held := getattr(p, _HOOKS, None))]
        flags = self.parallelism.forward_synchronisation()

        def leave() -> None:
            self._perturbation.restore()
            self._restore_state()
            for held, functions in hooks:
                held.update(functions)
            self._gradients.restore(gradients)
            self.parallelism.set_forward_synchronisation(flags)
            for m, training in modes:
                m.training = training
            self._start = None

        try:
            try:
                for held, _ in hooks:  # an optimizer that steps inside the backward pass must not do so now
                    held.clear()
                self._gradients.clear()
                if self._mode is not None:
                    for m, _ in modes:  # not by model.train(), which some models override to merge weights
                        m.training = self._mode == "train"
                self._state.begin(self._trainable, closures=1, state=True, random=True)
                self._settled, self._flags = False, flags
                self._start = self._state.snapshot()
                self._say_mode()
                yield
            finally:
                leave()
        except BaseException:
            leave()  # again, because an interrupt may have come during the first time
            raise

    @contextmanager
    def at(self, direction: Vector, step: float) -> Iterator[None]:
        """A context in which the parameters are θ + step·direction."""
        with self._perturbation.restoring():
            self._perturb(direction, step)
            yield

    @contextmanager
    def around(self, direction: Vector, step: float) -> Iterator[Callable[[], None]]:
        """A context that begins at θ + step·direction; what it yields moves to θ − step·direction."""
        with self._perturbation.restoring():
            self._perturb(direction, step)
            yield self._perturbation.mirror

    def _perturb(self, direction: Vector, step: float) -> None:
        parameters = self.space.parameters
        with torch.no_grad():
            self._perturbation.perturb(parameters, self.space.split(direction), step, check_rounding=False)

    def rewind(self) -> None:
        """Go back to the buffers and random numbers that the first closure read, before closures are evaluated by someone else."""
        self._go_to_start(0)

    def loss(self, only: int | None = None, *, averaged: bool = True) -> float:
        """The loss where the parameters are; ``only``: of one closure, without its weight."""
        losses: dict[int, Tensor] = {}

        def keep(i: int, loss: Tensor, _: Any) -> None:
            losses[i] = loss.detach().double()

        self.sweep(keep, only)
        total = self._total(losses, only)
        return self.averaged(total) if averaged else total

    def gradient(self, only: int | None = None, *, averaged: bool = True) -> tuple[float, Vector]:
        """Loss and gradient where the parameters are.

        Args:
            only: of one closure, without its weight.
            averaged: under DDP, over the ranks.
        """
        losses: dict[int, Tensor] = {}

        def differentiate(i: int, loss: Tensor, _: Any) -> None:
            losses[i] = loss.detach().double()
            weight = 1.0 if only is not None else self.weights[i]
            loss.backward(None if weight == 1.0 else torch.full_like(loss, weight))
            self.passes.backward += self.share

        self.sweep(differentiate, only)
        total = self._total(losses, only)
        return self.averaged(total) if averaged else total, self.collected(averaged=averaged)

    def collected(self, *, averaged: bool = True) -> Vector:
        """What has accumulated in ``.grad``, which is emptied."""
        found = self._gradients.of(self.space.parameters)
        shards = dict(zip(found, local_shards(list(found.values())), strict=True))
        vector = self.space.flatten([shards.get(p) for p in self.space.parameters])
        self._gradients.clear()
        return self.mean(vector) if averaged else vector

    def mean(self, vector: Vector) -> Vector:
        """The average of a vector over the ranks of DDP."""
        if self.parallelism.averages:
            shards = self.space.split(vector)
            self.parallelism.average(shards, self.space.parameters)
            return self.space.flatten(shards)
        return vector

    @property
    def share(self) -> float:
        """What a pass of one closure counts for."""
        return 1 / len(self.closures)

    def sweep(self, work: Work, only: int | None = None) -> None:
        """Evaluate every closure, and call ``work`` with each result.

        ``work`` accumulates in ``.grad`` or by the closure's number, because the first sweep of a measurement, which finds out what forward
        passes write, is repeated if they do.
        """
        numbers = range(len(self.closures)) if only is None else (only,)
        for i in numbers:
            self._go_to_start(i)
            with torch.enable_grad(), self.parallelism.synchronised(False):
                loss, outputs = self._checked(self.closures[i]())
                self.passes.forward += self.share
                work(i, loss, outputs)
        if self._settled:
            return
        assert self._start is not None
        self._state.settle([self._start], self._trainable)
        self._settled = True
        if len(numbers) > 1 and self._state.differs_from(self._start):  # closures read what others wrote: evaluate each from the start
            self._gradients.clear()
            self.sweep(work, only)

    def averaged(self, value: float) -> float:
        """The mean of a number over the ranks among which the data are divided."""
        mean = torch.tensor(value, dtype=torch.float64, device=self.space.device)
        if self.parallelism.averages:
            return float(self.parallelism.mean(mean))
        dtensor = dtensor_class()
        sharded: list[Any] = [p for p in self.space.parameters if dtensor is not None and isinstance(p, dtensor)]
        for mesh in {p.device_mesh for p in sharded}:
            for group in mesh.get_all_groups():
                torch.distributed.all_reduce(mean, group=group)
                mean /= group.size()
        return float(mean)

    def _first(self) -> Point:
        losses: dict[int, Tensor] = {}
        reached: set[nn.Parameter] = set()

        def differentiate(i: int, loss: Tensor, _: Any) -> None:
            losses[i] = loss.detach().double()
            loss.backward(None if self.weights[i] == 1.0 else torch.full_like(loss, self.weights[i]))
            self.passes.backward += self.share

        self.sweep(differentiate)
        reached |= {p for p in self.space.parameters if p.grad is not None}
        value, gradient = self.averaged(self._total(losses, None)), self.collected()
        norm = self.space.norm(gradient)
        if not math.isfinite(value):
            raise ValueError(
                f"the loss must be finite at the parameters as they are; got {value}. The weights have diverged, or the closure's data "
                "hold NaN or infinity."
            )
        if not math.isfinite(norm):
            bad = next(name for name, g in self.space.whole(gradient).items() if not bool(torch.isfinite(g).all()))
            raise ValueError(
                f"the gradient must be finite at the parameters as they are; got NaN or infinity at {bad!r}, with a loss of {value:.6g}. A "
                "square root, norm or logarithm at 0 is the usual cause."
            )
        if not reached:
            raise ValueError(
                f"closure must reach a selected parameter; got a loss that gives none of the {len(self.space.parameters)} a gradient. "
                "Compute it from the model's output, or select parameters that the loss depends on: parameters=lambda name, p: ..."
            )
        if norm == 0:
            self.warn(
                "The gradient of these batches is exactly zero: the loss is at a stationary point, or does not depend on the parameters "
                "here (dead units, a saturated loss)."
            )
        return Point(value, gradient, norm, frozenset(reached))

    def _total(self, losses: dict[int, Tensor], only: int | None) -> float:
        if only is not None:
            return float(losses[only])
        return float(torch.stack([losses[i] * self.weights[i] for i in sorted(losses)]).sum())

    def _go_to_start(self, i: int) -> None:
        if self._start is None:
            raise RuntimeError("a loss function is evaluated inside of measuring(); got an evaluation outside. Enter it first.")
        self.parallelism.set_forward_synchronisation(self._flags)
        if self._settled:
            random = self._random[i] if i < len(self._random) else self._start.random
            self._state.restore(replace(self._start, random=random))
        elif i < len(self._random):
            self._state.restore_random(self._random[i])
        if i == len(self._random):
            self._random.append(self._state.random_states())

    def _restore_state(self) -> None:
        if self._start is None:
            return
        if not self._settled:  # an evaluation was interrupted: look for what it wrote until then
            self._state.settle([self._start], self._trainable)
            self._settled = True
        self._state.restore(self._start)

    def _checked(self, returned: Any) -> tuple[Tensor, Any]:
        outputs = None
        if isinstance(returned, tuple) and len(returned) == 2:
            returned, outputs = returned
        if not isinstance(returned, Tensor):
            raise TypeError(
                f"closure must return the loss as a tensor, or (loss, outputs); got {checks.describe(returned)}. "
                "Return loss, not loss.item()."
            )
        if returned.numel() != 1:
            raise ValueError(
                f"closure must return a scalar loss; got a tensor of shape {tuple(returned.shape)}. Reduce it with .mean() or .sum()."
            )
        if not returned.requires_grad:
            raise ValueError(
                "closure must return a loss that requires grad; got one that does not depend on any trainable parameter. "
                "Compute it from the model's output, without torch.no_grad() or .detach()."
            )
        return returned if returned.dim() == 0 else returned.reshape(()), outputs

    def _say_mode(self) -> None:
        kinds = {type(m).__name__ for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training}
        if kinds:
            text = (
                f"{' and '.join(sorted(kinds))} in train mode normalizes by the statistics of each batch: the curvature is that of a loss "
                "which couples the samples of a batch, and depends on its size."
            )
            if self._mode is None:
                self.warn(f"{text} Pass mode='eval' to measure the network that predicts, or mode='train' if this is meant.")
            elif text not in self.notes:
                self.notes.append(text)
        random = {type(m).__name__ for m in self.model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0}
        text = f"{' and '.join(sorted(random))} in train mode: this is the curvature at one draw of its masks."
        if random and text not in self.notes:
            self.notes.append(text)

    def warn(self, text: str) -> None:
        """Note something that the user must be warned of, when the measurement ends."""
        if text not in self.notes:
            self.notes.append(text)
            self._warnings.append(text)

    def emit_warnings(self, stacklevel: int) -> None:
        """Warn of what has been noted for it."""
        for text in self._warnings:
            warnings.warn(text, stacklevel=stacklevel + 1)
        self._warnings.clear()


def _weights(sizes: Sequence[int] | None, count: int) -> list[float]:
    if sizes is None:
        return [1.0] * count
    found = [checks.whole("sizes", size, minimum=1, remedy="Pass the number of samples of each closure.") for size in sizes]
    if len(found) != count:
        raise ValueError(f"sizes must hold one number for each closure; got {len(found)} for {count}. Leave it out to add the losses up.")
    return [size / sum(found) for size in found]
