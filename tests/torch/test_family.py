"""Every relative against its paper, transcribed, over five steps of SGD with momentum; and the points where one is another."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad

import gradreg
from gradreg import (
    Adaptive,
    EmaDirection,
    Friendly,
    GradientPenalty,
    Reuse,
    Sparse,
    SurrogateGap,
)
from gradreg.torch import GradientRegularizer

from . import twins
from .cases import assert_close, gradients, regularizer_at, tanh_problem, values

STEPS, RATE, MOMENTUM = 5, 0.1, 0.9
MATRICES = ("0.weight", "2.weight")
TwinStep = Callable[[twins.Loss, twins.Parameters, int], twins.Parameters]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(8, n, dtype=torch.float64, generator=generator) for n in (3, 2))
    return x, 2 * y


def trained(penalty: GradientPenalty | None) -> list[dict[str, Tensor]]:
    """The parameters after each step, by the engine and ``torch.optim.SGD``."""
    model, places = tanh_problem().model, []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    regularizer = GradientRegularizer(model, penalty)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        regularizer.backward(lambda x=x, y=y: nn.functional.mse_loss(model(x), y))
        optimizer.step()
        regularizer.decoupled_step(optimizer)
        places.append(values(model))
    return places


def trained_twin(gradient: TwinStep, beside: TwinStep | None = None) -> list[dict[str, Tensor]]:
    """The same with ``gradient`` in the place of the engine's and the optimizer written out; ``beside`` is subtracted beside it."""
    model = tanh_problem().model
    theta, places = twins.parameters_of(model), []
    momentum = twins.scaled(0.0, theta)
    for step in range(STEPS):
        loss = twins.loss_of(model, *batch(step))
        extra = None if beside is None else beside(loss, theta, step)
        momentum = twins.total(twins.scaled(MOMENTUM, momentum), gradient(loss, theta, step))
        theta = twins.plus(theta, -RATE, momentum)
        theta = theta if extra is None else twins.plus(theta, -RATE, extra)
        places.append(theta)
    return places


def remembering(step: Callable[..., tuple[twins.Parameters, twins.Parameters]]) -> TwinStep:
    """A twin that hands what it returns beside the gradient to its next call."""
    state: dict[str, Any] = {}

    def gradient(loss: twins.Loss, theta: twins.Parameters, number: int) -> twins.Parameters:
        result, state["m"] = step(loss, theta, number, state.get("m", twins.scaled(0.0, theta)))
        return result

    return gradient


def remembered(loss: twins.Loss, theta: twins.Parameters, _: int, m: twins.Parameters) -> tuple[twins.Parameters, twins.Parameters]:
    """∇L(θ + ε·m), m ← 0.4·m + 0.6·G."""
    result = grad(loss)(twins.plus(theta, 0.3, m))
    return result, twins.total(twins.scaled(0.4, m), twins.scaled(0.6, result))


def msam(loss: twins.Loss, theta: twins.Parameters, _: int, v: twins.Parameters) -> tuple[twins.Parameters, twins.Parameters]:
    """Becker et al. 2024, algorithm 1: g = ∇L(θ − ρ·v/‖v‖), v ← μ·v + g, the momentum of SGD itself."""
    length = twins.norm(v)
    result = grad(loss)(twins.plus(theta, -0.3 / length, v) if length > 0 else theta)
    return result, twins.total(twins.scaled(MOMENTUM, v), result)


def sparse(loss: twins.Loss, theta: twins.Parameters, step: int, mask: twins.Parameters) -> tuple[twins.Parameters, twins.Parameters]:
    """Mi et al. 2022, algorithm 1, the batch's gradient for the Fisher information: ∇L(θ + m ⊙ ρ·g/‖g‖), m chosen at steps 0, 3, ..."""
    g = grad(loss)(theta)
    mask = twins.largest_of(g, 0.6) if step % 3 == 0 else mask
    return grad(loss)(plus_masked(theta, 0.5 / twins.norm(g), g, mask)), mask


