"""How the gradients of a step become its result: one function for each mixing, found by its type; and ``Reuse`` and ``decoupled``.

A mixing that is a weighted sum ("summed" or "normalized" by its ``plain_gradient``) has an entry in ``weigh_plain``, one that needs the
plain gradient in addition to the sum ("apart") in ``mix``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import jax
import jax.numpy as jnp

from gradreg import checks
from gradreg.jax.norms import Tree, inner_product, safe_ratio, widened
from gradreg.jax.perturbation import weighted_sum
from gradreg.mixing import ClipEach, GradientMixing, Plain, SurrogateGap, Unit


@singledispatch
def weigh_plain(mixing: GradientMixing, weight: Any, norm: jax.Array | None) -> Any:
    """The factor with which the plain gradient g enters the weighted sum.

    Args:
        mixing: one whose ``plain_gradient`` is "summed" or "normalized".
        weight: that of the finite difference: 1 − c, or 1 + c.
        norm: ‖g‖ over the perturbed leaves, if the mixing declares "normalized"; else None.
    """
    raise _unknown(mixing)


@weigh_plain.register
def _(mixing: Plain, weight: Any, norm: jax.Array | None) -> Any:
    return weight


@weigh_plain.register
def _(mixing: Unit, weight: Any, norm: jax.Array | None) -> Any:
    ratio = safe_ratio(1.0, norm)
    return jnp.asarray(weight, ratio.dtype) * ratio


@dataclass(frozen=True)
class MixingInputs:
    """The gradients that a mixing combines, the same on all shards.

    Args:
        result: P, the sum of the weighted gradients, the plain one's included.
        plain: g.
        shards: for each leaf, the mapped axes over which it is divided (``norm_axes``); empty if none is.
        plain_weight: the weight of g in P: 1 − c for the forward difference, 1 + c for the backward one.
    """

    result: Tree
    plain: Tree
    shards: Sequence[tuple[str, ...]] = ()
    plain_weight: Any = 0.0

    def inner_product(self, first: Tree, second: Tree) -> jax.Array:
        """The inner product of two such gradients, over all leaves and devices."""
        return inner_product(first, second, self.shards)


@singledispatch
def mix(mixing: GradientMixing, inputs: MixingInputs) -> Tree:
    """The result G of the table in ``gradreg.mixing`` where the penalty acts, for a mixing whose ``plain_gradient`` is "apart"."""
    raise _unknown(mixing)


@mix.register
def _(mixing: SurrogateGap, inputs: MixingInputs) -> Tree:
    along = safe_ratio(inputs.inner_product(inputs.plain, inputs.result), inputs.inner_product(inputs.result, inputs.result))
    return weighted_sum([(1.0 + mixing.a * along, inputs.result), (-mixing.a, inputs.plain)])


@mix.register
def _(mixing: ClipEach, inputs: MixingInputs) -> Tree:
    share = inputs.plain_weight
    perturbed = weighted_sum([(1.0, inputs.result), (-share, inputs.plain)])  # ±c times the second gradient

    def factor(limit: Any, gradient: Tree) -> jax.Array:
        norm = jnp.sqrt(inputs.inner_product(gradient, gradient))
        return jnp.where(norm <= limit, 1.0, limit / norm)

    first, second = factor(mixing.max_norm, inputs.plain), factor(mixing.max_norm * abs(1.0 - share), perturbed)
    return weighted_sum([(share * first, inputs.plain), (second, perturbed)])


def _unknown(mixing: GradientMixing) -> TypeError:
    return TypeError(f"mixing must be one that the JAX engine knows; got {checks.describe(mixing)}. Register a function for it.")


def orthogonal_part(inputs: MixingInputs) -> Tree:
    """The part of P orthogonal to g, for ``Reuse``; at least 32 bits wide."""
    along = safe_ratio(inputs.inner_product(inputs.plain, inputs.result), inputs.inner_product(inputs.plain, inputs.plain))
    return jax.tree.map(lambda p, g: widened(p) - along.astype(widened(g).dtype) * widened(g), inputs.result, inputs.plain)


def add_reused(plain: Tree, reused: Tree, a: float, shards: Sequence[tuple[str, ...]] = ()) -> Tree:
    """g + a·(‖g‖ / ‖h‖)·h; g where h is 0."""
    ratio = safe_ratio(jnp.sqrt(inner_product(plain, plain, shards)), jnp.sqrt(inner_product(reused, reused, shards)))
    return weighted_sum([(1.0, plain), (a * ratio, reused)])


def correction(inputs: MixingInputs) -> Tree:
    """P − g, at least 32 bits wide: what a decoupled step keeps from the optimizer."""
    return jax.tree.map(lambda p, g: widened(p) - widened(g), inputs.result, inputs.plain)
