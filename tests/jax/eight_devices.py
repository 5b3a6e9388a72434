"""Data parallelism on eight devices; ``test_data_parallel.py`` runs this in a process whose jax is told of eight before it starts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import gradreg
from gradreg import GradientPenalty
from gradreg.jax import microbatched, value_and_grad
from gradreg.jax.regularizer import Scope
from tests.penalties import PENALTIES, sampled

from .cases import Loss, arrays, assert_close, first_state, problem, squared_error
from .twin import Twin

pytestmark = pytest.mark.usefixtures("x64")

WHOLE, SPLIT = PartitionSpec(), PartitionSpec("batch")
checked = pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
SOME = ["sam", "gnp-unit", "fgr-mixing", "cgr", "exact-norm", "sam-zero-warm-up", "random", "gsam"]


def some_penalties(*sample: str) -> pytest.MarkDecorator:
    """``sample``, where the devices concern the evaluations and not what is made of them; all of ``SOME`` under ``--soak``."""
    return pytest.mark.parametrize("name", sampled(SOME, sample))


scopes = pytest.mark.parametrize("scope", ["local", "global"])


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), ("batch",))


def batch() -> tuple[Any, jax.Array, jax.Array]:
    """Parameters, and two examples for each of the eight shards."""
    params, _, _ = problem()
    x, y = map(jnp.asarray, arrays((16, 3), (16, 2), seed=5))
    return params, x, 2 * y


def mapped(oracle: Callable[..., Any], *, check_vma: bool = True) -> Callable[..., Any]:
    def shard(params: Any, x: Any, y: Any, step: Any, state: Any) -> Any:
        return oracle(params, x, y, step=step, **state)

    specs = {"in_specs": (WHOLE, SPLIT, SPLIT, WHOLE, WHOLE), "out_specs": WHOLE}
    return jax.jit(jax.shard_map(shard, mesh=mesh(), check_vma=check_vma, **specs))


@cache
def losses(scope: str, *, rows: int = 2) -> list[Loss]:
    """local: each shard's own, on the first ``rows`` of its two examples; global: that of the whole batch."""
    _, x, y = batch()
    parts = [slice(16)] if scope == "global" else [slice(2 * i, 2 * i + rows) for i in range(8)]
    compiled = jax.jit(squared_error)  # once for all shards
    return [lambda at, part=part: compiled(at, x[part], y[part]) for part in parts]


@cache
def expected(penalty: GradientPenalty, scope: str, step: int) -> Any:
    """local: the mean of the shards' own regularized gradients; global: that of the whole batch."""
    return Twin(penalty).step(losses(scope), batch()[0], step)


def test_there_are_eight_devices() -> None:
    assert jax.device_count() == 8


KINDS = [
    "sam",
    "gnp-unit",
    "fgr-mixing",
    "bgr",
    "cgr",
    "exact-norm",
    "sam-zero-warm-up",
    "asam",
    "friendly",
    "friendly-mixing",
    "remembered",
]
KINDS += ["random", "sparse-fisher", "sparse-random", "sam-3-steps", "gsam", "gap-remembered", "wsam-decoupled", "looksam", "sam-every-2"]
"""One of each kind: what differs in numbers alone is the same program."""
LOCAL = set(KINDS) - {"bgr", "asam", "friendly-mixing", "sparse-random", "gap-remembered", "sam-every-2"}
"""One of each plan, of each memory and of each part that shards decide on together."""
GLOBAL = {"sam", "exact-norm", "friendly"}
"""Passes, a derivative and a memory: all but the evaluation is as on one device."""


