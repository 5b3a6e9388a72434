"""Parameters of which each device holds another part; ``test_data_parallel.py`` runs this in a process that simulates eight devices."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import gradreg
from gradreg import GradientPenalty
from gradreg.jax import value_and_grad
from tests.penalties import sampled

from .cases import arrays, assert_close, first_state

pytestmark = pytest.mark.usefixtures("x64")

WHOLE = PartitionSpec()
DIVIDED: dict[str, GradientPenalty] = {
    "sam": gradreg.sam(rho=0.3),
    "gnp": gradreg.gnp(r=0.3, alpha=0.8),
    "gnp-unit": gradreg.gnp(r=0.3, alpha=0.8, mixing="unit"),
    "fgr": gradreg.fgr(gamma=0.2, epsilon=0.5),
    "cgr": gradreg.cgr(gamma=0.2, epsilon=0.5),
    "asam": gradreg.asam(rho=0.5, eta=0.1),
    "layerwise": gradreg.layerwise_sam(rho=0.5, eta=0.1, one_dimensional=True),
    "loss-equated": gradreg.le_sam(sigma=0.3, rho_max=9.0),
    "exact-norm": gradreg.exact(gamma=0.3, power=1),
    "gsam": gradreg.gsam(rho=0.3, a=0.4),
    "looksam": gradreg.looksam(rho=0.3, k=2, a=0.7),
    "friendly": gradreg.friendly_sam(rho=0.3, sigma=0.7, beta=0.6),
    "remembered": gradreg.remembered(epsilon=0.3, decay=0.4),
    "late": gradreg.sam(rho=0.3).warmup("zero", steps=1),
    "norms": gradreg.sam(rho=0.3).only_norms(),
}
checked = pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
EACH_PLAN = {"sam", "gnp", "fgr", "cgr", "asam", "exact-norm", "late"}
"""The usual methods, and one pass after another, a derivative of them, and a branch: where the devices' gradients count differently."""


def parameters() -> tuple[dict[str, Any], jax.Array]:
    first, second, bias, norm, x = map(jnp.asarray, arrays((4, 8), (8, 2), (2,), (8,), (8, 4)))
    return {"in": first, "out": second, "bias": bias, "norm": 1 + 0.1 * norm}, x


def whole_loss(params: Any, x: Any) -> Any:
    return jnp.mean((jnp.tanh(x @ params["in"]) * params["norm"] @ params["out"] + params["bias"]) ** 2)


def mesh(devices: int, *axes: str) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]).reshape([2] * (len(axes) - 1) + [-1]), axes)


TENSOR = {"in": PartitionSpec(None, "model"), "out": PartitionSpec("model"), "bias": WHOLE, "norm": PartitionSpec("model")}


def tensor_parallel(params: Any, x: Any) -> Any:
    """Columns of the first matrix and rows of the second on each device."""
    return jnp.mean((jax.lax.psum(jnp.tanh(x @ params["in"]) * params["norm"] @ params["out"], "model") + params["bias"]) ** 2)


SHARED = {"in": PartitionSpec("data"), "out": PartitionSpec("data"), "bias": WHOLE, "norm": WHOLE}


def gathering(params: Any, x: Any) -> Any:
    """ZeRO: a part of each matrix and of the batch on each device; the loss is that of the device's own examples."""
    gathered = {k: jax.lax.all_gather(v, "data", axis=0, tiled=True) if k in ("in", "out") else v for k, v in params.items()}
    return whole_loss(gathered, x)


def axes_of(specs: Any) -> Any:
    return lambda name, leaf: tuple(axis for axis in specs[name] if axis is not None)


@cache
def on_one_device(name: str) -> list[Any]:
    """What two steps give: loss, gradient and state."""
    params, x = parameters()
    oracle = value_and_grad(whole_loss, DIVIDED[name])
    run, state, found = jax.jit(oracle), first_state(oracle, params), []
    for step in (0, 1):
        found.append(run(params, x, step=jnp.int32(step), **state))
        state = dict(zip(state, found[-1][2:], strict=True))
    return found


def check(oracle: Any, loss_specs: Any, batch: PartitionSpec, grid: Mesh, check_vma: bool, name: str) -> None:
    """Two steps, loss, gradients and memories, against one device."""
    params, x = parameters()
    state = first_state(value_and_grad(whole_loss, DIVIDED[name]), params)
    state_specs = {"state": dict.fromkeys(state["state"], loss_specs)} if state else {}

    def shard(params: Any, x: Any, state: Any, step: Any) -> Any:
        return oracle(params, x, step=step, **state)

    specs = {"in_specs": (loss_specs, batch, state_specs, WHOLE), "out_specs": (WHOLE, loss_specs, *state_specs.values())}
    run = jax.jit(jax.shard_map(shard, mesh=grid, check_vma=check_vma, **specs))
    for step, (value, *expected) in enumerate(on_one_device(name)):
        found_value, *found = run(params, x, state, jnp.int32(step))
        np.testing.assert_allclose(found_value, value, rtol=1e-12)
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs)
        state = dict(zip(state, found[1:], strict=True))