def plus_masked(theta: twins.Parameters, factor: Tensor, g: twins.Parameters, mask: twins.Parameters) -> twins.Parameters:
    return twins.plus(theta, factor, {name: mask[name] * v for name, v in g.items()})


def random_direction(loss: twins.Loss, theta: twins.Parameters, step: int) -> twins.Parameters:
    """∇L(θ + ρ·s/‖s‖)."""
    s = {name: twins.draw_signs(1, step, place, v.numel()).view_as(v) for place, (name, v) in enumerate(theta.items())}
    return grad(loss)(twins.plus(theta, 0.5 / twins.norm(s), s))


def three_steps(loss: twins.Loss, theta: twins.Parameters, _: int) -> twins.Parameters:
    """∇L at the end of three normalised ascent steps of ρ / 3."""
    at = theta
    for _ in range(3):
        g = grad(loss)(at)
        at = twins.plus(at, 0.5 / 3 / twins.norm(g), g)
    return grad(loss)(at)


def sharpness(loss: twins.Loss, theta: twins.Parameters, _: int) -> twins.Parameters:
    """γ/(1 − γ)·(g₂ − g) of Yue et al. 2023, γ = 0.6."""
    there, g = twins.sam(loss, theta, 0.3), grad(loss)(theta)
    return twins.scaled(0.6 / 0.4, twins.total(there, twins.scaled(-1.0, g)))


TWINS: dict[str, tuple[GradientPenalty, TwinStep, TwinStep | None]] = {
    "asam": (gradreg.asam(rho=0.6, eta=0.1), lambda f, at, _: twins.asam(f, at, 0.6, 0.1, MATRICES), None),
    "asam, all": (
        gradreg.asam(rho=0.6, eta=0.1, one_dimensional=True),
        lambda f, at, _: twins.asam(f, at, 0.6, 0.1, list(at)),
        None,
    ),
    "layerwise": (gradreg.layerwise_sam(rho=0.4, eta=0.1), lambda f, at, _: twins.layerwise(f, at, 0.4, 0.1, MATRICES), None),
    "le_sam": (gradreg.le_sam(sigma=0.5, rho_max=9.0), lambda f, at, _: twins.le_sam(f, at, 0.5, 9.0), None),
    "le_sam, annealed": (
        gradreg.le_sam(sigma=gradreg.Anneal(value=0.5, start=1, steps=3), rho_max=0.4),
        lambda f, at, step: twins.le_sam(f, at, [0.5, 0.5, 0.375, 0.125, 0.0][step], 0.4) if step < 4 else grad(f)(at),
        None,
    ),
    "unified": (gradreg.unified_sam(rho=0.3), lambda f, at, step: twins.unified_sam(f, at, 0.3, 1 - 1 / (step + 1)), None),
    "unified, 1/t": (gradreg.unified_sam(rho=0.3, lam="1/t"), lambda f, at, step: twins.unified_sam(f, at, 0.3, 1 / (step + 1)), None),
    "mup2": (gradreg.mup2_sam(rho=0.4), lambda f, at, _: twins.mup2(f, at, 0.4), None),
    "friendly": (
        gradreg.friendly_sam(rho=0.3, sigma=0.7, beta=0.6),
        remembering(lambda f, at, _, m: twins.friendly(f, at, m, 0.3, 0.7, 0.6)),
        None,
    ),
    "remembered": (gradreg.remembered(epsilon=0.3, decay=0.4), remembering(remembered), None),
    "msam": (gradreg.msam(rho=0.3, decay=MOMENTUM), remembering(msam), None),
    "fgr, clipped": (gradreg.fgr(gamma=0.3, epsilon=0.5, clip=0.1), lambda f, at, _: twins.fgr_clipped(f, at, 0.3, 0.5, 0.1), None),
    "random": (gradreg.random_sam(rho=0.5, seed=1), random_direction, None),
    "sparse": (gradreg.sam(rho=0.5).sparse(0.4, every=3), remembering(sparse), None),
    "three steps": (gradreg.sam(rho=0.5, steps=3), three_steps, None),
    "gsam": (gradreg.gsam(rho=0.3, a=0.4), lambda f, at, _: twins.gsam(f, at, 0.3, 0.4), None),
    "wsam": (gradreg.wsam(rho=0.3, gamma=0.6), lambda f, at, _: twins.gnp(f, at, 0.3, 0.6 / 0.4), None),
    "wsam, decoupled": (gradreg.wsam(rho=0.3, gamma=0.6, decoupled=True), lambda f, at, _: grad(f)(at), sharpness),
    "looksam": (
        gradreg.looksam(rho=0.4, k=3, a=0.7),
        remembering(lambda f, at, step, g_v: twins.looksam(f, at, step, g_v, 0.4, 3, 0.7)),
        None,
    ),
    "every third": (
        gradreg.sam(rho=0.5).every(3),
        lambda f, at, step: twins.sam(f, at, 0.5) if step % 3 == 0 else grad(f)(at),
        None,
    ),
    "every third, compensated": (
        gradreg.gnp(r=0.5, alpha=0.2).every(3, compensate=True),
        lambda f, at, step: twins.gnp(f, at, 0.5, 0.6) if step % 3 == 0 else grad(f)(at),
        None,
    ),
}


