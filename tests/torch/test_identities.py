"""Every penalty against the papers' formulas on a problem that is no quadratic, and the points where one method is another."""

import pytest
import torch

import gradreg
from gradreg import GradientPenalty
from gradreg.torch import GradientRegularizer

from . import twins
from .cases import (
    DURING_WARMUP,
    Problem,
    assert_close,
    assert_same_bits,
    every_penalty,
    gradients,
    plain_gradients,
    regularizer_at,
    tanh_problem,
    values,
)


def regularized(penalty: GradientPenalty | None, step: int = 0) -> dict[str, torch.Tensor]:
    problem = tanh_problem()
    regularizer_at(step, problem.model, penalty).backward(problem.closure())
    return gradients(problem.model)


def oracle(problem: Problem) -> tuple[twins.Loss, twins.Parameters]:
    return twins.loss_of(problem.model, problem.x, problem.y), twins.parameters_of(problem.model)


@pytest.mark.parametrize("rho", [0.1, 1.0])
def test_sam_twin(rho: float) -> None:
    assert_close(regularized(gradreg.sam(rho=rho)), twins.sam(*oracle(tanh_problem()), rho))


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 1.5])
def test_gnp_twin(alpha: float) -> None:
    assert_close(regularized(gradreg.gnp(r=0.3, alpha=alpha)), twins.gnp(*oracle(tanh_problem()), 0.3, alpha))


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 1.5])
def test_unit_mixing_twin(alpha: float) -> None:
    assert_close(regularized(gradreg.gnp(r=0.3, alpha=alpha, mixing="unit")), twins.gnp_unit(*oracle(tanh_problem()), 0.3, alpha))


@pytest.mark.parametrize(("gamma", "epsilon"), [(0.3, 0.3), (0.1, 0.4), (0.5, 0.2)])
@pytest.mark.parametrize("name", ["fgr", "bgr", "cgr"])
def test_squared_twins(name: str, gamma: float, epsilon: float) -> None:
    penalty = getattr(gradreg, name)(gamma=gamma, epsilon=epsilon)
    assert_close(regularized(penalty), getattr(twins, name)(*oracle(tanh_problem()), gamma, epsilon))


@pytest.mark.parametrize("power", [1, 2])
def test_double_backprop_twin_differentiates_the_penalty_itself(power: int) -> None:
    actual = regularized(gradreg.exact(gamma=0.3, power=power))
    assert_close(actual, twins.double_backprop(*oracle(tanh_problem()), 0.3, power))


@every_penalty
@pytest.mark.parametrize("step", [DURING_WARMUP, 100])
def test_every_penalty_is_its_entry_of_the_table(penalty: GradientPenalty, step: int) -> None:
    assert_close(regularized(penalty, step), twins.family(penalty, *oracle(tanh_problem()), step=step))


@every_penalty
def test_every_penalty_changes_the_gradient(penalty: GradientPenalty) -> None:
    """The other tests of this file mean something only if this holds."""
    places = []
    for either in (None, penalty):
        problem = tanh_problem()
        start, optimizer = values(problem.model), torch.optim.SGD(problem.model.parameters(), lr=0.05)
        regularizer = regularizer_at(3, problem.model, either)
        for _ in range(2):  # some begin with a step without a penalty, or with nothing to remember
            optimizer.zero_grad()
            regularizer.backward(problem.closure())
            optimizer.step()
            regularizer.decoupled_step(optimizer)
        places.append({name: value - start[name] for name, value in values(problem.model).items()})
    plain, other = places
    change = max(float((other[name] - way).abs().max()) for name, way in plain.items())
    assert change > 0.02 * max(float(way.abs().max()) for way in plain.values())


def test_alpha_one_is_sam() -> None:
    assert_same_bits(regularized(gradreg.gnp(r=0.3, alpha=1.0)), regularized(gradreg.sam(rho=0.3)))
    assert_same_bits(regularized(gradreg.gnp(r=0.3, alpha=1.0, mixing="unit")), regularized(gradreg.sam(rho=0.3)))


