"""Low precision: autocast, loss scales, overflow, and parameters stored in 16 bits."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import gradreg
from gradreg import GradientPenalty
from gradreg.torch import GradientRegularizer
from gradreg.torch.norms import gradient_norm, tensor_norms

from .cases import (
    DURING_WARMUP,
    Problem,
    assert_close,
    assert_same_bits,
    each_trait,
    every_finite_difference,
    every_penalty,
    gradients,
    plain_gradients,
    regularizer_at,
    tanh_problem,
    values,
)

# Weights of the passes that are powers of two, so that weighing a loss before or after rounding is the same.
DYADIC: dict[str, GradientPenalty] = {
    "sam": gradreg.sam(rho=0.5),
    "gnp": gradreg.gnp(r=0.5, alpha=0.5),
    "fgr": gradreg.fgr(gamma=0.25, epsilon=0.5),
    "bgr": gradreg.bgr(gamma=0.5, epsilon=0.5),
    "cgr": gradreg.cgr(gamma=0.5, epsilon=0.5),
}
every_dyadic = pytest.mark.parametrize("penalty", DYADIC.values(), ids=DYADIC)


def autocast_loss(problem: Problem, dtype: torch.dtype) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            output = problem.model(problem.x)
        return nn.functional.mse_loss(output.float(), problem.y)

    return closure


def by_hand(problem: Problem, closure: Callable[[], Tensor], penalty: GradientPenalty) -> dict[str, Tensor]:
    """The regularized gradient from whole gradients, each taken on its own at parameters written there."""
    theta = {n: p.detach().clone() for n, p in problem.model.named_parameters()}

    def gradient_at(step: float) -> dict[str, Tensor]:
        for n, p in problem.model.named_parameters():
            p.data.copy_(theta[n] + step * d[n] if step else theta[n])
        problem.model.zero_grad()
        closure().backward()
        found = gradients(problem.model)
        for n, p in problem.model.named_parameters():
            p.data.copy_(theta[n])
        problem.model.zero_grad()
        return found

    d = theta
    g = gradient_at(0)
    norm = torch.cat([v.flatten() for v in g.values()]).norm() if penalty.power == 1 else 1.0
    d = {n: v / norm for n, v in g.items()}
    r = penalty.radius_at(0)
    c = penalty.coefficient_at(0)
    assert r is not None
    assert c is not None
    if penalty.difference == "central":
        plus, minus = gradient_at(r), gradient_at(-r)
        return {n: g[n] + c / 2 * (plus[n] - minus[n]) for n in g}
    sign = 1 if penalty.difference == "forward" else -1
    moved = gradient_at(sign * r)
    return {n: (1 - sign * c) * g[n] + sign * c * moved[n] for n in g}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@every_dyadic
def test_autocast(penalty: GradientPenalty, dtype: torch.dtype) -> None:
    problem = tanh_problem(torch.float32)
    closure = autocast_loss(problem, dtype)
    expected = by_hand(problem, closure, penalty)
    GradientRegularizer(problem.model, penalty).backward(closure)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in problem.model.parameters())
    # Two passes into one .grad round the sum once more than adding whole gradients does.
    assert_close(gradients(problem.model), expected, tolerance=1e-6)


@pytest.mark.parametrize("power", [1, 2])
def test_exact_under_autocast_is_double_backprop_under_autocast(power: int) -> None:
    problem = tanh_problem(torch.float32)
    closure = autocast_loss(problem, torch.bfloat16)
    loss = closure()
    squared = sum(g.square().sum() for g in torch.autograd.grad(loss, list(problem.model.parameters()), create_graph=True))
    (loss + 0.3 * (squared / 2 if power == 2 else squared.sqrt())).backward()
    expected = gradients(problem.model)
    plain = plain_gradients(problem)
    problem.model.zero_grad()
    GradientRegularizer(problem.model, gradreg.exact(gamma=0.3, power=power)).backward(closure)
    assert_close(gradients(problem.model), expected, tolerance=2e-2)
    correction = max(float((expected[n] - plain[n]).abs().max()) for n in plain)
    assert correction > 0.1 * max(float(g.abs().max()) for g in plain.values())


@every_finite_difference
def test_autocast_around_the_call_does_not_reuse_the_unperturbed_weights_it_cached(penalty: GradientPenalty) -> None:
    problem = tanh_problem(torch.float32)
    regularizer_at(DURING_WARMUP, problem.model, penalty).backward(autocast_loss(problem, torch.bfloat16))
    expected = gradients(problem.model)
    problem.model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        regularizer_at(DURING_WARMUP, problem.model, penalty).backward(autocast_loss(problem, torch.bfloat16))
        later = problem.model(problem.x)
    assert_same_bits(gradients(problem.model), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(later, problem.model(problem.x)), "the weights cached in the last pass must not outlive it"


@every_penalty
def test_a_loss_scale_multiplies_the_gradient_and_nothing_else(penalty: GradientPenalty) -> None:
    problem = tanh_problem()
    loss = regularizer_at(DURING_WARMUP, problem.model, penalty).backward(problem.closure())
    expected = gradients(problem.model)
    problem.model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    regularizer = regularizer_at(DURING_WARMUP, problem.model, penalty)
    scaled = regularizer.backward(problem.closure(), scaler=scaler)
    assert_close(gradients(problem.model), {n: 1024 * g for n, g in expected.items()})
    assert scaled == pytest.approx(float(loss), rel=1e-12)
    norm = torch.cat([g.flatten() for g in plain_gradients(problem).values()]).norm()
    if penalty.starts_unperturbed_at(DURING_WARMUP):
        assert regularizer.metrics.gradient_norm == pytest.approx(float(norm), rel=1e-12)


@every_penalty
def test_a_loss_scale_with_gradients_already_there(penalty: GradientPenalty) -> None:
    problem = tanh_problem()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    regularizer_at(DURING_WARMUP, problem.model, penalty).backward([problem.closure(slice(0, 4))], scaler=scaler)
    first = gradients(problem.model)
    problem.model.zero_grad()
    regularizer_at(DURING_WARMUP, problem.model, penalty).backward([problem.closure(slice(4, 8))], scaler=scaler)
    second = gradients(problem.model)
    problem.model.zero_grad()
    for rows in (slice(0, 4), slice(4, 8)):
        regularizer_at(DURING_WARMUP, problem.model, penalty).backward(problem.closure(rows), scaler=scaler)
    assert_close(gradients(problem.model), {n: first[n] + second[n] for n in first})


@every_penalty
def test_unscale_clip_and_step_work_as_always(penalty: GradientPenalty) -> None:
    problem, twin = tanh_problem(), tanh_problem()
    plain = torch.optim.SGD(twin.model.parameters(), lr=0.1)
    regularizer_at(DURING_WARMUP, twin.model, penalty).backward(twin.closure())
    nn.utils.clip_grad_norm_(twin.model.parameters(), 0.5)
    plain.step()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    regularizer_at(DURING_WARMUP, problem.model, penalty).backward(problem.closure(), scaler=scaler)
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(problem.model.parameters(), 0.5)
    scaler.step(optimizer)
    scaler.update()
    assert_close(values(problem.model), values(twin.model))


@pytest.mark.parametrize("overflowing", [0, 1])
@each_trait
def test_an_overflow_in_any_pass_skips_the_whole_step(penalty: GradientPenalty, overflowing: int) -> None:
    problem = tanh_problem(torch.float32)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before, calls = values(problem.model), []

    def closure() -> Tensor:
        calls.append(all(torch.isfinite(p).all() for p in problem.model.parameters()))
        return problem.loss() * (1e36 if len(calls) == overflowing + 1 else 1.0)

    regularizer = regularizer_at(DURING_WARMUP, problem.model, penalty)
    loss = regularizer.backward(closure, scaler=scaler)
    evaluated = len(calls)
    assert all(calls), "no pass runs at parameters that are not finite"
    assert torch.isfinite(loss)
    if evaluated <= overflowing:
        return  # a penalty of one call has no second pass
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15
    assert_same_bits(values(problem.model), before)
    assert not optimizer.state_dict()["state"]


def test_an_overflow_leaves_the_batch_statistics_finite() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    problem = Problem(model, torch.randn(8, 3), torch.randn(8, 2))
    regularizer = GradientRegularizer(model, gradreg.sam(rho=0.1), freeze_batch_statistics=False)
    regularizer.backward(lambda: problem.loss() * 1e36, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16))
    assert all(torch.isfinite(value).all() for value in values(model).values())


@pytest.mark.parametrize("micro_batches", [1, 4])
@each_trait
def test_accelerate_with_a_scaler_and_accumulation_is_the_scaled_big_batch(penalty: GradientPenalty, micro_batches: int) -> None:
    problem = tanh_problem()
    regularizer_at(DURING_WARMUP, problem.model, penalty).backward(problem.closure())
    expected = {n: 256 * g for n, g in gradients(problem.model).items()}
    problem.model.zero_grad()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    rows = 8 // micro_batches
    closures = [problem.closure(slice(i * rows, (i + 1) * rows)) for i in range(micro_batches)]
    regularizer = regularizer_at(DURING_WARMUP, problem.model, penalty)
    regularizer.backward(closures, backward=accelerator.backward, scaler=accelerator.scaler)
    assert_close(gradients(problem.model), expected)


@pytest.mark.parametrize("penalty", [gradreg.fgr(gamma=0.1, epsilon=0.1), gradreg.cgr(gamma=0.1, epsilon=0.1), gradreg.exact(gamma=0.1)])
def test_a_scale_that_is_not_announced_is_refused_where_it_would_matter(penalty: GradientPenalty) -> None:
    problem = tanh_problem()
    before = values(problem.model)
    with pytest.raises(ValueError, match=r"multiplies it by 256.*Pass scaler=accelerator\.scaler"):
        GradientRegularizer(problem.model, penalty).backward(problem.closure(), backward=lambda loss: (256.0 * loss).backward())
    assert_same_bits(values(problem.model), before)


def test_a_scale_that_is_not_announced_is_harmless_to_a_normalised_direction() -> None:
    problem = tanh_problem()
    GradientRegularizer(problem.model, gradreg.sam(rho=0.3)).backward(problem.closure())
    expected = gradients(problem.model)
    problem.model.zero_grad()
    GradientRegularizer(problem.model, gradreg.sam(rho=0.3)).backward(problem.closure(), backward=lambda loss: (256.0 * loss).backward())
    assert_close(gradients(problem.model), {n: 256 * g for n, g in expected.items()})


def test_a_scaler_without_scale_is_refused() -> None:
    problem = tanh_problem()
    with pytest.raises(TypeError, match=r"scaler must have a method scale\(tensor\); got 65536"):
        GradientRegularizer(problem.model, gradreg.sam()).backward(problem.closure(), scaler=65536.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@each_trait
def test_parameters_in_16_bits_come_back_bit_for_bit(penalty: GradientPenalty, dtype: torch.dtype) -> None:
    problem = tanh_problem(dtype)
    before = {n: v.view(torch.int16) for n, v in values(problem.model).items()}
    regularizer_at(DURING_WARMUP, problem.model, penalty).backward(problem.closure())
    assert all(p.grad is not None and p.grad.dtype == dtype for p in problem.model.parameters())
    assert_same_bits({n: v.view(torch.int16) for n, v in values(problem.model).items()}, before)


def test_a_perturbation_lost_to_rounding_is_reported_once_with_its_cosine_and_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256)).bfloat16()
    problem = Problem(model, torch.randn(16, 256).bfloat16(), torch.randn(16, 256).bfloat16())
    regularizer = GradientRegularizer(model, gradreg.sam(rho=0.002))
    with pytest.warns(UserWarning, match=r"bfloat16 parameters round the perturbation: its cosine .* is 0\.\d\d and its norm \d\.\d\d"):
        regularizer.backward(problem.closure())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regularizer.backward(problem.closure())
        GradientRegularizer(model, gradreg.sam(rho=1.0)).backward(problem.closure())


def test_frozen_parameters_in_16_bits_beside_trainable_ones_in_32_are_no_reason_to_warn() -> None:
    problem = tanh_problem(torch.float32)
    problem.model.register_parameter("frozen", nn.Parameter(torch.ones(4, dtype=torch.bfloat16), requires_grad=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GradientRegularizer(problem.model, gradreg.sam(rho=1e-4)).backward(problem.closure())


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda flat: flat,
    "matrix": lambda flat: flat.view(2048, -1),
    "transposed": lambda flat: flat.view(2048, -1).T,
    "channels_last": lambda flat: flat.view(-1, 16, 4, 4).to(memory_format=torch.channels_last),
    "every other": lambda flat: torch.stack([flat, flat], 1)[:, 0],
    "complex": lambda flat: torch.view_as_complex(flat.view(-1, 2)),
    "bf16": lambda flat: flat.bfloat16(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_sum_of_squares_on_a_cpu_is_accurate(layout: str) -> None:
    """Added up one after the other in float32, as by PyTorch's own norm, they are off by 8e-5, and by 8e-4 where all are equal."""
    draw = torch.Generator().manual_seed(0)
    for flat, within in ((torch.randn(1 << 22, generator=draw), 4e-6), (torch.full((1 << 22,), 0.3), 1e-4)):
        given = LAYOUTS[layout](flat)
        wide = given.to(torch.complex128 if given.is_complex() else torch.float64)
        expected = float(torch.linalg.vector_norm(wide))
        assert float(gradient_norm([given, torch.ones(3, dtype=given.dtype)])) == pytest.approx((expected**2 + 3) ** 0.5, rel=within)
        assert float(tensor_norms([given], [given])[0]) == pytest.approx(expected, rel=4e-3 if layout == "bf16" else within)


def test_what_is_large_and_not_finite_is_told() -> None:
    flat = torch.ones(1 << 20)
    for wrong in (torch.nan, torch.inf, -torch.inf):
        flat[77_777] = wrong
        assert not torch.isfinite(gradient_norm([flat]))
    assert float(gradient_norm([torch.full((1 << 20,), 1e-25)])) == pytest.approx(2.0**10 * 1e-25, rel=1e-6), "whose squares underflow"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_norm_of_16_bit_gradients_is_summed_in_32(dtype: torch.dtype) -> None:
    many = [torch.full((10_000,), 100.0, dtype=dtype) for _ in range(100)]
    norm = gradient_norm(many)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(100.0 * 1000.0, rel=1e-6), "in float16 this is infinite, in bfloat16 off by up to 0.4 %"
    assert float(gradient_norm([*many, torch.ones(3)])) == pytest.approx(1e5, rel=1e-6)
