"""The state that a penalty passes from step to step: a dictionary of arrays of fixed structure, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from gradreg.held_out import HeldOut
from gradreg.jax.held_out import initial_help
from gradreg.jax.norms import Tree, widened
from gradreg.penalties import GradientPenalty

State: TypeAlias = dict[str, Any]
"""By kind, trees like the parameters, with None for leaves that are not perturbed where only those are kept, and scalars."""

AVERAGE = "average"
"""The exponential moving average (EMA) of gradients or of results that the direction declares, of the leaves that are perturbed."""

MASK, PERIOD = "mask", "period"
"""The coordinates that a mask chose from gradients, and the number of that refresh; −1 before the first."""

REUSED = "reused"
"""The part of the penalised gradient orthogonal to the plain one (``Reuse``)."""

RADIUS = "radius"
"""The state of a radius that sets itself: scalars, under the names of the rule's own state, as ``gradreg.auto_radius.RadiusState``."""

HELD_OUT = "held_out"
"""The switch that held-out data move: scalars, under the names of ``gradreg.held_out.HelpState``, two more, and those of "noise"."""

CORRECTION = "correction"
"""What a decoupled penalty leaves to be applied to the parameters separately from the optimizer."""


def carries_state(penalty: GradientPenalty | None) -> bool:
    """Whether steps pass on a state: that of a part, or the second half of a decoupled result."""
    return penalty is not None and (penalty.has_memory or penalty.decoupled)


def initial(penalty: GradientPenalty, params: Tree, selected: Sequence[bool], held_out: HeldOut | None = None) -> State:
    """The state before the first step: zeros of at least 32 bits, because small changes would be rounded away in fewer."""
    leaves, structure = jax.tree.flatten(params)

    def zeros(which: Sequence[bool], dtype: Any = None) -> Tree:
        kept = zip(leaves, which, strict=True)
        return structure.unflatten([jnp.zeros_like(widened(leaf), dtype=dtype) if wanted else None for leaf, wanted in kept])

    state: State = {}
    if penalty.direction.averages is not None:
        state[AVERAGE] = zeros(selected)
    if penalty.mask is not None and penalty.mask.needs_gradient:
        state[MASK], state[PERIOD] = zeros(selected, bool), jnp.full((), -1, jnp.int32)
    if penalty.reuse is not None:
        state[REUSED] = zeros([True] * len(leaves))
    if penalty.auto_radius is not None:
        dtype = jnp.result_type(*(widened(leaf) for leaf, wanted in zip(leaves, selected, strict=True) if wanted))
        start = penalty.auto_radius.initial
        state[RADIUS] = {name: jnp.asarray(value, jnp.int32 if name == "steps" else dtype) for name, value in start._asdict().items()}
    if held_out is not None:
        state[HELD_OUT] = initial_help(held_out, params)
    if penalty.decoupled:
        state[CORRECTION] = zeros([True] * len(leaves))
    return state


def radius_of(state: State) -> Any:
    """The radius of the next step, where it sets itself; else None."""
    return jnp.exp(state[RADIUS]["log_radius"]) if RADIUS in state else None


def check_state(state: Any, penalty: GradientPenalty, params: Tree, selected: Sequence[bool], held_out: HeldOut | None = None) -> None:
    """Raise unless ``state`` has the form of ``initial``.

    Raises:
        TypeError: ``state`` was not given.
        ValueError: one of another structure, shape or dtype.
    """
    if state is None:
        raise TypeError(
            f"state must be given for a penalty that carries one from step to step, {penalty}; got None. "
            "Call .init(params) once, and pass on what each step returns."
        )
    expected = jax.eval_shape(lambda at: initial(penalty, at, selected, held_out), params)
    ours, theirs = jax.tree.structure(expected), jax.tree.structure(state)
    if ours != theirs:
        raise ValueError(
            f"state must be what .init(params) or the step before returned, of the structure {ours}; got {theirs}. "
            "Build it for the same penalty, parameters and selection."
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(state), strict=True)
    for (path, like), leaf in pairs:
        if (jnp.shape(leaf), jnp.result_type(leaf)) != (like.shape, like.dtype):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"state must hold {like.dtype} of shape {like.shape} at {name!r}; got {jnp.result_type(leaf)} of shape {jnp.shape(leaf)}. "
                "Build it with .init(params) of the same parameters."
            )


def leaves_like(params: Tree, kept: Tree) -> list[Any]:
    """The leaves of ``kept``, a tree like ``params``, in the order of those of ``params``; None where it has none."""
    return jax.tree.structure(params).flatten_up_to(kept)


def filled(params: Tree, kept: Tree) -> Tree:
    """``kept`` with the leaves of ``params`` where it has none."""
    return jax.tree.map(lambda leaf, own: leaf if own is None else own, params, kept)


def update_ema(state: State, decay: float, gradients: Tree) -> State:
    """``state`` with ``decay·m + (1 − decay)·gradients`` for its average m."""
    pairs = zip(leaves_like(gradients, state[AVERAGE]), jax.tree.leaves(gradients), strict=True)
    averages = [None if m is None else (decay * m + (1.0 - decay) * widened(g)).astype(m.dtype) for m, g in pairs]
    return {**state, AVERAGE: jax.tree.structure(gradients).unflatten(averages)}


def with_dtypes_of(kept: Tree, tree: Tree) -> Tree:
    """``tree`` in the dtypes of ``kept``, which it replaces in the state."""
    return jax.tree.map(lambda leaf, before: leaf.astype(before.dtype), tree, kept)
