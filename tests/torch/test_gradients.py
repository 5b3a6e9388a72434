"""What stands in ``.grad``: frozen and unused parameters, gradients already present, zero and NaN gradients, parts of the parameters."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from gradreg import ClipEach, GradientPenalty, Unit
from gradreg.torch import GradientRegularizer

from . import twins
from .cases import (
    DURING_WARMUP,
    PENALTIES,
    Problem,
    assert_close,
    assert_same_bits,
    each_trait,
    every_finite_difference,
    every_penalty,
    every_penalty_unperturbed_first,
    gradients,
    plain_gradients,
    regularizer_at,
    tanh_problem,
    values,
)


@every_penalty
def test_frozen_parameters_are_not_touched_nor_counted(penalty: GradientPenalty) -> None:
    problem = tanh_problem()
    problem.model[0].requires_grad_(False)  # type: ignore[index]
    problem.model[0].weight.grad = torch.full((5, 3), 7.0, dtype=torch.float64)  # type: ignore[index]
    theta = twins.parameters_of(problem.model)
    assert list(theta) == ["2.weight", "2.bias"]
    expected = twins.family(
        penalty, twins.loss_of(problem.model, problem.x, problem.y), theta, step=100, places=twins.places_of(problem.model)
    )
    regularizer_at(100, problem.model, penalty).backward(problem.closure())
    actual = gradients(problem.model)
    assert torch.equal(actual.pop("0.weight"), torch.full((5, 3), 7.0, dtype=torch.float64))
    assert problem.model[0].bias.grad is None  # type: ignore[index]
    assert_close(actual, expected)


@every_penalty
def test_parameters_frozen_and_unfrozen_after_construction(penalty: GradientPenalty) -> None:
    problem = tanh_problem()
    problem.model[2].requires_grad_(False)  # type: ignore[index]
    regularizer = regularizer_at(100, problem.model, penalty)
    start = copy.deepcopy(regularizer.state_dict())
    for frozen, trained in ((2, 0), (0, 2)):
        problem.model.zero_grad()
        problem.model[frozen].requires_grad_(False)  # type: ignore[index]
        problem.model[trained].requires_grad_(True)  # type: ignore[index]
        theta = twins.parameters_of(problem.model)
        expected = twins.family(
            penalty, twins.loss_of(problem.model, problem.x, problem.y), theta, step=100, places=twins.places_of(problem.model)
        )
        regularizer.load_state_dict(start)
        regularizer.backward(problem.closure())
        assert_close(gradients(problem.model), expected)


@every_penalty
def test_unused_parameters_keep_no_gradient(penalty: GradientPenalty) -> None:
    if not (penalty.direction.needs_gradient or penalty.direction.has_memory):
        pytest.skip("without any gradient nobody knows which parameters are not used: they are moved too")
    problem = tanh_problem()
    regularizer_at(100, problem.model, penalty).backward(problem.closure())
    expected = gradients(problem.model)
    problem.model.zero_grad()
    problem.model[2].register_parameter("unused", nn.Parameter(torch.ones(4, dtype=torch.float64)))
    regularizer_at(100, problem.model, penalty).backward(problem.closure())
    assert_close(gradients(problem.model), expected, tolerance=0)


@every_penalty
def test_gradients_already_present_are_added_to_and_not_in_the_norm(penalty: GradientPenalty) -> None:
    problem = tanh_problem()
    regularizer = regularizer_at(100, problem.model, penalty)
    regularizer.backward(problem.closure())
    alone, norm = gradients(problem.model), regularizer.metrics["gradient_norm"]
    earlier = {n: 10 * torch.randn_like(p) for n, p in problem.model.named_parameters() if n != "2.bias"}
    for n, p in problem.model.named_parameters():
        p.grad = earlier[n].clone() if n in earlier else None
    regularizer = regularizer_at(100, problem.model, penalty)
    regularizer.backward(problem.closure())
    assert_close(gradients(problem.model), {n: g + earlier[n] if n in earlier else g for n, g in alone.items()})
    assert regularizer.metrics["gradient_norm"] == pytest.approx(norm, rel=1e-12, nan_ok=True)


@every_penalty
def test_a_parameter_shared_by_two_layers_counts_once(penalty: GradientPenalty) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second).double()
    problem = Problem(model, torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64))

    def loss(theta: twins.Parameters) -> Tensor:
        w = theta["0.weight"]
        return nn.functional.mse_loss(torch.tanh(problem.x @ w.T) @ w.T, problem.y)

    expected = twins.family(penalty, loss, twins.parameters_of(model), step=100)
    regularizer_at(100, model, penalty).backward(problem.closure())
    assert_close(gradients(model), expected)


@each_trait
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_have_the_parameters_dtype(penalty: GradientPenalty, dtype: torch.dtype) -> None:
    problem = tanh_problem(dtype)
    regularizer_at(DURING_WARMUP, problem.model, penalty).backward(problem.closure())
    assert all(p.grad is not None and p.grad.dtype == dtype for p in problem.model.parameters())


@every_penalty
def test_parameters_of_two_dtypes(penalty: GradientPenalty) -> None:
    """One norm over both, and each result in its own dtype, as precise as the smaller one allows."""

    def build(dtype: torch.dtype) -> Problem:
        problem = tanh_problem()
        problem.model[2].to(dtype)  # type: ignore[index]
        problem.model[2].register_forward_pre_hook(lambda _, args: (args[0].to(dtype),))  # type: ignore[index]
        problem.y = problem.y.to(dtype)
        return problem

    mixed, double = build(torch.float32), build(torch.float64)
    for problem in (mixed, double):
        regularizer_at(100, problem.model, penalty).backward(problem.closure())
    assert_close({n: g.double() for n, g in gradients(mixed.model).items()}, gradients(double.model), tolerance=1e-5)


@every_penalty_unperturbed_first
def test_zero_gradient_is_finite(penalty: GradientPenalty) -> None:
    """At a stationary point there is no direction: the result is the zero gradient, not 0 / 0."""
    problem = tanh_problem()
    problem.y = problem.model(problem.x).detach()
    before = values(problem.model)
    regularizer = regularizer_at(100, problem.model, penalty)
    regularizer.backward(problem.closure())
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(problem.model).values())
    assert_same_bits(values(problem.model), before)
    assert regularizer.metrics["gradient_norm"] == 0


@every_penalty
def test_nan_gradient_arrives_and_the_parameters_are_restored(penalty: GradientPenalty) -> None:
    problem = tanh_problem()
    problem.y[3, 1] = float("nan")
    before = values(problem.model)
    plain = plain_gradients(problem)
    loss = regularizer_at(100, problem.model, penalty).backward(problem.closure())
    assert loss.isnan()
    for name, g in gradients(problem.model).items():
        assert bool(g[plain[name].isnan()].isnan().all()), name
    assert any(bool(g.isnan().any()) for g in plain.values())
    assert_same_bits(values(problem.model), before)


@every_finite_difference
def test_an_overflow_in_either_pass_shows_in_the_gradient(penalty: GradientPenalty) -> None:
    """So that a ``GradScaler`` skips the step."""
    for overflowing in range(penalty.evaluations_at(100)):
        problem = tanh_problem()
        calls: list[int] = []

        def closure(problem=problem, calls=calls, overflowing=overflowing) -> Tensor:
            calls.append(0)
            return problem.loss() * (float("inf") if len(calls) == overflowing + 1 else 1.0)

        before = values(problem.model)
        regularizer_at(100, problem.model, penalty).backward(closure)
        assert not all(bool(g.isfinite().all()) for g in gradients(problem.model).values())
        assert_same_bits(values(problem.model), before)


@each_trait
@pytest.mark.parametrize("present", [False, True], ids=["no-gradient", "gradient-present"])
def test_part_of_the_parameters(penalty: GradientPenalty, present: bool) -> None:
    """Only the weights are moved and counted; the biases stay in the second pass, and their gradients are combined by the same rule."""
    problem = tanh_problem()
    names = {"0.weight", "2.weight"}
    theta = twins.parameters_of(problem.model)
    expected = twins.family(penalty, twins.loss_of(problem.model, problem.x, problem.y), theta, step=100, perturbed=names)
    if present:
        problem.loss().backward()
        expected = twins.total(expected, gradients(problem.model))
    regularizer = regularizer_at(100, problem.model, penalty, parameters=lambda name, p: p.dim() == 2 and "weight" in name)
    regularizer.backward(problem.closure())
    assert_close(gradients(problem.model), expected)
    norm = twins.norm({n: g for n, g in plain_gradients(problem).items() if n in names}) if penalty.starts_unperturbed_at(100) else math.nan
    assert regularizer.metrics["gradient_norm"] == pytest.approx(float(norm), rel=1e-12, nan_ok=True)


def without_direction(penalty: GradientPenalty, plain: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both passes give the plain gradient; of the normalised one, which unit mixing takes, nothing is left, and clipping clips it."""
    if isinstance(penalty.mixing, ClipEach):
        return twins.limited(plain, penalty.mixing.max_norm)
    return {n: 0.8 * g for n, g in plain.items()} if penalty.mixing == Unit() else plain