@pytest.mark.parametrize(
    ("name", "scope"),
    sampled(
        [(name, scope) for scope in ("local", "global") for name in KINDS],
        [*((name, "local") for name in LOCAL), *((name, "global") for name in GLOBAL)],
    ),
)
def test_scopes_under_shard_map(name: str, scope: Scope) -> None:
    """Over two steps whose memories, the same on every shard, are carried on."""
    penalty = PENALTIES[name]
    params, x, y = batch()
    oracle, twin = value_and_grad(squared_error, penalty, axis_name="batch", scope=scope), Twin(penalty)
    run, state = mapped(oracle), first_state(oracle, params)
    for step in (0, 1):
        value, gradients, *following = run(params, x, y, jnp.int32(step), state)
        assert_close(gradients, twin.step(losses(scope), params, step))
        if penalty.direction.needs_gradient:
            np.testing.assert_allclose(value, squared_error(params, x, y), rtol=1e-13)
        for memory in following:
            state = {"state": memory}
    if penalty.decoupled:
        assert_close(state["state"]["correction"], twin.correction)


@scopes
@some_penalties("exact-norm", "sam-zero-warm-up")
def test_scopes_without_the_check_of_replication(name: str, scope: Scope) -> None:
    params, x, y = batch()
    run = mapped(value_and_grad(squared_error, PENALTIES[name], axis_name="batch", scope=scope), check_vma=False)
    assert_close(run(params, x, y, jnp.int32(50), {})[1], expected(PENALTIES[name], scope, 50))


@scopes
@some_penalties("sam", "exact-norm")
def test_scopes_under_vmap(name: str, scope: Scope) -> None:
    params, x, y = batch()
    penalty = PENALTIES[name]
    oracle = value_and_grad(squared_error, penalty, axis_name="batch", scope=scope)
    shards = [a.reshape(8, 2, -1) for a in (x, y)]
    _, gradients = jax.vmap(lambda x, y: oracle(params, x, y, step=jnp.int32(50)), axis_name="batch")(*shards)
    for shard in range(8):
        assert_close(jax.tree.map(lambda leaf, s=shard: leaf[s], gradients), expected(penalty, scope, 50))


def test_the_scopes_differ() -> None:
    local, whole = (expected(gradreg.sam(rho=0.3), scope, 0) for scope in ("local", "global"))
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (local, whole)), strict=True)) > 0.01


ALL_REDUCES = {
    ("plain", "local"): 1,
    ("plain", "global"): 1,
    ("sam", "local"): 1,
    ("sam", "global"): 2,
    ("fgr-mixing", "local"): 1,
    ("fgr-mixing", "global"): 2,
    ("cgr", "local"): 1,
    ("cgr", "global"): 2,
    ("sam-zero-warm-up", "local"): 1,
    ("friendly", "local"): 2,
    ("friendly", "global"): 2,
    ("remembered", "local"): 1,
    ("remembered", "global"): 1,
    ("looksam", "local"): 1,
    ("gsam", "local"): 1,
}
UNCHECKED = {("plain", "local"), ("sam", "local"), ("sam", "global")}


@pytest.mark.parametrize(
    ("name", "scope", "check_vma"),
    sampled(
        [(*case, check) for case in ALL_REDUCES for check in (True, False)],
        [*((*case, True) for case in ALL_REDUCES), *((*case, False) for case in UNCHECKED)],
    ),
)
def test_all_reduces_of_the_compiled_program(name: str, scope: Scope, check_vma: bool) -> None:
    penalty = None if name == "plain" else PENALTIES[name]
    oracle = value_and_grad(squared_error, penalty, axis_name="batch", scope=scope)
    program = mapped(oracle, check_vma=check_vma).lower(*batch(), jnp.int32(50), first_state(oracle, batch()[0])).compile().as_text()
    assert sum("all-reduce(" in line or "all-reduce-start(" in line for line in program.splitlines()) == ALL_REDUCES[name, scope]


@checked
@scopes
def test_no_penalty(scope: Scope, check_vma: bool) -> None:
    params, x, y = batch()
    run = mapped(value_and_grad(squared_error, None, axis_name="batch", scope=scope), check_vma=check_vma)
    assert_close(run(params, x, y, 0, {})[1], jax.grad(squared_error)(params, x, y))