@pytest.mark.parametrize("name", TWINS)
def test_five_steps_as_in_the_paper(name: str) -> None:
    penalty, gradient, beside = TWINS[name]
    for ours, theirs in zip(trained(penalty), trained_twin(gradient, beside), strict=True):
        assert_close(ours, theirs, tolerance=1e-12)


@pytest.mark.parametrize("name", TWINS)
def test_the_five_steps_are_not_those_of_sam(name: str) -> None:
    """The test above means something only if this holds."""
    sam, other = trained(gradreg.sam(rho=0.5))[-1], trained(TWINS[name][0])[-1]
    assert max(float((other[n] - sam[n]).abs().max()) for n in sam) > 1e-4


SAM = gradreg.sam(rho=0.4)
REDUCTIONS: dict[str, tuple[GradientPenalty, GradientPenalty]] = {
    "layerwise with huge eta": (gradreg.layerwise_sam(rho=0.4 / 1e9, eta=1e9, one_dimensional=True), SAM),
    "asam with huge eta: T is constant": (gradreg.asam(rho=0.4 / 1e9, eta=1e9, one_dimensional=True), SAM),
    "le_sam at its cap": (gradreg.le_sam(sigma=1e6, rho_max=0.4), SAM),
    "unified, lambda 1": (gradreg.unified_sam(rho=0.4, lam=1), SAM),
    "unified, lambda 0": (gradreg.unified_sam(rho=0.4, lam=0.0), gradreg.fgr(gamma=0.4, epsilon=0.4)),
    "friendly, sigma 0": (gradreg.friendly_sam(rho=0.4, sigma=0.0), SAM),
    "clipped at no norm": (gradreg.fgr(gamma=0.2, epsilon=0.4, clip=1e9), gradreg.fgr(gamma=0.2, epsilon=0.4)),
    "gsam, a 0": (gradreg.gsam(rho=0.4, a=0.0), SAM),
    "wsam, gamma 1/2": (gradreg.wsam(rho=0.4, gamma=0.5), SAM),
    "wsam": (gradreg.wsam(rho=0.4, gamma=0.8), gradreg.gnp(r=0.4, alpha=4.0)),
    "looksam, k 1": (gradreg.looksam(rho=0.4, k=1), SAM),
    "looksam, a 0": (gradreg.looksam(rho=0.4, k=3, a=0.0), SAM.every(3)),
    "one ascent step": (replace(gradreg.fgr(gamma=0.2, epsilon=0.4), ascent_steps=1), gradreg.fgr(gamma=0.2, epsilon=0.4)),
    "nothing masked": (SAM.sparse(0.0), SAM),
    "nothing masked at random": (SAM.sparse(0.0, choice="random"), SAM),
    "always": (SAM.with_probability(1.0), SAM),
    "every step": (SAM.every(1), SAM),
    "remembering with no radius to speak of": (gradreg.remembered(epsilon=1e-14), gradreg.gnp(r=0.4, alpha=0.0)),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str) -> None:
    one, other = REDUCTIONS[name]
    assert_close(trained(one)[-1], trained(other)[-1], tolerance=1e-8 if "huge" in name else 1e-12)


