"""Scheduled weight decay in optax: the same decay per step as torch, set from outside or by the step count."""

from __future__ import annotations

from typing import Any

import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy

from gradreg import AutoL2, Cosine, LogTime, Ramp, Schedule  # noqa: E402
from gradreg.jax import weight_decay as wd  # noqa: E402

SCHEDULES: list[Schedule | float] = [0.2, Cosine(start=0.4, end=0.05, steps=7), LogTime(value=0.5, t0=3), Ramp(start=0.0, end=0.3, steps=5)]
LR = 0.5
FACTORIES = {"sgd": wd.sgd, "adamw": optax.adamw}


@pytest.fixture(autouse=True)
def _double() -> Any:
    with jax.enable_x64(True):
        yield


def ratios(optimizer: Any, steps: int, before_step: Any = lambda state, step: state) -> list[float]:
    """What each step leaves of a weight whose gradient is 0."""
    params = {"w": jnp.ones(2)}
    state, left = optimizer.init(params), []
    for step in range(steps):
        state = before_step(state, step)
        updates, state = jax.jit(optimizer.update)({"w": jnp.zeros(2)}, state, params)
        new = optax.apply_updates(params, updates)
        left.append(float(new["w"][0] / params["w"][0]))
        params = new
    return left


@pytest.mark.parametrize("decay", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", FACTORIES)
def test_each_step_takes_off_the_learning_rate_times_the_schedule(decay: Schedule | float, name: str) -> None:
    optimizer = optax.inject_hyperparams(FACTORIES[name])(LR, weight_decay=wd.scheduled(decay))
    expected = [1 - LR * (decay(step) if isinstance(decay, Schedule) else decay) for step in range(10)]
    assert ratios(optimizer, 10) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("decay", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_torch_and_optax_decay_the_same(decay: Schedule | float, name: str) -> None:
    torch = pytest.importorskip("torch")
    from gradreg.torch.weight_decay import WeightDecay

    gradients = [0.3, -0.2, 0.1, 0.4, -0.5, 0.2]
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    options = {"momentum": 0.9} if name == "SGD" else {}
    torch_optimizer = getattr(torch.optim, name)([weight], lr=0.1, weight_decay=1.0, **options)
    setter = WeightDecay(torch_optimizer, decay)
    optimizer = optax.inject_hyperparams(FACTORIES[name.lower()])(0.1, weight_decay=wd.scheduled(decay), **options)
    params = jnp.array([1.0, -2.0])
    state = optimizer.init(params)
    for step, gradient in enumerate(gradients):
        weight.grad = torch.tensor([gradient, 2 * gradient], dtype=torch.float64)
        setter.set(step)
        torch_optimizer.step()
        updates, state = optimizer.update(jnp.array([gradient, 2 * gradient]), state, params)
        params = optax.apply_updates(params, updates)
        # Adam's bias correction is float32 in optax, its hyperparameters are float32 under inject_hyperparams.
        assert params.tolist() == pytest.approx(weight.tolist(), rel=1e-5)


@pytest.mark.parametrize("name", FACTORIES)
def test_auto_sets_the_coefficient_from_outside(name: str) -> None:
    auto = AutoL2(measure_every=1)
    optimizer = optax.inject_hyperparams(FACTORIES[name])(LR, weight_decay=1.0)
    left = ratios(optimizer, 4, lambda state, step: wd.set_weight_decay(state, auto.update(step, loss=1.0, accuracy=0.5)))
    assert left == pytest.approx([1 - LR * l2 for l2 in (0.1, 0.1, 0.01, 0.01)], rel=1e-6)


def test_groups_without_decay_stay_without() -> None:
    make = optax.inject_hyperparams(optax.adamw)
    optimizer = optax.partition({"yes": make(LR, weight_decay=1.0), "no": make(LR, weight_decay=0.0)}, {"w": "yes", "b": "no"})
    params = {"w": jnp.ones(1), "b": jnp.ones(1)}
    state = jax.jit(wd.set_weight_decay)(optimizer.init(params), 0.2)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert float(updates["w"][0]) == pytest.approx(-LR * 0.2)
    assert float(updates["b"][0]) == 0.0


def test_masked_parameters_stay_without() -> None:
    optimizer = optax.inject_hyperparams(wd.sgd, static_args="mask")(LR, weight_decay=1.0, mask={"w": True, "b": False})
    params = {"w": jnp.ones(1), "b": jnp.ones(1)}
    state = wd.set_weight_decay(optimizer.init(params), 0.2)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert (float(updates["w"][0]), float(updates["b"][0])) == (pytest.approx(-LR * 0.2), 0.0)


def test_decay_follows_the_square_of_the_learning_rate() -> None:
    rate = optax.exponential_decay(0.4, 1, 0.5)
    decay = wd.scheduled(0.1, learning_rate=rate, peak_learning_rate=0.4)
    optimizer = optax.inject_hyperparams(optax.adamw)(rate, weight_decay=decay)
    assert [1 - left for left in ratios(optimizer, 4)] == pytest.approx([0.04 / 4**k for k in range(4)], rel=1e-5)


def test_cautious_decay_spares_what_the_optimizer_moves_away_from_zero() -> None:
    optimizer = optax.chain(wd.add_cautious_decayed_weights(0.2), optax.scale_by_learning_rate(LR))
    params, gradient = jnp.array([1.0, 1.0, -1.0, -1.0, 1.0]), jnp.array([1.0, -1.0, 1.0, -1.0, 0.0]) * 0.1
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    expected = -LR * (gradient + 0.2 * jnp.array([1.0, 0.0, 0.0, -1.0, 1.0]))
    assert updates.tolist() == pytest.approx(expected.tolist())


def test_cautious_decay_equals_torchs() -> None:
    torch = pytest.importorskip("torch")
    from gradreg.torch.weight_decay import WeightDecay

    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    torch_optimizer = torch.optim.Adam([weight], lr=0.1, weight_decay=1.0)
    decay = Cosine(start=0.4, end=0.0, steps=6)
    setter = WeightDecay(torch_optimizer, decay, cautious=True)
    cautious = optax.inject_hyperparams(wd.add_cautious_decayed_weights)(weight_decay=wd.scheduled(decay))
    optimizer = optax.chain(optax.scale_by_adam(), cautious, optax.scale_by_learning_rate(0.1))
    params = jnp.array([1.0, -2.0, 0.5])
    state = optimizer.init(params)
    for step, sign in enumerate([1, -1, -1, 1, 1, -1]):
        gradient = [0.3 * sign, 0.1 * sign, -0.2]
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        setter.set(step)
        torch_optimizer.step()
        updates, state = optimizer.update(jnp.array(gradient), state, params)
        params = optax.apply_updates(params, updates)
        assert params.tolist() == pytest.approx(weight.tolist(), rel=1e-5)


def test_bad_input_is_refused() -> None:
    params = jnp.ones(1)
    with pytest.raises(ValueError, match=r"decay must be finite and >= 0; got -0.1"):
        wd.scheduled(-0.1)
    with pytest.raises(ValueError, match=r"decay must be >= 0 at every step; got the schedule ramp"):
        wd.scheduled(Ramp(start=0.1, end=-0.1, steps=5))
    with pytest.raises(ValueError, match=r"must be given both or neither; got only one"):
        wd.scheduled(0.1, peak_learning_rate=0.1)
    with pytest.raises(ValueError, match=r"state must hold a weight_decay of optax.inject_hyperparams; got none"):
        wd.set_weight_decay(optax.adamw(0.1).init(params), 0.1)
    with pytest.raises(ValueError, match=r"got an optimizer whose weight_decay follows a schedule"):
        wd.set_weight_decay(optax.inject_hyperparams(optax.adamw)(0.1, weight_decay=wd.scheduled(0.1)).init(params), 0.1)
    with pytest.raises(ValueError, match=r"l2 must be finite and >= 0; got -0.1"):
        wd.set_weight_decay(optax.inject_hyperparams(optax.adamw)(0.1, weight_decay=0.1).init(params), -0.1)
    transformation = wd.add_cautious_decayed_weights(0.1)
    with pytest.raises(ValueError, match=r"params must be given to update\(\)"):
        transformation.update(params, transformation.init(params))