@checked
@scopes
def test_micro_batches_of_shards(scope: Scope, check_vma: bool) -> None:
    penalty = gradreg.fgr(gamma=0.2, epsilon=0.5)

    def shard(params: Any, x: Any, y: Any, step: Any) -> Any:
        return oracle(params, x.reshape(2, 1, 3), y.reshape(2, 1, 2), step=step)

    oracle = value_and_grad(microbatched(squared_error), penalty, axis_name="batch", scope=scope)
    specs = {"in_specs": (WHOLE, SPLIT, SPLIT, WHOLE), "out_specs": WHOLE}
    run = jax.jit(jax.shard_map(shard, mesh=mesh(), check_vma=check_vma, **specs))
    assert_close(run(*batch(), 0)[1], expected(penalty, scope, 0))


@checked
def test_direction_from_a_part_of_each_shard(check_vma: bool) -> None:
    penalty = gradreg.sam(rho=0.3)
    oracle = value_and_grad(squared_error, penalty, ascent=lambda p, x, y: squared_error(p, x[:1], y[:1]), axis_name="batch")
    there = Twin(penalty).step(losses("local"), batch()[0], ascents=losses("local", rows=1))
    assert_close(mapped(oracle, check_vma=check_vma)(*batch(), 0, {})[1], there)


@scopes
@pytest.mark.parametrize("penalty", [None, gradreg.fgr(gamma=0.2, epsilon=0.5)], ids=["plain", "fgr"])
def test_metrics_are_means_over_the_shards(penalty: GradientPenalty | None, scope: Scope) -> None:
    """local: of the norms and cosines of each shard's own gradients; global: those of the whole batch."""
    params, x, y = batch()
    oracle = value_and_grad(squared_error, penalty, axis_name="batch", scope=scope, with_metrics=True)
    (_, metrics), _ = mapped(oracle)(params, x, y, jnp.int32(0), {})
    norms, cosines = [], []
    for loss in losses(scope):
        g = jax.grad(loss)(params)
        moved = jax.grad(loss)(jax.tree.map(lambda p, d: p + 0.5 * d, params, g))
        g, moved = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (g, moved))
        norms.append(jnp.linalg.norm(g))
        cosines.append(jnp.nan if penalty is None else g @ moved / jnp.linalg.norm(g) / jnp.linalg.norm(moved))
    np.testing.assert_allclose((metrics.gradient_norm, metrics.cosine), (np.mean(norms), np.mean(cosines)), rtol=1e-12)


def test_aux_stays_each_shards_own() -> None:
    def fun(params: Any, x: Any, y: Any) -> Any:
        return squared_error(params, x, y), x[:1]

    oracle = value_and_grad(fun, gradreg.sam(rho=0.3), has_aux=True, axis_name="batch")

    def shard(params: Any, x: Any, y: Any) -> Any:
        (_, aux), gradients = oracle(params, x, y)
        return aux, gradients

    params, x, y = batch()
    run = jax.jit(jax.shard_map(shard, mesh=mesh(), in_specs=(WHOLE, SPLIT, SPLIT), out_specs=(SPLIT, WHOLE)))
    np.testing.assert_array_equal(run(params, x, y)[0], x[::2])


@scopes
@pytest.mark.parametrize("penalty", [gradreg.sam(rho=0.3), gradreg.exact(gamma=0.3)], ids=["sam", "exact"])
def test_parameters_that_are_each_shards_own_already(penalty: GradientPenalty, scope: Scope) -> None:
    """Marked as varying by the caller, and over two axes of which one is."""
    params, x, y = batch()
    grid = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "host"))
    axes = ("data", "host")
    oracle = value_and_grad(squared_error, penalty, axis_name=axes, scope=scope)

    def shard(params: Any, x: Any, y: Any) -> Any:
        return oracle(jax.lax.pcast(params, "data", to="varying"), x, y)[1]

    specs = {"in_specs": (WHOLE, PartitionSpec(axes), PartitionSpec(axes)), "out_specs": WHOLE}
    assert_close(jax.jit(jax.shard_map(shard, mesh=grid, **specs))(params, x, y), expected(penalty, scope, 0))


