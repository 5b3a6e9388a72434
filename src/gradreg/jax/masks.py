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
    owners: Mapping[str, type | None] = getattr(among, "owners", {})
    others = {tuple(layers) for *layers, own in map(_parts, owners or among) if own in ("kernel", "embedding")}
    found = {name for name in among if in_norm_layer(name, owners.get(name)) and tuple(_parts(name)[:-1]) not in others}
    if not found:
        raise ValueError(
            "mask=OnlyNorms() needs a selected leaf of params in a module whose class is a normalization layer's (equinox.nn.LayerNorm) or "
            f"in a layer whose name contains 'norm' or begins with 'bn'; got none. Their names look like {next(iter(among))!r}. "
            "Rename the layers, or use parameters= alone."
        )
    return found


class NamedLeaves(dict[str, Any]):
    """Selected leaves by name; ``owners``: for all leaves, selected or not, the class of the module that holds each, if it is one."""

    def __init__(self, selected: Mapping[str, Any], owners: Mapping[str, type | None]) -> None:
        super().__init__(selected)
        self.owners = owners


OTHER_LAYERS = ("proj", "dense", "linear", "conv", "mlp", "attention", "attn", "embed", "weightnorm", "spectralnorm")
"""Parts of the names of layers that are no normalization layers, although "norm" may be in their names too."""


def in_norm_layer(name: str, owner: type | None = None) -> bool:
    """Whether a leaf belongs to a normalization layer, by the class of the module that holds it or by the leaf's path.

    By the class if "norm" is in its name (but not weight and spectral normalization, which hold other layers' weights). Else by its layer's
    name or its own, one that contains "norm" or begins with "bn" and no other kind of layer, in any case: "LayerNorm_0/scale", "bn1/bias".
    """
    if owner is not None and _is_norm(owner.__name__):
        return True
    *layers, own = _parts(name)
    of_another_kind = owner is not None and any(word in owner.__name__.lower() for word in OTHER_LAYERS)
    return _is_norm(own) or (bool(layers) and not of_another_kind and _is_norm(layers[-1]))


def _parts(name: str) -> list[str]:
    """The parts of a leaf's path, in lower case and without the attribute in which NNX's variables hold their array."""
    return [part for part in name.lower().split("/") if part not in ("value", "raw_value")] or [""]


def _is_norm(name: str) -> bool:
    name = name.lower()
    return ("norm" in name or name.startswith("bn")) and not any(word in name.replace("_", "") for word in OTHER_LAYERS)


CONTAINERS = (dict, list, tuple, type(None))


def owners_of(params: Tree) -> list[type | None]:
    """For each leaf, the class of the innermost node that holds it and is no plain container: an Equinox module's."""
    found: list[type | None] = []

    def visit(node: Any, owner: type | None) -> None:
        children = jax.tree_util.default_registry.flatten_one_level(node)
        if children is None:
            found.append(owner)
            return
        inner = owner if isinstance(node, CONTAINERS) else type(node)
        for child in children[0]:
            visit(child, inner)

    visit(params, None)
    return found


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
    owners = {name: owner for (name, _), owner in zip(named, owners_of(params), strict=True)}
    found = selected_parameters(mask, NamedLeaves({name: leaf for (name, leaf), kept in zip(named, selected, strict=True) if kept}, owners))
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

    zero = (
        sum(jnp.sum(ordered(leaf), dtype=integer) for leaf in kept) & 0
    )  # computed from the leaves, so that shard_map marks it as varying as they are
    bound = jax.lax.fori_loop(0, highest + 1, narrowed, zero)
    return structure.unflatten([None if leaf is None else ordered(leaf) >= bound for leaf in leaves])


def masked(vectors: Tree, masks: Sequence[jax.Array | None]) -> Tree:
    """``vectors`` with zeros in coordinates that are not perturbed; leaves without a mask are unchanged."""
    leaves, structure = jax.tree.flatten(vectors)
    return structure.unflatten([leaf if mask is None else jnp.where(mask, leaf, 0) for leaf, mask in zip(leaves, masks, strict=True)])


def _unknown(mask: Mask) -> TypeError:
    return TypeError(f"mask must be one that the JAX engine knows; got {checks.describe(mask)}. Register a function for it.")
