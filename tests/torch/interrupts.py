"""Interrupting one step at any executed line of the engine, or at any allocation, and looking at what is left.

``python -m tests.torch.interrupts [--stride 10] [PENALTY ...]`` prints how many points leave what behind.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradreg
from gradreg import GradientPenalty
from gradreg.torch import GradientRegularizer

from .cases import PENALTIES, Problem, gradients, regularizer_at
from .stateful import WIDTH, Average, Stateful, Teacher, problem_with, random_state, set_random_state, state_of

ENGINE = Path(gradreg.__file__).parent
CIRCLES = {str(ENGINE), str(ENGINE / "torch")}
"""The folders whose lines count: circle 1 and the PyTorch engine."""

MOMENTS = {"first": (100, 0), "second": (99, 1), "third": (100, 1)}
"""The clock at which a run begins, and how many whole steps come before the one that is interrupted.

The first has everything to allocate; the second finds gradients in ``.grad``; the third is one at which LookSAM and ``every(2)`` rest.
"""

SEED = 9


def everything() -> nn.Module:
    """Batch statistics, a frozen teacher, an average in a buffer, and dropout."""
    return nn.Sequential(nn.BatchNorm1d(WIDTH), Teacher("in place"), Average("in place"), nn.Dropout(0.3))


@dataclass
class Left:
    """What can be seen from outside."""

    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]
    written: dict[str, Tensor]
    numbers: dict[str, Tensor]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].numpy().tobytes() == b[n].numpy().tobytes() for n in a)


@dataclass
class Run:
    """A model and its regularizer just before the step that is interrupted; the same each time."""

    penalty: GradientPenalty
    moment: str
    problem: Problem = field(init=False)
    regularizer: GradientRegularizer = field(init=False)

    def __post_init__(self) -> None:
        clock, steps = MOMENTS[self.moment]
        self.problem = problem_with(Stateful(everything))
        torch.default_generator.manual_seed(SEED)
        self.regularizer = regularizer_at(clock, self.model, self.penalty)
        for _ in range(steps):
            self.step()
            self.forgo()
            self.model.zero_grad()
        if self.moment == "second":
            for p in self.model.parameters():
                if p.requires_grad:
                    p.grad = torch.full_like(p, 0.25)

    @property
    def model(self) -> nn.Module:
        return self.problem.model

    def step(self) -> None:
        self.regularizer.backward(self.problem.closure())

    def forgo(self) -> None:
        """Apply what a decoupled penalty has pending, at a learning rate of 0."""
        if not self.penalty.decoupled:
            return
        self.regularizer.decoupled_step(torch.optim.SGD(self.model.parameters(), lr=0.0))

    def left(self) -> Left:
        state = state_of(self.model)
        numbers = {n: v for n, v in state.items() if n.startswith("random")}
        written = {n: v for n, v in state.items() if n not in numbers}
        parameters = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        return Left(parameters, gradients(self.model), written, numbers)

    def repair(self) -> None:
        """Whatever the engine does before anything else."""
        try:
            self.regularizer.state_dict()
        except RuntimeError as error:
            if "decoupled_step" not in str(error):  # else the step is done, and half of it pending
                raise


@cache
def _counts(file: str) -> bool:
    return str(Path(file).parent) in CIRCLES


Place = tuple[object, ...]
"""What tells one point of a step from another, except for the turn of a loop in which it is reached."""


class Lines:
    """A context that raises KeyboardInterrupt before the ``last``-th executed line of the engine, or notes the places of all lines."""

    def __init__(self, last: int | None = None) -> None:
        self.last, self.count, self.where = last, 0, ""
        self.places: list[Place] = []

    def __enter__(self) -> Lines:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *raised: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        return self._line if _counts(frame.f_code.co_filename) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "line":
            self.count += 1
            if self.last is None:
                self.places.append(_engine_lines(frame))
            elif self.count == self.last:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"
                raise KeyboardInterrupt("injected")
        return self._line


def _engine_lines(frame: FrameType | None) -> Place:
    """The lines of the engine at which a frame and its callers stand."""
    lines: list[object] = []
    while frame is not None:
        if _counts(frame.f_code.co_filename):
            lines += (frame.f_code, frame.f_lineno)
        frame = frame.f_back
    return tuple(lines)


class Allocations(TorchDispatchMode):
    """Memory is exhausted at the ``last``-th operation that allocates, and stays so until the context ends; or they are noted."""

    def __init__(self, last: int | None = None) -> None:
        super().__init__()
        self.last, self.count, self.where = last, 0, ""
        self.places: list[Place] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # In-place operations and views write into what there is; their results alias an argument.
        if any(result.alias_info is None for result in func._schema.returns if "Tensor" in str(result.type)):
            self.count += 1
            self.places.append((self.count,))
            if self.last is not None and self.count >= self.last:
                self.where = self.where or str(func)
                raise torch.OutOfMemoryError("injected: out of memory")
        return func(*args, **(kwargs or {}))


Fault = type[Lines] | type[Allocations]
RAISED = {Lines: KeyboardInterrupt, Allocations: torch.OutOfMemoryError}


def points(fault: Fault, penalty: GradientPenalty, moment: str) -> list[Place]:
    """The places of all lines, or allocations, of the step, in order."""
    run = Run(penalty, moment)
    with fault() as noted:
        run.step()
    return noted.places


def lines_before_the_last_pass_ends(penalty: GradientPenalty, moment: str) -> int:
    """How many lines are executed until the last evaluation of the closure returns."""
    run, ends = Run(penalty, moment), [0]
    closure = run.problem.closure()

    def noting() -> Tensor:
        loss = closure()
        ends.append(counted.count)
        return loss

    with Lines() as counted:
        run.regularizer.backward(noting)
    return ends[-1]


@dataclass
class Found:
    """What an interruption at one point did.

    Args:
        where: the line or the operation.
        broken: what was wrong after it, and after the engine had its chance of repairing that.
        repaired: whether parameters were perturbed until then.
    """

    where: str
    broken: list[str]
    repaired: bool


def interrupted(fault: Fault, penalty: GradientPenalty, moment: str, point: int, before: Left, after: Left) -> Found:
    """Interrupt the step at ``point``, look at what is there, load other weights, and go on."""
    run = Run(penalty, moment)
    where = _interrupt(fault, run, point)
    if where is None:
        return Found("", [], False)
    moved = not same(run.left().parameters, before.parameters)
    to_repair = moved or run.regularizer._perturbation.is_perturbed
    run.repair()
    broken = _wrong(fault, run, before, after)
    if to_repair:  # weights are loaded into a model that nothing has repaired; elsewhere there was nothing to repair
        run = Run(penalty, moment)
        _interrupt(fault, run, point)
    return Found(where, broken + _go_on_with_other_weights(run), moved and "parameters" not in broken)


def _wrong(fault: Fault, run: Run, before: Left, after: Left) -> list[str]:
    """What is neither as before the step nor as after it."""
    broken, left = list[str](), run.left()
    if not same(left.parameters, before.parameters):
        broken.append("parameters")
    # Where a step is one plain pass, a backward pass that fails leaves what it leaves in plain training.
    plain = run.penalty.strength_at(sum(MOMENTS[run.moment])) == 0.0 and fault is Allocations
    if not plain and not any(same(left.gradients, one.gradients) for one in (before, after)):
        broken.append("gradients")
    for what in ("written", "numbers"):
        found, choices = getattr(left, what), [getattr(one, what) for one in (before, after)]
        # Memory is exhausted in the middle of a forward pass, too: what that had written by then is one tensor's business.
        parts = [[name] for name in found] if fault is Allocations else [list(found)]
        if not all(any(all(torch.equal(found[n], one[n]) for n in part) for one in choices) for part in parts):
            broken.append(what)
    return broken


def _interrupt(fault: Fault, run: Run, point: int) -> str | None:
    context = fault(point)
    try:
        with context:
            run.step()
    except RAISED[fault] as error:
        if "injected" not in str(error):
            raise
        return context.where
    return None


@dataclass
class _Uninterrupted:
    """A step of a new regularizer from other weights.

    Args:
        loaded: what the model held before.
        gradients: what the step left.
        buffers: likewise.
    """

    loaded: dict[str, Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


@lru_cache(maxsize=8)
def _uninterrupted(penalty: GradientPenalty, clock: int) -> _Uninterrupted:
    other = problem_with(Stateful(everything))
    torch.default_generator.manual_seed(1)
    with torch.no_grad():
        for p in other.model.parameters():
            p.add_(torch.randn_like(p))
    loaded = {n: v.clone() for n, v in other.model.state_dict().items()}
    twin = regularizer_at(clock, other.model, penalty)
    torch.default_generator.manual_seed(SEED)
    twin.backward(other.closure())
    return _Uninterrupted(loaded, gradients(other.model), _buffers(other.model))


def _go_on_with_other_weights(run: Run) -> list[str]:
    """Load a checkpoint and make a step: nothing of the interrupted one may reach the weights or the gradient."""
    other = _uninterrupted(run.penalty, run.regularizer.step)
    run.model.load_state_dict(other.loaded)
    run.model.zero_grad()
    run.forgo()
    torch.default_generator.manual_seed(SEED)
    run.step()
    broken = []
    # What is remembered is not the new regularizer's: the gradient differs, and so do buffers where no pass is made at the loaded weights.
    if any(not torch.equal(p, other.loaded[n]) for n, p in run.model.named_parameters() if p.requires_grad):
        broken.append("loaded weights")
    elif not run.penalty.has_memory and not same(gradients(run.model), other.gradients):
        broken.append("next gradient")
    elif run.penalty.direction.needs_gradient and not same(_buffers(run.model), other.buffers):
        broken.append("next buffers")
    return broken


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {n: b.detach().clone() for n, b in model.named_buffers()}


def ends(penalty: GradientPenalty, moment: str) -> tuple[Left, Left]:
    """What is there before and after the step if nothing interrupts it."""
    run = Run(penalty, moment)
    before = run.left()
    run.step()
    return before, run.left()


Choice = Callable[[Sequence[Place]], list[int]]
"""Picks points, which count from 1, by the places of all."""


def sweep(fault: Fault, penalty: GradientPenalty, moment: str, chosen: Choice) -> list[Found]:
    """The points of one step that ``chosen`` picks; the global random numbers stand afterwards where they stood."""
    start = random_state()
    try:
        before, after = ends(penalty, moment)
        picked = chosen(points(fault, penalty, moment))
        return [interrupted(fault, penalty, moment, point, before, after) for point in picked]
    finally:
        set_random_state(start)


def every(stride: int = 1) -> Choice:
    """Of every place the first, the second and the last time it is reached; of those, each ``stride``-th."""

    def chosen(places: Sequence[Place]) -> list[int]:
        times: dict[Place, list[int]] = {}
        for point, place in enumerate(places, start=1):
            times.setdefault(place, []).append(point)
        return sorted({point for found in times.values() for point in (*found[:2], found[-1])})[::stride]

    return chosen


def a_few(number: int, seed: str) -> Choice:
    """``number`` points, the same each time for one seed."""
    return lambda places: sorted(random.Random(seed).sample(range(1, len(places) + 1), min(number, len(places))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("penalties", nargs="*", default=list(PENALTIES))
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--fault", choices=["lines", "allocations"], default="lines")
    parser.add_argument("--moments", nargs="*", default=list(MOMENTS))
    options = parser.parse_args()
    fault: Fault = Lines if options.fault == "lines" else Allocations
    total: Counter[str] = Counter()
    for name in options.penalties:
        for moment in options.moments:
            found = sweep(fault, PENALTIES[name], moment, every(options.stride))
            kinds = Counter(what for one in found for what in one.broken)
            wrong, repaired = sum(bool(one.broken) for one in found), sum(one.repaired for one in found)
            total.update({"points": len(found), "wrong": wrong, "repaired by the next call": repaired, **kinds})
            print(f"{name}, {moment}: {wrong} of {len(found)} points, repaired {repaired}, {dict(kinds)}", flush=True)
    print(dict(total))


if __name__ == "__main__":
    main()