@every_penalty
def test_perturbed_parameters_without_a_gradient_are_an_error_at_the_first_step_and_leave_the_plain_one_later(
    penalty: GradientPenalty,
) -> None:
    """The head of another task was selected: nothing is perturbed, and both passes give the plain gradient."""
    problem = tanh_problem()
    problem.model.register_parameter("other_head", nn.Parameter(torch.ones(4, dtype=torch.float64)))
    plain = plain_gradients(problem)
    regularizer = regularizer_at(100, problem.model, penalty, parameters=lambda name, _: "other" in name)
    if penalty.direction.needs_gradient and penalty.difference != "exact":
        with pytest.raises(ValueError, match="closure must reach a perturbed parameter; got a loss that gave none of the 1 a gradient"):
            regularizer.backward(problem.closure())
        assert not gradients(problem.model)
        regularizer.backward(lambda: problem.loss() + problem.model.other_head.sum(), step=100)  # type: ignore[operator]
        problem.model.zero_grad()
        problem.model.other_head.grad = None  # type: ignore[union-attr]
        start = regularizer_at(100, problem.model, penalty).state_dict()
        regularizer.load_state_dict({**start, "step": 100})
    regularizer.backward(problem.closure())
    assert_close(gradients(problem.model), without_direction(penalty, plain))