def test_asam_does_not_see_a_layer_rescaled_and_undone_in_the_next() -> None:
    """With η = 0 the gradient of a layer that is a times as large is 1/a of what it was, as the plain one is; SAM's is not."""
    found = []
    for penalty in (gradreg.asam(rho=0.6, eta=0.0), gradreg.sam(rho=0.6)):
        ends = []
        for a in (1.0, 4.0):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False)).double()
            model.load_state_dict({"0.weight": a * model[0].weight.detach(), "2.weight": model[2].weight.detach() / a})
            x, y = batch(0)
            GradientRegularizer(model, penalty).backward(lambda model=model, x=x, y=y: nn.functional.mse_loss(model(x), y))
            ends.append({"0.weight": a * gradients(model)["0.weight"], "2.weight": gradients(model)["2.weight"] / a})
        found.append(max(float((ends[1][n] - ends[0][n]).abs().max()) for n in ends[0]))
    assert found[0] < 1e-12
    assert found[1] > 1e-2


def test_decoupled_without_an_optimizer_of_its_own_is_coupled() -> None:
    """For plain SGD it makes no difference through which door a gradient goes."""
    ends = []
    for decoupled in (False, True):
        problem = tanh_problem()
        optimizer = torch.optim.SGD(problem.model.parameters(), lr=RATE)
        regularizer = GradientRegularizer(problem.model, gradreg.wsam(rho=0.3, gamma=0.8, decoupled=decoupled))
        for _ in range(3):
            optimizer.zero_grad()
            regularizer.backward(problem.closure())
            optimizer.step()
            regularizer.decoupled_step(optimizer)
        ends.append(values(problem.model))
    assert_close(ends[1], ends[0], tolerance=1e-12)


def test_the_decoupled_step_must_not_be_forgotten() -> None:
    problem = tanh_problem()
    optimizer = torch.optim.SGD([{"params": problem.model[0].parameters()}], lr=RATE)  # type: ignore[index]
    regularizer = GradientRegularizer(problem.model, gradreg.wsam(rho=0.3, gamma=0.8, decoupled=True))
    regularizer.backward(problem.closure())
    with pytest.raises(RuntimeError, match=r"decoupled_step\(optimizer\) must come after optimizer.step\(\) and before the next backward"):
        regularizer.backward(problem.closure())
    with pytest.raises(RuntimeError, match=r"before state_dict\(\); it is missing"):
        regularizer.state_dict()
    with pytest.raises(ValueError, match="optimizer must hold all parameters that the regularizer trains; got one that lacks 2 of 4"):
        regularizer.decoupled_step(optimizer)
    optimizer.add_param_group({"params": list(problem.model[2].parameters()), "lr": 0.0})  # type: ignore[index]
    before = values(problem.model)
    regularizer.decoupled_step(optimizer)
    changed = {name for name, value in values(problem.model).items() if not torch.equal(value, before[name])}
    assert changed == {"0.weight", "0.bias"}, "each group by its own learning rate"
    regularizer.decoupled_step(optimizer)
    assert changed, "a second call changes nothing more"


