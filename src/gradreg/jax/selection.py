"""Which leaves of the parameters are perturbed and counted in the norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gradreg import checks
from gradreg.jax.masks import in_norm_layer
from gradreg.jax.perturbation import Tree
from gradreg.masks import Mask, OnlyNorms


def selection(params: Tree, parameters: Callable[[str, Any], bool] | None, mask: Mask | None) -> list[bool]:
    """For each leaf of ``params``, checked to be a real floating array, whether ``parameters`` and an ``OnlyNorms`` mask choose it."""
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    for name, leaf in named:
        _check_real(name, leaf)
    chosen = [parameters is None or bool(parameters(name, leaf)) for name, leaf in named]
    example = f" Their names look like {named[0][0]!r}." if named else ""
    if not any(chosen):
        raise ValueError(f"parameters must select at least one leaf of params, which has {len(named)}; got none.{example}")
    if isinstance(mask, OnlyNorms):
        chosen = [kept and in_norm_layer(name) for kept, (name, _) in zip(chosen, named, strict=True)]
        if not any(chosen):
            raise ValueError(
                "mask=OnlyNorms() needs a selected leaf of params with a part of its path that contains 'norm' or begins with 'bn'; "
                f"got none.{example} Rename the layers, or use parameters= alone."
            )
    return chosen


def _check_real(name: str, leaf: Any) -> None:
    dtype = getattr(leaf, "dtype", type(leaf))
    if dtype is not float and not (hasattr(leaf, "dtype") and jnp.issubdtype(dtype, jnp.floating)):
        got = f"dtype {dtype}" if hasattr(leaf, "dtype") else checks.describe(leaf)
        raise TypeError(
            f"params must hold real floating arrays only; got {got} at {name!r}. Keep what is not trained out of params: pass it as "
            "another argument, or partition the model (equinox.partition, flax.nnx.split)."
        )