@pytest.mark.parametrize(
    ("name", "check_vma"),
    sampled(
        [(name, check_vma) for name in DIVIDED for check_vma in (True, False)],
        [*((name, True) for name in DIVIDED), *((name, False) for name in EACH_PLAN)],
    ),
)
def test_tensor_parallel_on_two_devices_is_one_device(name: str, check_vma: bool) -> None:
    oracle = value_and_grad(tensor_parallel, DIVIDED[name], norm_axes=axes_of(TENSOR))
    check(oracle, TENSOR, WHOLE, mesh(2, "model"), check_vma, name)


@pytest.mark.parametrize(
    ("name", "check_vma"),
    sampled(
        [(name, check_vma) for name in DIVIDED for check_vma in (True, False)],
        [(name, check_vma) for name in EACH_PLAN for check_vma in (True, False)],
    ),
)
def test_zero_on_four_devices_is_one_device(name: str, check_vma: bool) -> None:
    oracle = value_and_grad(gathering, DIVIDED[name], axis_name="data", norm_axes=axes_of(SHARED), scope="global")
    check(oracle, SHARED, PartitionSpec("data"), mesh(4, "data"), check_vma, name)


@checked
@pytest.mark.parametrize("name", sampled(["sam", "fgr", "cgr"], ["fgr"]))
def test_batch_and_layers_over_two_axes_is_one_device(name: str, check_vma: bool) -> None:
    oracle = value_and_grad(tensor_parallel, DIVIDED[name], axis_name="data", norm_axes=axes_of(TENSOR), scope="global")
    check(oracle, TENSOR, PartitionSpec("data"), mesh(8, "data", "model"), check_vma, name)


@pytest.mark.parametrize("name", sampled(["sam", "fgr", "exact-norm"], ["sam"]))
def test_axes_by_name_where_types_say_which_leaves_differ(name: str) -> None:
    check(value_and_grad(tensor_parallel, DIVIDED[name], norm_axes="model"), TENSOR, WHOLE, mesh(2, "model"), True, name)
    oracle = value_and_grad(gathering, DIVIDED[name], axis_name="data", norm_axes="data", scope="global")
    check(oracle, SHARED, PartitionSpec("data"), mesh(4, "data"), True, name)


def attempt(fun: Any, specs: Any, penalty: GradientPenalty = DIVIDED["sam"], *, check_vma: bool = True, **options: Any) -> None:
    params, x = parameters()
    axis = "model" if specs is TENSOR else "data"
    batch = PartitionSpec("data") if specs is SHARED else WHOLE
    oracle = value_and_grad(fun, penalty, **options)
    out = {"in_specs": (specs, batch), "out_specs": (WHOLE, specs), "check_vma": check_vma}
    jax.jit(jax.shard_map(lambda p, x: oracle(p, x, step=0), mesh=mesh(4, axis), **out))(params, x)


@checked
def test_what_is_not_declared_is_an_error(check_vma: bool) -> None:
    with pytest.raises(ValueError, match=r"norm_axes must .*over.* 'model'.*Name the axis in norm_axes"):
        attempt(tensor_parallel, TENSOR, check_vma=check_vma)
    with pytest.raises(ValueError, match=r"norm_axes must .*fun gathers a parameter over 'data'"):
        attempt(gathering, SHARED, axis_name="data", check_vma=check_vma)


def test_what_cannot_be_right_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"norm_axes must be a function of name and leaf where .*check_vma=False\); got 'model'"):
        attempt(tensor_parallel, TENSOR, norm_axes="model", check_vma=False)
    with pytest.raises(ValueError, match=r"scope must be 'global' where the batch and the parameters .* 'data'; got 'local'"):
        attempt(gathering, SHARED, axis_name="data", norm_axes=axes_of(SHARED))
    with pytest.raises(
        ValueError, match=r"fun must return the same loss on every device along norm_axes; got one that varies over 'model'"
    ):
        attempt(lambda p, x: jnp.sum(p["in"]), TENSOR, norm_axes="model")
    with pytest.raises(ValueError, match=r"norm_axes must name axes along which a leaf differs; got \('model',\) for 'bias'"):
        attempt(tensor_parallel, TENSOR, norm_axes=lambda name, leaf: "model")
    with pytest.raises(ValueError, match=r"norm_axes must name axes mapped around the call; got \('modle',\)"):
        attempt(tensor_parallel, TENSOR, norm_axes="modle")
    with pytest.raises(TypeError, match=r"norm_axes must name axes, or be a function .*; got 3"):
        attempt(tensor_parallel, TENSOR, norm_axes=3)
    for penalty in (gradreg.random_sam(rho=0.3), gradreg.sam(rho=0.3).sparse(0.5, choice="random"), gradreg.mup2_sam(rho=0.3)):
        with pytest.raises(ValueError, match=r"norm_axes must be left out for penalties that draw or compare single coordinates"):
            attempt(tensor_parallel, TENSOR, penalty, norm_axes="model")


