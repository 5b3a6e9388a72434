"""All passes of a step evaluate one function: each starts from the state and the random numbers that the first read, whose writes stand.

The oracle is a twin that gives every pass a copy of the model as it was, and knows nothing of how modules keep their state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad
from torch.nn.utils import parametrize

import gradreg
from gradreg import GradientPenalty
from gradreg.torch import GradientRegularizer

from . import twins
from .cases import PENALTIES, Problem, assert_close, gradients
from .stateful import ZOO, Codebook, Counter, Stateful, own_copy, problem_with, random_state, set_random_state, state_of

every_module = pytest.mark.parametrize("module", ZOO.values(), ids=ZOO)

PASSES = {name: PENALTIES[name] for name in ("sam", "gnp", "fgr-mixing", "cgr", "friendly", "gsam", "exact")}
KINDS_OF_STATE = (
    "spectral norm by hooks",
    "codebook",
    "quantization observers",
    "teacher with new data",
    "counter in a reassigned buffer",
    "dropout by numpy",
    "checkpointed, reentrant",
)
"""One module of each kind, which every kind of pass evaluates; the others are evaluated by the two penalties with most passes."""

PAIRS = [
    pytest.param(module, penalty, id=f"{name}-{p}")
    for name, module in ZOO.items()
    for p, penalty in PASSES.items()
    if (name in KINDS_OF_STATE or p in ("cgr", "exact")) and (module.twice or penalty.difference != "exact")
]

WHOLE = (slice(0, 8),)
HALVES = (slice(0, 4), slice(4, 8))

pytestmark = pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")


@dataclass
class After:
    """What one step left."""

    loss: Tensor
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]


Step = Callable[[Problem, Sequence[slice]], Tensor]
"""Fills ``.grad`` with the gradient of the summed loss of the parts, and returns that loss."""


def loss_of(model: nn.Module, problem: Problem, rows: slice) -> Tensor:
    return nn.functional.mse_loss(model(problem.x[rows]), problem.y[rows])


def cached(module: Stateful) -> AbstractContextManager[object]:
    return parametrize.cached() if module.cached else nullcontext()


def train(module: Stateful, step: Callable[[Stateful, Problem], Step], parts: Sequence[Sequence[slice]]) -> list[After]:
    """As many steps of SGD as there are ``parts``.

    What ``parametrize.cached()`` keeps can be differentiated once, so there the batch is whole.
    """
    problem = problem_with(module)
    model, left = problem.model, []
    one_step = step(module, problem)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for in_training, these in zip(module.in_training, [WHOLE] * 3 if module.cached else parts, strict=False):
        model.train(in_training)
        optimizer.zero_grad()
        loss = one_step(problem, these)
        left.append(After(loss, gradients(model), state_of(model)))
        optimizer.step()
    return left


def plain(module: Stateful, problem: Problem) -> Step:
    def step(problem: Problem, parts: Sequence[slice]) -> Tensor:
        losses = []
        for rows in parts:
            with cached(module):
                losses.append(loss_of(problem.model, problem, rows))
                losses[-1].backward()
        return torch.stack(losses).detach().sum()

    return step


def regularized(penalty: GradientPenalty) -> Callable[[Stateful, Problem], Step]:
    def of(module: Stateful, problem: Problem) -> Step:
        regularizer = GradientRegularizer(problem.model, penalty)

        def step(problem: Problem, parts: Sequence[slice]) -> Tensor:
            with cached(module):
                return regularizer.backward([lambda rows=rows: loss_of(problem.model, problem, rows) for rows in parts])

        return step

    return of


@dataclass
class FreshPasses:
    """The summed loss of ``parts``. The first evaluation changes ``model``; each later one is made of copies from before the first."""

    module: Stateful
    problem: Problem
    parts: Sequence[slice]
    starts: list[tuple[nn.Module, tuple]] = field(default_factory=list)
    known: dict[tuple[bytes, ...], twins.Parameters] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))

    def gradient(self, theta: twins.Parameters) -> twins.Parameters:
        """At ``theta``; asked for the same place again, the same."""
        place = tuple(value.numpy().tobytes() for value in theta.values())
        if place not in self.known:
            self.known[place] = self.evaluated(theta)
        return self.known[place]

    def evaluated(self, theta: twins.Parameters) -> twins.Parameters:
        first, stands, total = not self.starts, random_state(), []
        for i, rows in enumerate(self.parts):
            model = self.problem.model
            if first:
                self.starts.append((own_copy(model), random_state()))
            else:
                model = self.at(i, theta)
            with cached(self.module):
                model.zero_grad()
                loss = loss_of(model, self.problem, rows)
                loss.backward()
            if first:
                self.loss = self.loss + loss.detach()
            self.reached |= set(gradients(model))
            total.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters() if n in theta})
        if not first:
            set_random_state(stands)
        return twins.total(*total)

    def at(self, i: int, theta: twins.Parameters) -> nn.Module:
        """The model as before part ``i`` was first evaluated, with the parameters ``theta``, and the random numbers of then."""
        model = own_copy(self.starts[i][0])
        set_random_state(self.starts[i][1])
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in theta:
                    p.copy_(theta[name])
        return model

    def hessian_product(self, theta: twins.Parameters, d: twins.Parameters) -> twins.Parameters:
        stands, total = random_state(), []
        for i, rows in enumerate(self.parts):
            model = self.at(i, theta)
            named = {n: p for n, p in model.named_parameters() if n in theta}
            with cached(self.module):
                loss = loss_of(model, self.problem, rows)
            first = torch.autograd.grad(loss, list(named.values()), create_graph=True, allow_unused=True)
            along = sum((g * d[n]).sum() for n, g in zip(named, first, strict=True) if g is not None)
            second = torch.autograd.grad(along, list(named.values()), allow_unused=True)  # type: ignore[arg-type]
            total.append({n: torch.zeros_like(p) if h is None else h for (n, p), h in zip(named.items(), second, strict=True)})
        set_random_state(stands)
        return twins.total(*total)


def fresh_passes(penalty: GradientPenalty) -> Callable[[Stateful, Problem], Step]:
    """Steps of ``penalty`` by ``twins.family``; its gradients must be those of ``FreshPasses``."""

    def of(module: Stateful, problem: Problem) -> Step:
        memory = twins.Remembered()

        def step(problem: Problem, parts: Sequence[slice]) -> Tensor:
            passes, theta = FreshPasses(module, problem, parts), twins.parameters_of(problem.model)
            if penalty.difference == "exact":
                g = passes.gradient(theta)
                result = twins.total(g, twins.scaled(penalty.strength_at(0), passes.hessian_product(theta, g)))
            else:
                result = twins.family(penalty, passes, theta, memory=memory)  # type: ignore[arg-type]
            for name, p in problem.model.named_parameters():
                p.grad = result[name] if name in passes.reached else None
            return passes.loss

        return step

    return of


@pytest.fixture
def gradients_of_fresh_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """``twins.family`` differentiates functions of the parameters; a model that writes its state is none."""
    monkeypatch.setattr(FreshPasses, "__call__", lambda self, theta: self.loss, raising=False)
    monkeypatch.setattr(twins, "grad", lambda loss: loss.gradient if isinstance(loss, FreshPasses) else grad(loss))


def assert_same_step(found: After, expected: After, tolerance: float, number: int) -> None:
    torch.testing.assert_close(found.loss, expected.loss, rtol=tolerance, atol=0, msg=lambda m: f"loss of step {number}: {m}")
    assert_close(found.gradients, expected.gradients, tolerance)
    assert found.state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        exact = name.startswith(("generator", "random")) or not value.is_floating_point()
        bounds = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(found.state[name], value, **bounds, msg=lambda m, n=name: f"{n} after step {number}: {m}")


@pytest.mark.parametrize("parts", [WHOLE, HALVES], ids=["batch", "micro-batches"])
@every_module
def test_a_vanishing_radius_is_plain_training(module: Stateful, parts: Sequence[slice]) -> None:
    expected = train(module, plain, [parts] * 3)
    found = train(module, regularized(gradreg.sam(rho=1e-7)), [parts] * 3)
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert_same_step(ours, theirs, 1e-6, number)


@pytest.mark.slow
@pytest.mark.usefixtures("gradients_of_fresh_passes")
@pytest.mark.parametrize(("module", "penalty"), PAIRS)
def test_every_pass_starts_where_the_first_did(module: Stateful, penalty: GradientPenalty) -> None:
    parts = [WHOLE, HALVES]
    expected = train(module, fresh_passes(penalty), parts)
    found = train(module, regularized(penalty), parts)
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert_same_step(ours, theirs, 1e-9, number)


class Counting(nn.Module):
    """Its gradient says how many forward passes it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.register_buffer("n", torch.zeros(()))

    def forward(self) -> Tensor:
        self.n += 1
        return self.n * self.w.sum()


