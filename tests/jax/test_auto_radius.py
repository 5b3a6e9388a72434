"""A radius that sets itself, in JAX: the numbers of the PyTorch engine, and under jit, scan, vmap and shards."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import gradreg
from gradreg import AutoRadius, GradientPenalty
from gradreg.jax import decoupled_update, value_and_grad
from gradreg.jax.transformation import regularize
from gradreg.torch import GradientRegularizer

from .cases import assert_close, assert_same_bits, problem, squared_error

pytestmark = pytest.mark.usefixtures("x64")

AUTO = AutoRadius(target=0.9, start=0.3, gain=0.1, lower=0.01, upper=3.0)
KINDS = {
    "sam": gradreg.sam(rho=AUTO),
    "gnp": gradreg.gnp(r=AUTO, alpha=0.8),
    "gnp-unit": gradreg.gnp(r=AUTO, alpha=0.8, mixing="unit"),
    "fgr": gradreg.fgr(epsilon=AUTO),
    "fgr-fixed-gamma": gradreg.fgr(gamma=0.2, epsilon=AUTO),
    "bgr": gradreg.bgr(epsilon=AUTO),
    "cgr": gradreg.cgr(epsilon=AUTO),
    "asam": gradreg.asam(rho=AUTO),
    "friendly": gradreg.friendly_sam(rho=AUTO),
    "gap": gradreg.gsam(rho=AUTO, a=0.3),
    "looksam": gradreg.looksam(rho=AUTO, k=2),
    "decoupled": gradreg.wsam(rho=AUTO, gamma=0.6, decoupled=True),
    "zero-warm-up": gradreg.sam(rho=AUTO).warmup("zero", steps=3),
    "strength-warm-up": gradreg.fgr(epsilon=AUTO).warmup("strength", steps=3),
    "every": gradreg.sam(rho=AUTO).every(2),
    "measured-every": gradreg.sam(rho=AutoRadius(target=0.9, start=0.3, gain=0.1, every=3)),
    "sparse": gradreg.sam(rho=AUTO).sparse(0.4, every=5),
    "ascent-steps": gradreg.sam(rho=AUTO, steps=2),
}
STEPS, RATE = 12, 0.05


def by_torch(penalty: GradientPenalty) -> tuple[list[np.ndarray], list[float], dict[str, float]]:
    """Parameters after ``STEPS`` steps, the radius of each, and the state at the end."""
    params, x, y = problem()
    model: Any = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        for i in ("0", "2"):
            model[int(i)].weight.copy_(torch.tensor(np.asarray(params[i]["weight"]).T))
            model[int(i)].bias.copy_(torch.tensor(np.asarray(params[i]["bias"])))
    regularizer = GradientRegularizer(model, penalty)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    radii: list[float] = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        regularizer.backward(lambda: nn.functional.mse_loss(model(torch.tensor(np.asarray(x))), torch.tensor(np.asarray(y))))
        optimizer.step()
        regularizer.decoupled_step(optimizer)
        radii.append(regularizer.metrics.radius)
    return [p.detach().numpy().T for p in model.parameters()], radii, regularizer.state_dict()["radius"]


def by_jax(penalty: GradientPenalty, transform: Any = jax.jit) -> tuple[Any, list[float], Any]:
    params, x, y = problem()
    run = transform(value_and_grad(squared_error, penalty, with_metrics=True))
    state = value_and_grad(squared_error, penalty).init(params)
    radii: list[float] = []
    for step in range(STEPS):
        (_, metrics), gradients, state = run(params, x, y, step=jnp.int32(step), state=state)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, gradients)
        if penalty.decoupled:
            params = decoupled_update(params, state, RATE)
        radii.append(float(metrics.radius))
    return params, radii, state["radius"]


@pytest.mark.parametrize("penalty", KINDS.values(), ids=KINDS)
def test_both_engines_agree(penalty: GradientPenalty) -> None:
    params, radii, state = by_jax(penalty)
    theirs, their_radii, their_state = by_torch(penalty)
    ours = [params[i][name] for i in ("0", "2") for name in ("weight", "bias")]
    assert_close(ours, [jnp.asarray(t) for t in theirs], 1e-10)
    if penalty.mask is None:  # which coordinates are the largest may be decided by rounding
        assert radii == pytest.approx(their_radii, rel=1e-9)
    assert {name: float(value) for name, value in state.items()} == pytest.approx(their_state, rel=1e-9)
    assert len(set(radii)) > 3


def test_under_scan_and_vmap() -> None:
    """A scan over the steps, for two starts at once, is the loop."""
    params, x, y = problem()
    oracle = value_and_grad(squared_error, KINDS["gnp"])
    state = oracle.init(params)

    def run(params: Any, state: Any) -> Any:
        def turn(carry: Any, _: None) -> Any:
            params, state = carry
            radius = jnp.exp(state["radius"]["log_radius"])
            _, gradients, state = oracle(params, x, y, state=state)
            return (jax.tree.map(lambda p, g: p - RATE * g, params, gradients), state), radius

        return jax.lax.scan(turn, (params, state), None, length=STEPS)

    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    both["radius"]["log_radius"] += jnp.log(jnp.array([1.0, 2.0]))
    (found, _), radii = jax.jit(jax.vmap(run, in_axes=(None, 0)))(params, both)
    expected, their_radii, _ = by_jax(KINDS["gnp"])
    assert_close(jax.tree.map(lambda leaf: leaf[0], found), expected, 1e-10)
    assert radii[0].tolist() == pytest.approx(their_radii, rel=1e-10)
    assert float(radii[1][0]) == pytest.approx(0.6)


def test_one_program_for_all_steps() -> None:
    params, x, y = problem()
    oracle = value_and_grad(squared_error, KINDS["zero-warm-up"])
    run: Any = jax.jit(oracle)
    state = oracle.init(params)
    form = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), state)
    for step in range(6):
        _, _, state = run(params, x, y, step=jnp.int32(step), state=state)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), state) == form
    assert run._cache_size() == 1
    assert int(state["radius"]["steps"]) == 3


@pytest.mark.parametrize("scope", ["local", "global"])
def test_all_shards_hold_one_radius(scope: Any) -> None:
    """Over two halves of the batch, by vmap: with global scope as on the whole batch; with local scope from the summed products."""
    params, x, y = problem()
    oracle = value_and_grad(squared_error, KINDS["sam"], axis_name="data", scope=scope)
    state = oracle.init(params)
    halves = (x.reshape(2, 4, 3), y.reshape(2, 4, 2))
    _, _, after = jax.vmap(lambda x, y: oracle(params, x, y, state=state), axis_name="data")(*halves)
    assert_same_bits(jax.tree.map(lambda leaf: leaf[0], after), jax.tree.map(lambda leaf: leaf[1], after))
    pairs = []
    for half in range(2):
        g = jax.grad(squared_error)(params, halves[0][half], halves[1][half])
        size = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(g)))
        at = jax.tree.map(lambda p, leaf: p + 0.3 * leaf / size, params, g)  # noqa: B023
        pairs.append((g, jax.grad(squared_error)(at, halves[0][half], halves[1][half])))
    if scope == "global":
        _, _, whole = value_and_grad(squared_error, KINDS["sam"])(params, x, y, state=state)
        expected = float(whole["radius"]["log_radius"])
    else:
        dots = [
            [sum(float(jnp.vdot(p, q)) for p, q in zip(*map(jax.tree.leaves, (a, b)), strict=True)) for a, b in ((g, g), (g, m), (m, m))]
            for g, m in pairs
        ]
        gg, gm, mm = np.sum(dots, axis=0)
        expected = math.log(0.3) + float(np.clip(0.1 * (gm / math.sqrt(gg * mm) - 0.9) / 0.1, -0.1, 0.1))
    assert float(after["radius"]["log_radius"][0]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "penalty", [gradreg.sam(rho=AutoRadius(start=4.0, target=0.5)), gradreg.cgr(epsilon=AutoRadius(start=4.0, target=0.5))]
)
def test_a_radius_that_leaves_the_loss_comes_back(penalty: GradientPenalty) -> None:
    """Where loss and gradient at the perturbed point are not finite, the plain gradient stands and the radius is halved."""

    def loss(params: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum(params**2) * jnp.where(jax.lax.stop_gradient(jnp.sum(params**2)) < 16.0, 1.0, jnp.inf)

    params = jnp.array([1.0, 2.0])
    oracle = value_and_grad(loss, penalty)
    _, gradient, state = oracle(params, state=oracle.init(params))
    assert gradient.tolist() == [1.0, 2.0]
    assert float(state["radius"]["log_radius"]) == pytest.approx(math.log(2.0))
    # A loss scale's own machinery must see what is not finite.
    _, gradient, state = oracle(params, state=oracle.init(params), loss_scale=8.0)
    assert not np.isfinite(gradient).all()
    assert float(state["radius"]["log_radius"]) == pytest.approx(math.log(2.0))


def test_in_optax_by_the_alignment_alone() -> None:
    """``regularize`` sees gradients and no losses, so the guards that look at losses rest."""
    params, x, y = problem()
    loss = partial(squared_error, x=x, y=y)
    tx = regularize(KINDS["sam"])
    state: Any = tx.init(params)
    for _ in range(STEPS):
        updates, state = tx.update(jax.grad(loss)(params), state, params, grad_fn=jax.grad(loss))
        params = optax.apply_updates(params, jax.tree.map(lambda u: -RATE * u, updates))
    expected, _, radius = by_jax(KINDS["sam"])
    assert_close(params, expected, 1e-10)
    assert_close(dict(state.memory["radius"]), dict(radius), 1e-10)


def test_needs_its_state() -> None:
    params, x, y = problem()
    with pytest.raises(TypeError, match=r"state must be given for a penalty that carries one"):
        value_and_grad(squared_error, KINDS["sam"])(params, x, y)


def test_a_step_backward_that_passes_the_valley_is_halved_and_left_out() -> None:
    """On ½θ² a step of 1.5·g back from 2 ends at −1, where the gradient is opposed; a forward one is taken as it is."""
    for penalty, expected, radius in (
        (gradreg.bgr(epsilon=AutoRadius(start=1.5)), 2.0, 0.75),
        (gradreg.fgr(epsilon=AutoRadius(start=1.5)), 5.0, 1.5 * np.exp(0.05)),
    ):
        oracle = value_and_grad(lambda theta: 0.5 * theta**2, penalty)
        theta = jnp.array(2.0)
        _, gradient, state = oracle(theta, state=oracle.init(theta))
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)
        np.testing.assert_allclose(jnp.exp(state["radius"]["log_radius"]), radius, rtol=1e-6)


@pytest.mark.parametrize("rate", [1.0, 1.5, 1.8, 1.9])
def test_beyond_the_edge_of_stability_it_comes_back(rate: float) -> None:
    """½θ² at the learning rate ``rate``: F-GR's step is rate·(1 + ε)·θ, which overshoots more than θ itself from ε = 2/rate − 1 on."""
    oracle = value_and_grad(lambda theta: 0.5 * theta**2, gradreg.auto())

    def turn(carry: Any, _: None) -> Any:
        theta, state = carry
        radius = jnp.exp(state["radius"]["log_radius"])
        _, gradient, state = oracle(theta, state=state)
        return (theta - rate * gradient, state), (radius, jnp.abs(theta))

    theta = jnp.array(1.0)
    _, (radii, sizes) = jax.jit(lambda carry: jax.lax.scan(turn, carry, None, length=2000))((theta, oracle.init(theta)))
    assert float(radii.max()) > 2 / rate - 1, "the alignment is 1 at every radius"
    assert float((radii[1:] / radii[:-1]).min()) == pytest.approx(0.5, rel=1e-9)
    assert float(sizes.max()) < 20.0
    assert float(sizes[-200:].max()) < 1e-3