@checked
@pytest.mark.parametrize("name", ["fgr", "gsam"])
def test_metrics_are_those_of_the_whole_model(name: str, check_vma: bool) -> None:
    params, x = parameters()
    (_, expected), _ = value_and_grad(whole_loss, DIVIDED[name], with_metrics=True)(params, x)
    oracle = value_and_grad(tensor_parallel, DIVIDED[name], norm_axes=axes_of(TENSOR), with_metrics=True)
    specs = {"in_specs": (TENSOR, WHOLE), "out_specs": ((WHOLE, WHOLE), TENSOR), "check_vma": check_vma}
    (_, found), _ = jax.jit(jax.shard_map(oracle, mesh=mesh(2, "model"), **specs))(params, x)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def within(transform: Any, communicate: Any) -> Any:
    """A loss whose communication stands inside another program."""
    return lambda params, x: transform(lambda p: communicate(p, x))(params)


def in_a_loop(fun: Any) -> Any:
    return lambda params: jax.lax.scan(lambda total, _: (total + fun(params), None), 0.0 * fun(params), length=2)[0]


def moving(params: Any, x: Any) -> Any:
    """A part of a matrix from the neighbour, after a change of its type and shape."""
    part = jnp.reshape(params["in"].astype(jnp.float32), (-1, 8))
    return jnp.mean(x) * jnp.sum(jax.lax.ppermute(part, "data", [(i, (i + 1) % 4) for i in range(4)]))


def broadcasting(params: Any, x: Any) -> Any:
    return jnp.mean(x) * jnp.sum(jax.lax.pbroadcast(params["in"], ("model",), 0)) + jnp.sum(params["bias"])


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint, in_a_loop], ids=["jit", "checkpoint", "scan"])
def test_what_is_not_declared_is_found_inside_other_programs(transform: Any) -> None:
    with pytest.raises(ValueError, match=r"norm_axes must .*varies over 'model'"):
        attempt(within(transform, tensor_parallel), TENSOR)
    with pytest.raises(ValueError, match=r"norm_axes must .*fun gathers a parameter over 'data'"):
        attempt(within(transform, gathering), SHARED, axis_name="data")


def test_other_ways_of_communicating_parameters_are_found() -> None:
    with pytest.raises(ValueError, match=r"norm_axes must .*fun gathers a parameter over 'data'"):
        attempt(moving, SHARED, axis_name="data")
    with pytest.raises(ValueError, match=r"norm_axes must .*varies over 'model'"):
        attempt(broadcasting, TENSOR)


def test_models_of_each_device_that_only_know_their_place_are_not_divided() -> None:
    """An index and a mark are no communication; norm_axes=() says the same where there is some."""

    def own(params: Any, x: Any) -> Any:
        marked = jax.lax.pcast(jnp.ones(()), "data", to="varying")
        return jnp.sum((1 + jax.lax.axis_index("data")) * marked * params["in"] ** 2) + 0.0 * jnp.sum(x)

    def told(params: Any, x: Any) -> Any:
        return own(params, x) + 0.0 * jax.lax.psum(1.0 * jax.lax.axis_index("data"), "data")

    params, x = parameters()
    params = {"in": params["in"]}
    expected = 2 * jnp.arange(1.0, 5.0)[:, None] * params["in"]
    expected += 0.5 * 2 * jnp.arange(1.0, 5.0)[:, None] * expected  # g + γ·H·g
    for fun, options in ((own, {}), (told, {"norm_axes": ()})):
        oracle = value_and_grad(fun, gradreg.fgr(gamma=0.5, epsilon=0.5), **options)
        specs = {"in_specs": ({"in": PartitionSpec("data")}, WHOLE), "out_specs": {"in": PartitionSpec("data")}}
        found = jax.jit(jax.shard_map(lambda p, x, oracle=oracle: oracle(p, x)[1], mesh=mesh(4, "data"), **specs))(params, x)
        assert_close(found["in"], expected)
