"""Which leaves are perturbed and counted in the norm, and which of their coordinates are perturbed.

One function for each mask, found by its type: in ``selected_parameters`` for a mask whose ``level`` is "parameters", in ``coordinates``
for one whose ``level`` is "coordinates".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import jax
import jax.numpy as jnp

from gradreg import checks
from gradreg.jax.draws import chosen
from gradreg.jax.norms import Tree, widened
from gradreg.masks import Mask, OnlyNorms, Sparse


@singledispatch
def selected_parameters(mask: Mask, among: Mapping[str, Any]) -> set[str]:
    """The names of the leaves that a mask of level "parameters" chooses, to be perturbed and counted in the norm.

    Args:
        mask: the specification.
        among: the leaves that it may choose, by name: their paths joined by "/".

    Raises:
        ValueError: it finds none.
    """
    raise _unknown(mask)


@selected_parameters.register
def _(mask: OnlyNorms, among: Mapping[str, Any]) -> set[str]:
    found = {name for name in among if in_norm_layer(name)}
    if not found:
        raise ValueError(
            "mask=OnlyNorms() needs a selected leaf of params with a part of its path that contains 'norm' or begins with 'bn'; "
            f"got none. Their names look like {next(iter(among))!r}. Rename the layers, or use parameters= alone."
        )
    return found


def in_norm_layer(name: str) -> bool:
    """Whether a part of a leaf's path contains "norm" or begins with "bn", in any case: "LayerNorm_0/scale", "bn1/bias"."""
    return any("norm" in part or part.startswith("bn") for part in name.lower().split("/"))


def selected_leaves(params: Tree, parameters: Callable[[str, Any], bool] | None, mask: Mask | None) -> list[bool]:
    """For each leaf of ``params``, checked to be a real floating array, whether ``parameters`` and the mask choose it."""
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    for name, leaf in named:
        _check_real(name, leaf)
    selected = [parameters is None or bool(parameters(name, leaf)) for name, leaf in named]
    if not any(selected):
        example = f" Their names look like {named[0][0]!r}." if named else ""
        raise ValueError(f"parameters must select at least one leaf of params, which has {len(named)}; got none.{example}")
    if mask is None or mask.level != "parameters":
        return selected
    found = selected_parameters(mask, {name: leaf for (name, leaf), kept in zip(named, selected, strict=True) if kept})
    selected = [kept and name in found for (name, _), kept in zip(named, selected, strict=True)]
    if not any(selected):
        raise ValueError(f"mask={mask} must choose at least one selected leaf of params; got none. Use parameters= alone.")
    return selected


def _check_real(name: str, leaf: Any) -> None:
    dtype = getattr(leaf, "dtype", type(leaf))
    if dtype is not float and not (hasattr(leaf, "dtype") and jnp.issubdtype(dtype, jnp.floating)):
        got = f"dtype {dtype}" if hasattr(leaf, "dtype") else checks.describe(leaf)
        raise TypeError(
            f"params must hold real floating arrays only; got {got} at {name!r}. Keep what is not trained out of params: pass it as "
            "another argument, or partition the model (equinox.partition, flax.nnx.split)."
        )


@dataclass(frozen=True)
class MaskInputs:
    """What a choice of coordinates is made from. Trees have the structure of the parameters.

    Args:
        params: θ.
        gradients: the gradient that the direction is formed from, the same on all shards, for a mask that declares ``needs_gradient``;
            else None.
        refresh: which refresh it is, ``step // mask.refresh_every``: an int or a traced integer.
        selected: for each leaf, in the order of ``jax.tree.leaves``, whether it is perturbed at all.
    """

    params: Tree
    gradients: Tree | None
    refresh: Any
    selected: Sequence[bool]


@singledispatch
def coordinates(mask: Mask, inputs: MaskInputs) -> Tree:
    """Whether each coordinate is perturbed: a tree of boolean arrays like the parameters; leaves not ``inputs.selected`` are ignored."""
    raise _unknown(mask)


@coordinates.register
def _(mask: Sparse, inputs: MaskInputs) -> Tree:
    share = 1.0 - mask.sparsity
    if mask.choice == "fisher":
        return largest(share, inputs.gradients, inputs.selected)
    leaves, structure = jax.tree.flatten(inputs.params)
    numbered = enumerate(zip(leaves, inputs.selected, strict=True))
    return structure.unflatten(
        [chosen(share, mask.seed, inputs.refresh, i, jnp.asarray(leaf)) if counted else None for i, (leaf, counted) in numbered]
    )


def largest(share: float, gradients: Tree, selected: Sequence[bool]) -> Tree:
    """Whether each element is among the ``share`` of largest magnitude of all ``selected`` leaves together, ties included.

    None for a leaf that is not selected.
    """
    # The smallest kept magnitude is found by bisection over its bits: non-negative floats have the same order as the integers with the
    # same bits, so setting one bit after the other from the highest needs 31 or 63 counts. A sort would first have to gather all
    # leaves, sharded or not, into one array.
    every, structure = jax.tree.flatten(gradients)
    leaves = [widened(leaf) if counted else None for leaf, counted in zip(every, selected, strict=True)]
    kept = [leaf for leaf in leaves if leaf is not None]
    dtype = jnp.result_type(*kept)
    integer, highest = (jnp.uint64, 62) if dtype == jnp.float64 else (jnp.uint32, 30)

    def ordered(leaf: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(jnp.abs(leaf).astype(dtype), integer)

    wanted = max(1, round(share * sum(leaf.size for leaf in kept)))

    def narrowed(i: Any, bound: jax.Array) -> jax.Array:
        # Keep the bit if enough elements remain at or above the bound with it.
        candidate = bound | (jnp.ones((), integer) << (highest - i).astype(integer))
        count = sum(jnp.sum(ordered(leaf) >= candidate, dtype=jnp.uint32) for leaf in kept)
        return jnp.where(count >= wanted, candidate, bound)

    zero = sum(jnp.sum(ordered(leaf)) for leaf in kept) & 0  # computed from the leaves, so that shard_map marks it as varying as they are
    bound = jax.lax.fori_loop(0, highest + 1, narrowed, zero)
    return structure.unflatten([None if leaf is None else ordered(leaf) >= bound for leaf in leaves])


def masked(vectors: Tree, masks: Sequence[jax.Array | None]) -> Tree:
    """``vectors`` with zeros in coordinates that are not perturbed; leaves without a mask are unchanged."""
    leaves, structure = jax.tree.flatten(vectors)
    return structure.unflatten([leaf if mask is None else jnp.where(mask, leaf, 0) for leaf, mask in zip(leaves, masks, strict=True)])


def _unknown(mask: Mask) -> TypeError:
    return TypeError(f"mask must be one that the JAX engine knows; got {checks.describe(mask)}. Register a function for it.")