def test_sam_is_fgr_with_both_steps_rho_over_the_norm() -> None:
    norm = float(twins.norm(plain_gradients(tanh_problem())))
    assert_close(regularized(gradreg.sam(rho=0.3)), regularized(gradreg.fgr(gamma=0.3 / norm, epsilon=0.3 / norm)))


def test_gnp_is_fgr_with_lambda_and_r_over_the_norm() -> None:
    norm = float(twins.norm(plain_gradients(tanh_problem())))
    r, alpha = 0.3, 0.8
    assert_close(regularized(gradreg.gnp(r=r, alpha=alpha)), regularized(gradreg.fgr(gamma=alpha * r / norm, epsilon=r / norm)))


def test_unnormalised_sam_is_fgr_with_gamma_epsilon() -> None:
    problem, rho = tanh_problem(), 0.4
    loss, theta = oracle(problem)
    expected = torch.func.grad(loss)(twins.plus(theta, rho, torch.func.grad(loss)(theta)))
    assert_close(regularized(gradreg.fgr(gamma=rho, epsilon=rho)), expected)


@pytest.mark.parametrize(
    "penalty",
    [
        None,
        gradreg.gnp(r=0.3, alpha=0.0),
        gradreg.fgr(gamma=0.0, epsilon=0.4),
        gradreg.bgr(gamma=0.0, epsilon=0.4),
        gradreg.cgr(gamma=0.0, epsilon=0.4),
        gradreg.exact(gamma=0.0),
        gradreg.sam(rho=0.3).warmup("zero", steps=5),
        gradreg.exact(gamma=0.3).warmup("zero", steps=5),
    ],
    ids=str,
)
@pytest.mark.parametrize("step", [0, 4])
def test_strength_zero_is_the_plain_gradient_bit_for_bit(penalty: GradientPenalty | None, step: int) -> None:
    assert_same_bits(regularized(penalty, step), plain_gradients(tanh_problem()))


@pytest.mark.parametrize("kind", ["radius", "strength"])
def test_ramps_begin_at_the_plain_gradient(kind) -> None:
    penalty = gradreg.gnp(r=0.3, alpha=0.8).warmup(kind, steps=5)
    assert_same_bits(regularized(penalty, step=0), plain_gradients(tanh_problem()))
    full = regularized(gradreg.gnp(r=0.3, alpha=0.8))
    assert_close(regularized(penalty, step=5), full)


def test_flooding_alternates_fgr_and_bgr() -> None:
    """A step of size η below the flood level and one above it move θ by −η²·ΔR, with ΔR the gradient that F-GR or B-GR adds."""
    eta = 0.05

    def moved(first_sign: int) -> dict[str, torch.Tensor]:
        problem = tanh_problem()
        start = twins.parameters_of(problem.model)
        for sign in (first_sign, -first_sign):
            for name, g in plain_gradients(problem).items():
                problem.model.get_parameter(name).data.sub_(sign * eta * g)
        return {name: p.detach() - start[name] for name, p in problem.model.named_parameters()}

    for first_sign, build in ((-1, gradreg.fgr), (+1, gradreg.bgr)):
        plain, strong = plain_gradients(tanh_problem()), regularized(build(gamma=1.0, epsilon=eta))
        expected = {name: -(eta**2) * (strong[name] - plain[name]) for name in plain}
        assert_close(moved(first_sign), expected, tolerance=1e-9)


def test_losses_returned_are_the_first_pass() -> None:
    problem = tanh_problem()
    plain = problem.loss().detach()
    for penalty in (gradreg.sam(rho=1.0), gradreg.gnp(r=1.0, alpha=0.5), gradreg.cgr(gamma=0.5, epsilon=0.5), gradreg.exact(gamma=1.0)):
        loss = GradientRegularizer(problem.model, penalty).backward(problem.closure())
        assert torch.equal(loss, plain)
        assert not loss.requires_grad


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_loss_of_one_element_is_a_scalar(shape: tuple[int, ...]) -> None:
    problem = tanh_problem()
    loss = GradientRegularizer(problem.model, gradreg.sam(rho=0.3)).backward(lambda: problem.loss().reshape(shape))
    assert loss.shape == ()
    assert_close(gradients(problem.model), regularized(gradreg.sam(rho=0.3)))
