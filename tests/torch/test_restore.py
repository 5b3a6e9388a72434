"""Parameters come back bit for bit: after a step on random models, and after an exception at any call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradreg import GradientPenalty
from gradreg.torch import GradientRegularizer
from gradreg.torch.perturbation import Perturbation

from .cases import (
    PENALTIES,
    Problem,
    assert_close,
    assert_same_bits,
    calls_at,
    dropout_batchnorm_problem,
    each_trait,
    every_finite_difference,
    gradients,
    regularizer_at,
    tanh_problem,
    values,
)

WIDTH = 3
BLOCKS = ("linear", "tied", "frozen", "batchnorm", "dropout", "layernorm", "tanh", "scaled")


class RandomModel(nn.Module):
    """A stack of the named blocks between two linear layers, with a parameter that the output does not depend on."""

    def __init__(self, blocks: list[str], unused: bool, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(seed)
        shared = nn.Linear(WIDTH, WIDTH)
        layers: list[nn.Module] = [nn.Linear(WIDTH, WIDTH)]
        for block in blocks:
            layer = {
                "linear": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
                "tied": lambda: shared,
                "frozen": lambda: nn.Linear(WIDTH, WIDTH).requires_grad_(False),
                "batchnorm": lambda: nn.BatchNorm1d(WIDTH),
                "dropout": lambda: nn.Dropout(0.3),
                "layernorm": lambda: nn.LayerNorm(WIDTH),
                "tanh": nn.Tanh,
                "scaled": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
            }[block]()
            layers.append(layer)
        self.stack = nn.Sequential(*layers)
        if unused:
            self.unused = nn.Parameter(torch.randn(WIDTH))
        # Large and small values side by side: adding and subtracting a step is exact for neither.
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(10 ** torch.empty_like(p).uniform_(-3, 1))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(x)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@settings(max_examples=2 * settings.default.max_examples)
@given(
    blocks=st.lists(st.sampled_from(BLOCKS), max_size=5),
    unused=st.booleans(),
    seed=st.integers(0, 2**31),
    name=st.sampled_from(sorted(PENALTIES)),
    gradient_present=st.booleans(),
)
@example(blocks=["tied", "tied", "frozen", "batchnorm", "dropout"], unused=True, seed=0, name="cgr", gradient_present=True)
def test_random_models(dtype: torch.dtype, blocks: list[str], unused: bool, seed: int, name: str, gradient_present: bool) -> None:
    model = RandomModel(blocks, unused, seed, dtype)
    problem = Problem(model, torch.randn(5, WIDTH, dtype=dtype), torch.randn(5, WIDTH, dtype=dtype))
    if gradient_present:
        problem.loss().backward()
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    identities = [(id(p), p.data_ptr(), p.requires_grad) for p in model.parameters()]

    regularizer_at(3, model, PENALTIES[name]).backward(problem.closure())

    assert_same_bits({n: p.detach() for n, p in model.named_parameters()}, parameters)
    assert [(id(p), p.data_ptr(), p.requires_grad) for p in model.parameters()] == identities
    assert {n: p.grad is None for n, p in model.named_parameters()} == {
        n: not p.requires_grad or n == "unused" for n, p in model.named_parameters()
    }


@pytest.mark.slow
@each_trait
@pytest.mark.parametrize("gradient_present", [False, True], ids=["no-gradient", "gradient-present"])
@pytest.mark.parametrize("inside", ["closure", "backward"])
def test_after_an_exception_at_any_call(penalty: GradientPenalty, gradient_present: bool, inside: str) -> None:
    for failing_call in range(4):
        problem = dropout_batchnorm_problem()
        if gradient_present:
            problem.loss().backward()
        parameters = {n: p.detach().clone() for n, p in problem.model.named_parameters()}
        earlier = gradients(problem.model)
        calls = {"closure": 0, "backward": 0}

        def count(what: str, calls=calls, failing_call=failing_call) -> None:
            if what == inside and calls[what] == failing_call:
                raise KeyboardInterrupt("injected")
            calls[what] += 1

        def closure(problem=problem, count=count) -> Tensor:
            count("closure")
            return problem.loss()

        def backward(loss: Tensor, count=count) -> None:
            count("backward")
            loss.backward()

        regularizer = regularizer_at(100, problem.model, penalty)
        if failing_call >= calls_at(100, penalty):
            regularizer.backward(closure, backward=backward)
            continue
        with pytest.raises(KeyboardInterrupt, match="injected"):
            regularizer.backward(closure, backward=backward)
        assert_same_bits({n: p.detach() for n, p in problem.model.named_parameters()}, parameters)
        if penalty.difference != "exact":
            assert_same_bits(gradients(problem.model), earlier)
        assert regularizer.step == 100


@every_finite_difference
def test_the_step_after_an_exception_is_as_if_nothing_had_happened(penalty: GradientPenalty) -> None:
    problem = tanh_problem()
    regularizer_at(100, problem.model, penalty).backward(problem.closure())
    expected = gradients(problem.model)
    problem.model.zero_grad()

    regularizer = regularizer_at(100, problem.model, penalty)
    losses = [*[problem.loss] * (penalty.evaluations_at(100) - 1), lambda: torch.zeros(2)]

    def closure() -> Tensor:
        return losses.pop(0)()

    with pytest.raises(ValueError, match="closure must return a scalar loss"):
        regularizer.backward(closure)
    regularizer.backward(problem.closure())
    assert_close(gradients(problem.model), expected, tolerance=0)


def test_batch_statistics_after_an_exception_in_the_second_pass_are_the_first_pass_s() -> None:
    problem = dropout_batchnorm_problem()
    twin = dropout_batchnorm_problem()
    torch.manual_seed(5)
    twin.loss()
    expected = values(twin.model)

    def fail_second(loss: Tensor, calls=[]) -> None:  # noqa: B006
        calls.append(loss)
        if len(calls) == 2:
            raise RuntimeError("injected")
        loss.backward()

    torch.manual_seed(5)
    with pytest.raises(RuntimeError, match="injected"):
        regularizer_at(100, problem.model, PENALTIES["sam"]).backward(problem.closure(), backward=fail_second)
    assert_same_bits(values(problem.model), expected)


@every_finite_difference
def test_parameters_are_in_place_when_an_optimizer_steps(penalty: GradientPenalty) -> None:
    """Two steps in a row: what the first left behind does not enter the second, and the optimizer's change is kept."""
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, penalty)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.5)
    for _ in range(3):
        before = {n: p.detach().clone() for n, p in problem.model.named_parameters()}
        optimizer.zero_grad()
        regularizer.backward(problem.closure())
        change = gradients(problem.model)
        optimizer.step()
        assert_same_bits(
            {n: p.detach() for n, p in problem.model.named_parameters()},
            {n: b.add(change[n], alpha=-0.5) for n, b in before.items()},
        )
        regularizer.decoupled_step(optimizer)


