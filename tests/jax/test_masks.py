"""Which coordinates are chosen: names of normalization layers, the largest elements of all leaves together, and draws."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradreg
from gradreg import Sparse
from gradreg.hashing import hashed
from gradreg.jax import value_and_grad
from gradreg.jax.draws import chosen, signs
from gradreg.jax.masks import MaskInputs, coordinates, in_norm_layer, largest, selected_leaves

from .cases import arrays


@pytest.mark.parametrize("name", ["LayerNorm_0/scale", "params/BatchNorm_1/bias", "layers/3/norm/weight", "bn1/bias", "stem/BN/scale"])
def test_leaves_of_normalization_layers(name: str) -> None:
    assert in_norm_layer(name)


@pytest.mark.parametrize(
    "name",
    [
        "Dense_0/kernel",
        "0/weight",
        "subnet/kernel",
        "",
        "embedding",
        "prenorm_proj/kernel",
        "PreNorm_0/Dense_0/kernel",
        "weight_norm/scale",
    ],
)
def test_other_leaves(name: str) -> None:
    assert not in_norm_layer(name)


def chosen_names(params: Any) -> set[str]:
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return {name for name, chosen in zip(names, selected_leaves(params, None, gradreg.OnlyNorms()), strict=True) if chosen}


def test_a_layer_with_a_kernel_is_no_normalization_layer() -> None:
    dense, norm = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, {"scale": jnp.ones(2), "bias": jnp.ones(2)}
    tokens = {"embedding": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    assert chosen_names({"norm_gate": dense, "prenorm_proj": dense, "norm_tokens": tokens, "norm": norm}) == {"norm/scale", "norm/bias"}


def test_normalization_layers_of_equinox_are_found_by_their_class() -> None:
    eqx = pytest.importorskip("equinox")
    linear = eqx.nn.Linear(2, 2, key=jax.random.key(0))
    layers = {
        "first": eqx.nn.LayerNorm(2),
        "stack": [eqx.nn.RMSNorm(2, use_bias=False), linear],
        "norm": linear,
        "prenorm_proj": linear,
        "weights": eqx.nn.WeightNorm(linear),
    }
    params = eqx.filter(layers, eqx.is_inexact_array)
    assert chosen_names(params) == {"first/weight", "first/bias", "stack/0/weight"}


def test_normalization_layers_of_nnx_are_found_by_their_name() -> None:
    nnx = pytest.importorskip("flax.nnx")
    layers = nnx.Dict(norm=nnx.LayerNorm(2, rngs=nnx.Rngs(0)), norm_gate=nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    names = {name.removesuffix("/value") for name in chosen_names(nnx.state(layers, nnx.Param))}
    assert names == {"norm/scale", "norm/bias"}


def test_only_norms_moves_nothing_else() -> None:
    seen = []

    def loss(params: Any) -> Any:
        jax.debug.callback(lambda dense, norm: seen.append((float(dense), float(norm))), params["dense"], params["norm"])
        return params["dense"] ** 2 + params["norm"] ** 2

    value_and_grad(loss, gradreg.sam(rho=0.5).only_norms())({"dense": 1.0, "norm": 1.0})
    jax.effects_barrier()
    assert sorted(seen) == [(1.0, 1.0), (1.0, 1.5)]


def test_only_norms_without_norms() -> None:
    message = r"mask=OnlyNorms\(\) needs a selected leaf.*got none\. Their names look like 'dense'\. Rename the layers"
    with pytest.raises(ValueError, match=message):
        value_and_grad(lambda p: jnp.sum(p["dense"]), gradreg.sam(rho=0.5).only_norms())({"dense": jnp.ones(3)})


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
@pytest.mark.usefixtures("x64")
def test_the_largest_of_all_leaves_together(share: float, dtype: Any) -> None:
    tree = [jnp.asarray(a, dtype) for a in arrays((7, 11), (13,), (5,))]
    masks = jax.jit(lambda tree: largest(share, tree, [True, True, False]))(tree)
    assert masks[2] is None
    magnitudes = np.concatenate([np.abs(np.asarray(leaf, np.float64)).ravel() for leaf in tree[:2]])
    bound = np.sort(magnitudes)[-max(1, round(share * 90))]
    np.testing.assert_array_equal(np.concatenate([np.ravel(m) for m in masks[:2]]), magnitudes >= bound)


def test_ties_with_the_smallest_are_chosen_too() -> None:
    (mask,) = largest(0.5, [jnp.array([1.0, -2.0, 2.0, 2.0])], [True])
    assert mask is not None
    assert mask.tolist() == [False, True, True, True]


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_draws_are_those_of_the_hash(seed: int) -> None:
    like = jnp.zeros((7, 11))
    words = [hashed(hashed(hashed(seed, 7), 2), i) for i in range(77)]
    assert signs(seed, jnp.int32(7), 2, like).ravel().tolist() == [1.0 if words[i // 32] >> (i % 32) & 1 else -1.0 for i in range(77)]
    assert chosen(0.4, seed, 7, 2, like).ravel().tolist() == [word < 0.4 * 2**32 for word in words]
    assert chosen(1.0, seed, 7, 2, like).all()


def test_a_random_choice_keeps_its_share_and_changes_at_a_refresh() -> None:
    mask, params = Sparse(sparsity=0.75, choice="random", every=3), {"w": jnp.zeros((100, 100)), "fixed": jnp.zeros(2)}
    at = [coordinates(mask, MaskInputs(params, None, step // mask.refresh_every, [False, True])) for step in (0, 2, 3)]
    assert at[0]["fixed"] is None
    first, second, third = (np.asarray(masks["w"]) for masks in at)
    assert first.mean() == pytest.approx(0.25, abs=0.015)  # 3.5 standard deviations
    assert (first == second).all()
    assert (first & third).mean() == pytest.approx(0.0625, abs=0.01)
