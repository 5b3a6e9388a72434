"""Data parallelism over a named axis: gradients of one shard, and their mean over the shards."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax

from gradreg import checks

AxisName: TypeAlias = "str | tuple[str, ...]"


def axis_names(value: AxisName | None) -> tuple[str, ...]:
    """``value``, None or one or several names of mapped axes, as a tuple."""
    names = () if value is None else value if isinstance(value, tuple) else (value,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"axis_name must be a string, a tuple of strings or None; got {checks.describe(value)}. Write axis_name='batch', say."
        )
    return names


def check_bound(axes: tuple[str, ...]) -> None:
    """``ValueError`` if one of ``axes`` is not mapped where this is traced."""
    for axis in axes:
        try:
            jax.lax.axis_size(axis)
        except NameError as error:
            raise ValueError(
                f"axis_name must name an axis mapped around the call; got {axis!r}, which is not bound here. "
                "Call the function inside jax.shard_map or jax.vmap(..., axis_name=...) over that axis, or leave axis_name out: sharded "
                "arrays under plain jit need none."
            ) from error


def per_shard(params: Any, axes: tuple[str, ...]) -> Any:
    """``params`` marked as each shard's own, so that a gradient by them is this shard's.

    Without the mark, ``shard_map`` differentiates replicated parameters to the sum of all shards' gradients.
    """

    def mark(leaf: Any) -> Any:
        for axis in axes:
            try:
                leaf = jax.lax.pcast(leaf, axis, to="varying")
            except ValueError:  # marked already, or mapped by vmap, which keeps no marks
                continue
        return leaf

    return jax.tree.map(mark, params)


def varying(leaf: Any) -> frozenset[str]:
    """The mapped axes over which ``leaf`` varies, by its type; empty where ``shard_map`` does not track that."""
    kind: Any = jax.typeof(leaf)
    return frozenset(kind.mat.varying)


def mean(tree: Any, axes: tuple[str, ...]) -> Any:
    """The mean of ``tree`` over ``axes``; one all-reduce."""
    return jax.lax.pmean(tree, axes) if axes else tree