def test_the_decoupled_step_of_several_optimizers_is_that_of_one_with_their_groups() -> None:
    ends = []
    for several in (False, True):
        problem = tanh_problem()
        first, second = (list(problem.model[i].parameters()) for i in (0, 2))  # type: ignore[index]
        groups = [{"params": first, "lr": 0.1}, {"params": second, "lr": 0.3}]
        optimizers = [torch.optim.SGD([group], momentum=0.9) for group in groups] if several else [torch.optim.SGD(groups, momentum=0.9)]
        regularizer = GradientRegularizer(problem.model, gradreg.wsam(rho=0.3, gamma=0.8, decoupled=True))
        for _ in range(3):
            problem.model.zero_grad()
            regularizer.backward(problem.closure())
            for optimizer in optimizers:
                optimizer.step()
            if several:
                with pytest.raises(ValueError, match=r"got one that lacks 2 of 4\. Pass .* or all of them: decoupled_step\(muon, adamw\)"):
                    regularizer.decoupled_step(optimizers[0])
                with pytest.raises(ValueError, match="optimizers must hold each parameter once; got 2 that two of them hold"):
                    regularizer.decoupled_step(optimizers[0], optimizers[1], optimizers[0])
            regularizer.decoupled_step(*optimizers)
        ends.append(values(problem.model))
    assert_close(ends[1], ends[0], tolerance=0.0)


def test_the_decoupled_step_leaves_out_the_optimizer_whose_step_a_scaler_skips() -> None:
    problem = tanh_problem(torch.float32)
    first, second = (list(problem.model[i].parameters()) for i in (0, 2))  # type: ignore[index]
    optimizers = [torch.optim.SGD(part, lr=0.1) for part in (first, second)]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    regularizer = GradientRegularizer(problem.model, gradreg.wsam(rho=0.3, gamma=0.8, decoupled=True))
    calls: list[int] = []

    def closure() -> torch.Tensor:
        calls.append(0)
        overflow = sum(p.sum() for p in first) * (float("inf") if len(calls) == 2 else 0.0)  # in the second pass, of the first layer
        return problem.loss() + overflow

    before = values(problem.model)
    regularizer.backward(closure, scaler=scaler)
    for optimizer in optimizers:
        scaler.step(optimizer)
    after = values(problem.model)
    scaler.update()
    regularizer.decoupled_step(*optimizers)
    now = values(problem.model)
    assert {n for n in now if torch.equal(now[n], before[n])} == {"0.weight", "0.bias"}
    assert all(not torch.equal(now[n], after[n]) and bool(torch.isfinite(now[n]).all()) for n in ("2.weight", "2.bias"))


def test_a_decoupled_step_that_a_scaler_skips_may_be_left_out() -> None:
    problem = tanh_problem(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    regularizer = GradientRegularizer(problem.model, gradreg.wsam(rho=0.3, gamma=0.8, decoupled=True))
    infinite = [True]
    closure = lambda: problem.loss() * (float("inf") if infinite[0] else 1.0)  # noqa: E731
    regularizer.backward(closure, scaler=scaler)
    problem.model.zero_grad()
    infinite[0] = False
    regularizer.backward(closure, scaler=scaler)
    with pytest.raises(RuntimeError, match=r"regularizer\.decoupled_step\(optimizer\) must come after optimizer\.step\(\)"):
        regularizer.backward(closure, scaler=scaler)


def test_a_decoupled_step_that_is_not_to_be_taken_is_given_up_by_going_back() -> None:
    problem = tanh_problem()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=RATE)
    regularizer = GradientRegularizer(problem.model, gradreg.wsam(rho=0.3, gamma=0.8, decoupled=True))
    before, state = values(problem.model), regularizer.state_dict()
    regularizer.backward(lambda: problem.loss() * float("nan"))
    regularizer.load_state_dict(state)
    regularizer.decoupled_step(optimizer)
    assert_close(values(problem.model), before, tolerance=0.0)
    regularizer.backward(problem.closure())
    assert regularizer.step == 1