@every_penalty
def test_selected_parameters_that_are_all_frozen_leave_the_plain_gradient(penalty: GradientPenalty) -> None:
    problem = tanh_problem()
    problem.model[0].requires_grad_(False)  # type: ignore[index]
    plain = plain_gradients(problem)
    regularizer_at(100, problem.model, penalty, parameters=lambda name, _: name.startswith("0.")).backward(problem.closure())
    assert_close(gradients(problem.model), without_direction(penalty, plain))


@pytest.mark.parametrize("name", ["sam", "gnp", "cgr"])
def test_many_steps_without_an_optimizer_leave_the_very_same_weights(name: str) -> None:
    """Adding and subtracting a step would let them drift."""
    problem = tanh_problem(torch.float32)
    before = values(problem.model)
    regularizer = GradientRegularizer(problem.model, PENALTIES[name])
    for _ in range(200):
        problem.model.zero_grad()
        regularizer.backward(problem.closure())
    assert_same_bits(values(problem.model), before)


def test_none_is_plain_training() -> None:
    problem = tanh_problem()
    regularizer = GradientRegularizer(problem.model, None)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    twin = tanh_problem()
    for _ in range(3):
        optimizer.zero_grad()
        regularizer.backward(problem.closure())
        optimizer.step()
        for n, g in plain_gradients(twin).items():
            twin.model.get_parameter(n).data.add_(g, alpha=-0.1)
    assert_same_bits(values(problem.model), values(twin.model))
    assert regularizer.metrics["evaluations"] == 3