@pytest.mark.parametrize("penalty", [gradreg.sam(rho=1e-6), *PENALTIES.values()], ids=["sam, 1e-6", *PENALTIES])
def test_a_counter_counts_steps_in_every_pass(penalty: GradientPenalty) -> None:
    """The loss is linear in the parameters, so every pass, wherever it is made, has the gradient n."""
    model = Counting()
    regularizer = GradientRegularizer(model, GradientPenalty(**{**vars(penalty), "mixing": "plain", "reuse": None, "decoupled": False}))
    for n in (1, 2, 3):
        model.zero_grad()
        regularizer.backward(model)
        torch.testing.assert_close(model.w.grad, torch.full((2,), float(n)), rtol=1e-5, atol=0)
        assert int(model.n) == n


def test_a_buffer_written_through_data_is_written_once() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))
            self.register_buffer("b", torch.zeros(1, 2))

        def forward(self) -> Tensor:
            self.b.data.add_(1.0)
            return (self.w * self.w).sum()

    model = Written()
    GradientRegularizer(model, gradreg.sam(rho=0.1)).backward(model)
    assert model.b.tolist() == [[1.0, 1.0]]


def test_inner_and_outer_micro_batches_read_what_the_one_before_wrote() -> None:
    """n is 1 and 2 in the two closures, in every round: gradients 1 + 2, not (1 + 2) and then 3 + 4."""
    model = Counting()
    seen: list[float] = []

    def closure() -> Tensor:
        loss = model()
        seen.append(float(model.n))
        return loss

    GradientRegularizer(model, PENALTIES["cgr"]).backward([closure, lambda: 1.0 * closure()])
    assert seen == [1, 2] * 3
    torch.testing.assert_close(model.w.grad, torch.full((2,), 3.0))
    assert int(model.n) == 2