def test_several_steps_are_a_finite_difference_of_first_order() -> None:
    """[∇L(θ⁽ˢ⁾) − g]/(Sε) = H·g + O(Sε): halving ε halves the error; power 1 alike."""
    for power in (1, 2):
        exact = gradreg.exact(gamma=1.0, power=power)
        errors = []
        for radius in (4e-3, 2e-3, 1e-3):
            penalty = GradientPenalty(power=power, strength=1.0, radius=radius, ascent_steps=3)
            problem = tanh_problem()
            regularizer_at(0, problem.model, exact).backward(problem.closure())
            expected = gradients(problem.model)
            problem.model.zero_grad()
            regularizer_at(0, problem.model, penalty).backward(problem.closure())
            errors.append(float(twins.norm({n: g - expected[n] for n, g in gradients(problem.model).items()})))
        assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
        assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


def test_parts_compose() -> None:
    """Direction, mask, mixing and difference together, against the twin, over four steps."""
    for penalty in (
        GradientPenalty(power=1, strength=0.2, radius=0.4, direction=Friendly(sigma=0.6), mixing=SurrogateGap(a=0.3)).sparse(0.3, every=2),
        GradientPenalty(power=1, strength=0.4, radius=0.4, direction=Adaptive(eta=0.2), reuse=Reuse(k=2, a=0.5)),
        GradientPenalty(power=2, strength=0.2, radius=0.3, difference="central", direction=Friendly(), decoupled=True),
        GradientPenalty(power=2, strength=0.2, radius=0.3, direction=EmaDirection(), mask=Sparse(sparsity=0.4, choice="random", every=2)),
        GradientPenalty(power=1, strength=0.4, radius=0.4, direction=Friendly(), reuse=Reuse(k=3, a=0.5)).every(2),
        GradientPenalty(power=1, strength=0.2, radius=0.4, ascent_steps=2, mixing=SurrogateGap(a=0.3)).sparse(0.3),
    ):
        problem, memory = tanh_problem(), twins.Remembered()
        regularizer = GradientRegularizer(problem.model, penalty)
        optimizer = torch.optim.SGD(problem.model.parameters(), lr=RATE)
        for step in range(4):
            theta, loss = twins.parameters_of(problem.model), twins.loss_of(problem.model, problem.x, problem.y)
            optimizer.zero_grad()
            regularizer.backward(problem.closure())
            assert_close(gradients(problem.model), twins.family(penalty, loss, theta, step=step, memory=memory), tolerance=1e-11)
            optimizer.step()
            regularizer.decoupled_step(optimizer)