LARGE = (128, 256)
"""A shape of 32,768 elements, from which a parameter is pointed at a perturbed copy where nothing shares its memory."""


class Read(nn.Module):
    """A network of one large weight and one small bias whose loss also depends on what ``reads`` sees of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(LARGE, dtype=torch.float64) / 16)
        self.bias = nn.Parameter(torch.randn(LARGE[0], dtype=torch.float64))
        self.reads: Callable[[], Tensor] = self.weight.detach

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(nn.functional.linear(x, self.weight, self.bias)) + (self.weight * self.reads()).sum()


def read_problem() -> Problem:
    torch.manual_seed(3)
    return Problem(Read(), torch.randn(4, LARGE[1], dtype=torch.float64), torch.randn(4, LARGE[0], dtype=torch.float64))


def view_of(p: nn.Parameter, folder: Path) -> Tensor:
    return p.data.view(-1)


def array_of(p: nn.Parameter, folder: Path) -> Tensor:
    return torch.from_numpy(p.data.numpy())


def array_before(p: nn.Parameter, folder: Path) -> Tensor:
    array = p.data.numpy().copy()
    p.data = torch.from_numpy(array)
    return torch.from_numpy(array)


def mapped_file(p: nn.Parameter, folder: Path) -> Tensor:
    p.data.numpy().tofile(folder / "weight.bin")
    p.data = torch.from_file(str(folder / "weight.bin"), shared=True, size=p.numel(), dtype=p.dtype).view_as(p)
    return torch.from_numpy(np.memmap(folder / "weight.bin", dtype=np.float64, mode="r+"))


def shared_memory(p: nn.Parameter, folder: Path) -> Tensor:
    """As another process has it, at an address of its own."""
    p.share_memory_()
    again = torch.UntypedStorage._new_shared_fd_cpu(*p.untyped_storage()._share_fd_cpu_())
    return torch.empty(0, dtype=p.dtype).set_(again)


def flattened_buffer(p: nn.Parameter, folder: Path) -> Tensor:
    flat = torch.zeros(2 * p.numel(), dtype=p.dtype)
    flat[: p.numel()] = p.data.view(-1)
    p.data = flat[: p.numel()].view_as(p)
    return flat[: p.numel()]


SHARING = (view_of, array_of, array_before, mapped_file, shared_memory, flattened_buffer)


@pytest.mark.parametrize("share", SHARING, ids=lambda share: share.__name__)
@pytest.mark.parametrize("name", ["sam", "cgr", "sam-3-steps"])
def test_memory_that_something_else_shares_is_perturbed_and_restored_itself(
    share: Callable[[nn.Parameter, Path], Tensor], name: str, tmp_path: Path
) -> None:
    alone, shared = read_problem(), read_problem()
    weight = shared.model.get_parameter("weight")
    other = share(weight, tmp_path)
    before, address = weight.detach().clone(), weight.data_ptr()
    seen: list[Tensor] = []

    def read() -> Tensor:
        torch.testing.assert_close(other.view_as(weight), weight.detach(), rtol=0, atol=0)
        seen.append(other.view_as(weight).clone())
        return seen[-1]

    shared.model.reads = read
    for problem in (alone, shared):
        regularizer_at(100, problem.model, PENALTIES[name]).backward(problem.closure())
    assert_close(gradients(shared.model), gradients(alone.model))
    assert len(seen) == PENALTIES[name].evaluations_at(100)
    assert not torch.equal(seen[-1], before)
    assert weight.data_ptr() == address
    assert_same_bits({"read": other.view_as(weight)}, {"read": before})
    other.fill_(0.5)
    assert (weight == 0.5).all()
    with torch.no_grad():
        weight.add_(1.0)
    assert (other == 1.5).all()


@contextmanager
def nothing_restored() -> Iterator[None]:
    """A context in which every attempt of restoring is interrupted."""

    def interrupted(self: Perturbation) -> None:
        raise KeyboardInterrupt("while restoring")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Perturbation, "restore", interrupted)
        yield


def load_state_dict(model: nn.Module, name: str, value: Tensor) -> None:
    model.load_state_dict({name: value}, strict=False)


def copy_in_place(model: nn.Module, name: str, value: Tensor) -> None:
    with torch.no_grad():
        model.get_parameter(name).copy_(value)


@pytest.mark.parametrize("load", [load_state_dict, copy_in_place], ids=lambda load: load.__name__)
@pytest.mark.parametrize("loaded", ["weight", "bias"])
@pytest.mark.parametrize("name", ["sam", "cgr"])
def test_weights_loaded_after_a_step_that_was_not_restored_stay_and_others_come_back(
    load: Callable[[nn.Module, str, Tensor], None], loaded: str, name: str
) -> None:
    """One large parameter and one small: whichever is loaded is kept, and the other is what it was before the step."""
    problem, twin = read_problem(), read_problem()
    before = values(problem.model)
    regularizer = regularizer_at(100, problem.model, PENALTIES[name])
    with nothing_restored(), pytest.raises(KeyboardInterrupt, match="while restoring"):
        regularizer.backward(problem.closure())
    assert not any(torch.equal(p, before[n]) for n, p in problem.model.named_parameters()), "the step was to be left perturbed"

    expected = {**before, loaded: torch.full_like(before[loaded], 0.01)}
    load(problem.model, loaded, expected[loaded])
    twin.model.load_state_dict(expected)
    problem.model.zero_grad()
    for each, one in ((regularizer, problem), (regularizer_at(100, twin.model, PENALTIES[name]), twin)):
        each.backward(one.closure())
    assert_same_bits(values(problem.model), expected)
    assert_close(gradients(problem.model), gradients(twin.model), tolerance=0)
    # And so again, now that a parameter may live in what was a buffer.
    problem.model.zero_grad()
    regularizer.backward(problem.closure())
    assert_same_bits(values(problem.model), expected)
