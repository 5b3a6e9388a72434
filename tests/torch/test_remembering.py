"""What penalties remember: no earlier gradients, no loss scales, no overflows, nothing of a step that failed."""

import pytest
import torch
from torch import Tensor

import gradreg
from gradreg.torch import GradientRegularizer
from gradreg.torch.state import own_names

from . import twins
from .cases import assert_close, assert_same_bits, gradients, tanh_problem

MEMORIES = {
    "friendly": gradreg.friendly_sam(rho=0.3, sigma=0.7, beta=0.6),
    "remembered": gradreg.remembered(epsilon=0.3, decay=0.4),
    "sparse": gradreg.sam(rho=0.5).sparse(0.4, every=3),
    "looksam": gradreg.looksam(rho=0.4, k=3, a=0.7),
}


@pytest.mark.parametrize("name", MEMORIES)
def test_a_gradient_that_was_there_before_enters_no_memory(name: str) -> None:
    with_earlier, without = tanh_problem(), tanh_problem()
    ours, twin = (GradientRegularizer(problem.model, MEMORIES[name]) for problem in (with_earlier, without))
    for _ in range(4):
        for problem, regularizer in ((with_earlier, ours), (without, twin)):
            for p in problem.model.parameters():
                p.grad = torch.full_like(p, 7.0) if problem is with_earlier else None
            regularizer.backward(problem.closure())
        assert_close({n: g - 7.0 for n, g in gradients(with_earlier.model).items()}, gradients(without.model), tolerance=1e-12)


@pytest.mark.parametrize("overflowing", [0, 1])
@pytest.mark.parametrize("name", MEMORIES)
def test_an_overflow_leaves_the_memory_finite_and_without_the_loss_scale(name: str, overflowing: int) -> None:
    """After it, training goes on as with a regularizer that never saw the overflow, at another loss scale."""
    problem, scaler = tanh_problem(torch.float32), torch.amp.GradScaler("cpu", init_scale=1024.0)
    regularizer = GradientRegularizer(problem.model, MEMORIES[name])
    for _ in range(3):
        problem.model.zero_grad()
        regularizer.backward(problem.closure(), scaler=scaler)
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(0)
        return problem.loss() * (1e38 if len(calls) == overflowing + 1 else 1.0)

    state = {
        kind: {n: t.clone() for n, t in found.items()} for kind, found in regularizer.state_dict()["memory"].items() if kind != "period"
    }
    problem.model.zero_grad()
    regularizer.backward(closure, scaler=scaler)
    for kind, found in regularizer.state_dict()["memory"].items():
        if kind == "period":
            continue
        assert all(bool(torch.isfinite(t).all()) for t in found.values())
        if len(calls) > overflowing and overflowing == 0:
            assert_same_bits(found, state[kind])
    plain = tanh_problem(torch.float32)
    unscaled = GradientRegularizer(plain.model, MEMORIES[name])
    for _ in range(3):
        plain.model.zero_grad()
        unscaled.backward(plain.closure())
    for kind, found in state.items():
        for n, tensor in unscaled.state_dict()["memory"][kind].items():
            torch.testing.assert_close(found[n], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MEMORIES)
def test_an_exception_leaves_the_memory_as_it_was(name: str) -> None:
    problem, twin = tanh_problem(), tanh_problem()
    ours, theirs = (GradientRegularizer(p.model, MEMORIES[name]) for p in (problem, twin))

    def failing(loss: Tensor) -> None:
        raise KeyboardInterrupt("injected")

    for step in range(4):
        problem.model.zero_grad()
        twin.model.zero_grad()
        if step in (0, 2):
            with pytest.raises(KeyboardInterrupt, match="injected"):
                ours.backward(problem.closure(), backward=failing)
        ours.backward(problem.closure())
        theirs.backward(twin.closure())
        assert_same_bits(gradients(problem.model), gradients(twin.model))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_average_of_gradients_in_16_bits_reaches_what_it_averages(dtype: torch.dtype) -> None:
    """A hundredth of the way a step would be rounded away in bfloat16 long before."""
    model, x = torch.nn.Linear(2, 1, bias=False).to(dtype), torch.tensor([[1.0, 1.25]], dtype=dtype)
    regularizer = GradientRegularizer(model, gradreg.friendly_sam(rho=1.0, beta=0.99))
    for _ in range(1000):
        model.zero_grad()
        regularizer.backward(lambda: model(x).sum())
    torch.testing.assert_close(regularizer.state_dict()["memory"]["average"]["weight"], x.float(), rtol=1e-3, atol=0)