def test_fans_are_those_of_the_modules() -> None:
    """T² = fan_out/fan_in: a table counts as one input, and a transposed convolution has its inputs first."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(7, 4),
            "matrix": nn.Linear(4, 8),
            "kernel": nn.Conv1d(8, 2, 3, bias=False),
            "transposed": nn.ConvTranspose1d(2, 6, 3, bias=False),
        }
    ).double()
    model.register_parameter("scalar", nn.Parameter(torch.tensor(1.0, dtype=torch.float64)))
    squares = {
        "scalar": 1.0,
        "table.weight": 4.0,
        "matrix.weight": 2.0,
        "matrix.bias": 8.0,
        "kernel.weight": 0.25,
        "transposed.weight": 3.0,
    }
    tokens, seen = torch.tensor([[0, 3, 3, 5]]), []

    def closure() -> Tensor:
        seen.append(values(model))
        hidden = model["kernel"](model["matrix"](model["table"](tokens)).tanh().transpose(1, 2))
        return (model["transposed"](hidden).tanh() * model.get_parameter("scalar")).square().sum()

    def deltas(penalty: GradientPenalty) -> dict[str, Tensor]:
        seen.clear()
        GradientRegularizer(model, penalty).backward(closure)
        model.zero_grad()
        return {name: seen[1][name] - seen[0][name] for name in squares}

    sam, ours = deltas(gradreg.sam(rho=0.3)), deltas(gradreg.mup2_sam(rho=0.3))
    size = sum(squares[name] * d.square().sum() for name, d in sam.items()) ** 0.5
    assert_close(ours, {name: 0.3 * squares[name] * d / size for name, d in sam.items()}, tolerance=1e-12)
    turned = deltas(gradreg.mup2_sam(rho=0.3, layout="in-out"))
    ratio = turned["matrix.weight"].norm() / turned["scalar"].norm() / (ours["matrix.weight"].norm() / ours["scalar"].norm())
    assert float(ratio) == pytest.approx(1 / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_loss_equated_step_of_a_tiny_gradient_is_as_long_as_its_cap(dtype: torch.dtype) -> None:
    """1 / ‖g‖² overflows float32 where ‖g‖ does not underflow it."""
    p = nn.Parameter(torch.ones(2, dtype=dtype))
    model, seen = nn.ParameterList([p]), []

    def closure() -> Tensor:
        seen.append(p.detach().clone())
        return 1e-25 * p.sum()

    GradientRegularizer(model, gradreg.le_sam(sigma=0.5, rho_max=2.0)).backward(closure)
    assert float((seen[1] - seen[0]).norm()) == pytest.approx(2.0, rel=1e-5)


def mup_network(width: int) -> nn.Sequential:
    """In maximal update parameterization: standard deviations 1/√fan_in of the input layer, √(2/n) and 1/n."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=False) for a, b in ((16, width), (width, width), (width, 4))]
    for layer, deviation in zip(layers, (1 / 4, (2 / width) ** 0.5, 1 / width), strict=True):
        nn.init.normal_(layer.weight, std=deviation)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def radius_of_alignment(model: nn.Module, build: Callable[..., GradientPenalty], closure: Callable[[], Tensor]) -> tuple[float, float]:
    """Where the cosine of the two gradients is 0.9, by bisection, and the share of that perturbation that lies in the last layer."""
    low, high, share = 1e-2, 1e1, 0.0
    for _ in range(9):
        radius = (low * high) ** 0.5
        regularizer = GradientRegularizer(model, build(rho=radius), measure_cosine=True, measure_shares=True)
        regularizer.backward(closure)
        model.zero_grad()
        low, high = (radius, high) if regularizer.metrics.cosine > 0.9 else (low, radius)
        share = regularizer.metrics.shares["4.weight"]
    return radius, share


@pytest.mark.slow
def test_the_radius_of_an_alignment_holds_over_widths_with_layerwise_radii_and_falls_without() -> None:
    """SAM's falls as the root of the width, because its perturbation is that of the last layer. benchmarks/layerwise_radii.py trains."""
    draws = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 16, generator=draws), torch.randint(0, 4, (32,), generator=draws)
    found: dict[str, dict[int, tuple[float, float]]] = {"sam": {}, "mup2": {}}
    for width in (128, 1024):
        model = mup_network(width)
        layers = [layer for layer in model if isinstance(layer, nn.Linear)]
        groups = [{"params": [layer.weight], "lr": 0.3 * layer.out_features / layer.in_features} for layer in layers]
        optimizer = torch.optim.SGD(groups)

        def closure(model: nn.Module = model) -> Tensor:
            return nn.functional.cross_entropy(model(x), y)

        for _ in range(10):
            optimizer.zero_grad()
            closure().backward()
            optimizer.step()
        optimizer.zero_grad()
        for name, build in (("sam", gradreg.sam), ("mup2", gradreg.mup2_sam)):
            found[name][width] = radius_of_alignment(model, build, closure)
    (small, few), (large, many) = found["sam"][128], found["sam"][1024]
    assert 2.2 < small / large < 3.6  # √8 = 2.8
    assert few < many
    assert many > 0.9
    assert 0.8 < found["mup2"][128][0] / found["mup2"][1024][0] < 1.25