@pytest.mark.parametrize("name", ["sam", "gnp", "cgr", "sam-3-steps"])
def test_ascent_closures_are_another_function_that_starts_at_the_same_place(name: str) -> None:
    model = Counting()
    seen: dict[str, list[float]] = {"ascent": [], "closure": []}

    def of(what: str) -> Tensor:
        loss = model()
        seen[what].append(float(model.n))
        return loss

    ascents, closures = [lambda: of("ascent"), lambda: 1.0 * of("ascent")], [lambda: of("closure"), lambda: 1.0 * of("closure")]
    GradientRegularizer(model, PENALTIES[name]).backward(closures, ascent=ascents)
    assert seen["ascent"] == [1, 2] * PENALTIES[name].ascent_steps
    assert seen["closure"] == [1, 2] * (len(seen["closure"]) // 2)
    assert int(model.n) == 2
    torch.testing.assert_close(model.w.grad, torch.full((2,), 3.0))


@pytest.mark.parametrize("name", ["codebook", "queue", "batch renorm", "teacher written through data", "spectral norm by hooks"])
def test_with_ascent_closures_and_strength_equal_to_radius_the_ascent_s_writes_stand(name: str) -> None:
    module = ZOO[name]
    problem, twin = problem_with(module), problem_with(module)
    before = own_copy(twin.model)
    part = slice(0, 5)
    g = gradients_at(twin.model, twin, part)
    stands = state_of(twin.model)
    with torch.no_grad():
        for n, p in before.named_parameters():
            if n in g:
                p.add_(g[n], alpha=0.3 / float(twins.norm(g)))
    expected = gradients_at(before, twin, slice(0, 8))
    GradientRegularizer(problem.model, gradreg.sam(rho=0.3)).backward(
        lambda: loss_of(problem.model, problem, slice(0, 8)), ascent=lambda: loss_of(problem.model, problem, part)
    )
    assert_close(gradients(problem.model), expected, 1e-10)
    found = state_of(problem.model)
    assert found.keys() == stands.keys()
    for name, value in stands.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def gradients_at(model: nn.Module, problem: Problem, rows: slice) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, problem, rows).backward()
    return gradients(model)


def test_what_is_found_to_be_written_is_found_again_after_a_change_of_mode() -> None:
    """A codebook that is only read in evaluation mode, through steps of both modes, against plain training."""
    module = Stateful(Codebook, in_training=(False, True, False))
    expected = train(module, plain, [WHOLE] * 3)
    found = train(module, regularized(gradreg.sam(rho=1e-7)), [WHOLE] * 3)
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert_same_step(ours, theirs, 1e-6, number)


def test_a_step_without_a_strength_leaves_the_state_of_one_pass() -> None:
    """Between steps of two passes, as in a warm-up from zero and in ``every(2)``: nothing kept from another step is put back."""
    problem = Problem(nn.Sequential(nn.Linear(3, 6), Counter("buffer"), nn.Linear(6, 2)).double(), *data())
    regularizer = GradientRegularizer(problem.model, gradreg.sam(rho=0.3).every(2))
    for n in range(1, 6):
        regularizer.backward(problem.closure())
        assert int(problem.model[1].calls) == n  # type: ignore[index]


def test_an_exception_in_a_later_pass_leaves_what_the_first_wrote() -> None:
    for name in ("counter in a buffer", "average through data, 2-d", "teacher with new data", "dropout by numpy"):
        problem, twin = problem_with(ZOO[name]), problem_with(ZOO[name])
        start = random_state()
        loss_of(twin.model, twin, WHOLE[0])
        expected = state_of(twin.model)
        calls: list[int] = []

        def closure(problem=problem, calls=calls) -> Tensor:
            calls.append(1)
            loss = loss_of(problem.model, problem, WHOLE[0])
            if len(calls) == 2:
                raise RuntimeError("injected")
            return loss

        set_random_state(start)
        with pytest.raises(RuntimeError, match="injected"):
            GradientRegularizer(problem.model, PENALTIES["cgr"]).backward(closure)
        assert_close(state_of(problem.model), expected, 0.0)


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