def test_nothing_stays_of_a_parameter_that_only_a_failed_step_used() -> None:
    problem = tanh_problem()
    problem.model[2].register_parameter("extra", torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))  # type: ignore[index]
    regularizer, calls = GradientRegularizer(problem.model, MEMORIES["friendly"]), []

    def closure() -> Tensor:
        calls.append(0)
        return problem.loss() + problem.model[2].extra.square().sum() if len(calls) == 1 else torch.zeros(2)  # type: ignore[index]

    with pytest.raises(ValueError, match="closure must return a scalar loss"):
        regularizer.backward(closure)
    regularizer.backward(problem.closure())
    average = regularizer.state_dict()["memory"]["average"]
    assert not average["2.extra"].any()
    assert average["2.weight"].any()


@pytest.mark.parametrize("name", MEMORIES)
def test_a_state_without_its_memory_or_with_another_s_is_refused(name: str) -> None:
    regularizer = GradientRegularizer(tanh_problem().model, MEMORIES[name])
    with pytest.raises(ValueError, match=r"state must have the keys step and evaluations and memory; got \['evaluations', 'step'\]"):
        regularizer.load_state_dict({"step": 1, "evaluations": 2})
    with pytest.raises(ValueError, match=r"memory must hold \w+ and period; got \['period'\]"):
        regularizer.load_state_dict({"step": 1, "evaluations": 2, "memory": {"period": 0}})
    state = regularizer.state_dict()
    (kind,) = set(state["memory"]) - {"period"}
    for bad, message in (
        ({"0.weigth": torch.zeros(5, 3)}, "unknown parameter in memory .* '0.weigth'. Did you mean '0.weight'"),
        ({"0.weight": torch.zeros(4, 3)}, r"of '0.weight' must have the shape \(5, 3\); got \(4, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            regularizer.load_state_dict({**state, "memory": {**state["memory"], kind: bad}})
    assert regularizer.step == 0


def test_a_remembered_direction_forgets_nothing_in_a_warm_up() -> None:
    """What is remembered takes in the plain gradient of steps at which the penalty does not act."""
    penalty = gradreg.remembered(epsilon=0.3, decay=0.0).every(2)
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, penalty)
    for _ in range(3):  # plain for want of a memory, plain, and along what was remembered of the second
        problem.model.zero_grad()
        regularizer.backward(problem.closure())
    theta, loss = twins.parameters_of(problem.model), twins.loss_of(problem.model, problem.x, problem.y)
    assert_close(gradients(problem.model), twins.fgr(loss, theta, 0.3, 0.3))


def wrapped(model: torch.nn.Module, by: str) -> torch.nn.Module:
    if by == "compile":
        return torch.compile(model)  # type: ignore[return-value]
    if by == "compiled part":
        model[0] = torch.compile(model[0])  # type: ignore[index, assignment]
        return model
    if by == "data parallel":
        return torch.nn.DataParallel(model)
    return torch.compile(torch.nn.DataParallel(model))  # type: ignore[return-value]


@pytest.mark.parametrize("by", ["compile", "compiled part", "data parallel", "both"])
@pytest.mark.parametrize("name", MEMORIES)
def test_the_names_in_a_state_are_the_models_own_whatever_wraps_it(name: str, by: str) -> None:
    """What is saved bare loads wrapped, and the other way round; so do states of earlier versions, which had the wrappers' names."""
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, MEMORIES[name])
    for _ in range(2):
        problem.model.zero_grad()
        regularizer.backward(problem.closure())
    saved = regularizer.state_dict()
    outside = wrapped(tanh_problem().model, by)
    around = GradientRegularizer(outside, MEMORIES[name])
    around.load_state_dict(saved)
    assert {k: set(v) for k, v in around.state_dict()["memory"].items() if k != "period"} == {
        k: set(v) for k, v in saved["memory"].items() if k != "period"
    }
    theirs = [n for n, _ in outside.named_parameters()]
    old = {**saved, "memory": {k: v if k == "period" else dict(zip(theirs, v.values(), strict=True)) for k, v in saved["memory"].items()}}
    for state in (around.state_dict(), old):
        bare = GradientRegularizer(tanh_problem().model, MEMORIES[name])
        bare.load_state_dict(state)
        for kind, tensors in saved["memory"].items():
            if kind != "period":
                assert_same_bits(bare.state_dict()["memory"][kind], tensors)


def test_a_models_own_parts_may_be_called_as_wrappers_call_theirs() -> None:
    inner = torch.nn.ModuleDict({"module": torch.nn.Linear(1, 1, bias=False), "_orig_mod": torch.nn.Linear(1, 1, bias=False)})
    assert set(own_names(inner).values()) == {"module.weight", "weight"}
    outer = torch.nn.ModuleDict(
        {"_orig_mod": torch.nn.Linear(1, 1, bias=False), "_checkpoint_wrapped_module": torch.nn.Linear(1, 1, bias=False)}
    )
    assert own_names(outer) == {p: name for name, p in outer.named_parameters()}