@some_penalties("exact-norm", "random", "gsam")
def test_sharded_arrays_under_plain_jit(name: str) -> None:
    """Batch over the devices and weights over the devices too: one global norm, and gradients sharded as the weights are."""

    penalty = PENALTIES[name]

    def loss(params: Any, x: Any) -> Any:
        return jnp.mean(jnp.tanh(jnp.tanh(x @ params["in"]) @ params["out"]) ** 2)

    weights_in, weights_out, x = map(jnp.asarray, arrays((4, 16), (16, 3), (8, 4)))
    params = {"in": weights_in, "out": weights_out}
    shardings = {"in": NamedSharding(mesh(), PartitionSpec(None, "batch")), "out": NamedSharding(mesh(), SPLIT)}
    placed = jax.device_put(params, shardings)
    run = jax.jit(partial(value_and_grad(loss, penalty), step=50), out_shardings=(None, shardings))
    _, gradients = run(placed, jax.device_put(x, NamedSharding(mesh(), SPLIT)))
    assert_close(gradients, Twin(penalty).step([lambda at: loss(at, x)], params, 50))
    assert jax.tree.map(lambda g: g.sharding.spec, gradients) == jax.tree.map(lambda s: s.spec, shardings)


@pytest.mark.parametrize("name", ["friendly", "sparse-fisher", "looksam", "wsam-decoupled"])
def test_memories_of_sharded_arrays_are_sharded_as_the_parameters_are(name: str) -> None:
    """Two steps under plain jit against the twin, the state donated."""
    penalty = PENALTIES[name]

    def loss(weights: Any, x: Any) -> Any:
        return jnp.mean(jnp.tanh(x @ weights) ** 2)

    weights, x = map(jnp.asarray, arrays((16, 3), (8, 16)))
    sharding = NamedSharding(mesh(), SPLIT)
    placed, oracle, twin = jax.device_put(weights, sharding), value_and_grad(loss, penalty), Twin(penalty)
    run = jax.jit(lambda weights, x, step, state: oracle(weights, x, step=step, state=state), donate_argnames="state")
    state = oracle.init(placed)
    for step in range(2):
        whole = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == weights.shape]
        assert all(leaf.sharding.is_equivalent_to(sharding, 2) for leaf in whole)
        assert whole
        _, gradients, state = run(placed, x, jnp.int32(step), state)
        assert_close(gradients, twin.step([lambda at: loss(at, x)], weights, step))


def test_a_fisher_mask_of_each_device_for_itself() -> None:
    """Without ``axis_name`` every device trains a model of its own, here from a start of its own."""
    penalty = PENALTIES["sparse-fisher"]
    oracle = value_and_grad(squared_error, penalty)
    params, x, y = batch()
    starts = jax.tree.map(lambda leaf: jnp.stack([(1 + i / 8) * leaf for i in range(8)]), params)

    def shard(params: Any, state: Any) -> Any:
        own, state = jax.tree.map(lambda leaf: leaf[0], (params, state))
        return jax.tree.map(lambda leaf: leaf[None], oracle(own, x, y, step=0, state=state)[1])

    run = jax.jit(jax.shard_map(shard, mesh=mesh(), in_specs=SPLIT, out_specs=SPLIT))
    gradients = run(starts, jax.vmap(oracle.init)(starts))
    for i in (0, 7):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], starts)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], gradients), Twin(penalty).step(losses("global"), own))


def test_an_axis_of_another_name() -> None:
    run = mapped(value_and_grad(squared_error, gradreg.sam(rho=0.3), axis_name="data"))
    with pytest.raises(ValueError, match=r"axis_name must name an axis mapped around the call; got 'data', which is not bound here"):
        run(*batch(), 0, {})
