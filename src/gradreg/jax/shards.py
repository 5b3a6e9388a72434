"""Parameters of which each device holds another part: inside ``shard_map``, tensor parallel layers and ZeRO's shards.

A norm over such leaves is a sum over the devices, and their gradients follow two conventions. Where ``shard_map`` tracks how values vary
(``check_vma=True``), it differentiates the one loss that all devices share. Where it does not, the gradient is that of the sum of all
devices' losses, and of each device's own copy of a parameter that all hold alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax

from gradreg import checks
from gradreg.directions import Adaptive, EmaDirection, Friendly, Gradient, LossEquated, Unified
from gradreg.jax.norms import Tree
from gradreg.jax.parallel import axis_names, varying
from gradreg.jax.program import communicated_axes, gathered_axes
from gradreg.mixing import Plain, SurrogateGap, Unit
from gradreg.penalties import GradientPenalty

NormAxes: TypeAlias = "str | tuple[str, ...] | Callable[[str, Any], str | tuple[str, ...] | None]"

DIRECTIONS = (Gradient, Adaptive, LossEquated, Unified, Friendly, EmaDirection)
MIXINGS = (Plain, Unit, SurrogateGap)
"""What is computed from shards as from the whole: element by element, or by norms and inner products that are summed over the devices."""

REMEDY = (
    "Name the axis in norm_axes if each device holds another part of a parameter, in axis_name if each has another part of the batch, "
    "or pass norm_axes=() if all parameters are the same on every device."
)


@dataclass(frozen=True)
class Shards:
    """Along which mapped axes each leaf of the parameters is divided.

    Args:
        leaves: for each leaf, in the order of ``jax.tree.leaves``, those axes; empty for a leaf that all devices hold alike.
        axes: all of them together.
        averaged: those over which the loss is averaged too (ZeRO, where the batch is divided over the devices that share the parameters).
        tracked: whether ``shard_map`` tracks how values vary.
    """

    leaves: Sequence[tuple[str, ...]]
    axes: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()
    tracked: bool = True

    def objective(self, loss: jax.Array) -> jax.Array:
        """What is differentiated on this device for ``loss``, so that the gradient of each part is that of the whole loss.

        Raises:
            ValueError: a loss that differs along an axis of which ``fun`` should return the same loss on every device.
        """
        if not self.axes:
            return loss
        if self.tracked:
            loss = jax.lax.pmean(loss, self.averaged) if self.averaged else loss
            differing = sorted(varying(loss) & set(self.axes))
            if differing:
                raise ValueError(
                    f"fun must return the same loss on every device along norm_axes; got one that varies over {differing[0]!r}. "
                    f"Return jax.lax.pmean(loss, {differing[0]!r}), or name the axis in axis_name too if the batch is divided over it."
                )
            return loss
        return loss / axis_sizes(self.axes)

    def gradients(self, gradients: Tree) -> Tree:
        """The gradient of the objective, with the parts that the devices hold of the gradients of common leaves added up."""
        if self.tracked:
            return gradients
        leaves, structure = jax.tree.flatten(gradients)
        missing = [tuple(axis for axis in self.axes if axis not in own) for own in self.leaves]
        return structure.unflatten([jax.lax.psum(leaf, axes) if axes else leaf for leaf, axes in zip(leaves, missing, strict=True)])


def axis_sizes(axes: tuple[str, ...]) -> int:
    """The number of devices along ``axes`` together."""
    number = 1
    for axis in axes:
        number *= jax.lax.axis_size(axis)
    return number


def shards_of(
    params: Tree, norm_axes: NormAxes | None, axes: tuple[str, ...], scope: str, penalty: GradientPenalty | None, fun: Callable[[Tree], Any]
) -> Shards:
    """How the leaves of ``params`` are divided, from what the user says and what ``shard_map`` tracks.

    Args:
        params: as the user passed them.
        norm_axes: the argument of ``value_and_grad``.
        axes: the mapped axes over which the batch is divided.
        scope: "local" or "global".
        penalty: the penalty; parts that cannot be computed from shards raise.
        fun: the loss as a function of the parameters alone, to see which axes it communicates over if ``norm_axes`` is None.
    """
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    if norm_axes is None:
        _check_nothing_undeclared(named, params, axes, fun)
        return Shards([()] * len(named))
    found = [_named_axes(norm_axes(name, leaf) if callable(norm_axes) else norm_axes) for name, leaf in named]
    every = tuple(dict.fromkeys(axis for own in found for axis in own))
    if not every:
        return Shards(found)
    tracked = _is_tracked(every)
    if not callable(norm_axes):
        if not tracked:
            raise ValueError(
                f"norm_axes must be a function of name and leaf where shard_map does not track how values vary (check_vma=False); got "
                f"{norm_axes!r}. Write norm_axes=lambda name, leaf: 'model' if 'kernel' in name else (), say."
            )
        found = [tuple(axis for axis in own if axis in varying(leaf)) for own, (_, leaf) in zip(found, named, strict=True)]
    elif tracked:
        for own, (name, leaf) in zip(found, named, strict=True):
            if not set(own) <= varying(leaf):
                raise ValueError(
                    f"norm_axes must name axes along which a leaf differs; got {own} for {name!r}, which varies over "
                    f"{sorted(varying(leaf))}. Look at its specification in in_specs."
                )
    averaged = tuple(axis for axis in every if axis in axes)
    if averaged and scope == "local" and penalty is not None:
        raise ValueError(
            f"scope must be 'global' where the batch and the parameters are divided over the same axis, {averaged[0]!r}; got 'local'. "
            "A parameter that the devices share cannot be perturbed by one device's gradient: pass scope='global'."
        )
    if penalty is not None:
        _check_parts(penalty)
    return Shards(found, every, averaged, tracked)


def _named_axes(value: Any) -> tuple[str, ...]:
    try:
        return axis_names(value)
    except TypeError:
        raise TypeError(
            f"norm_axes must name axes, or be a function (name, leaf) -> axes; got {checks.describe(value)}. Write norm_axes='model', say."
        ) from None


def _is_tracked(axes: tuple[str, ...]) -> bool:
    """Whether the types of values say over which axes they vary; ``ValueError`` for an axis that is not mapped here."""
    try:
        return all(axis in varying(jax.lax.axis_index(axis)) for axis in axes)
    except NameError as error:
        raise ValueError(
            f"norm_axes must name axes mapped around the call; got {axes}, of which one is not bound here. Call the function inside "
            "jax.shard_map over them, or leave norm_axes out: sharded arrays under plain jit need none."
        ) from error


def _check_parts(penalty: GradientPenalty) -> None:
    known = type(penalty.direction) in DIRECTIONS and type(penalty.mixing) in MIXINGS
    if not known or (penalty.mask is not None and penalty.mask.level == "coordinates"):
        raise ValueError(
            "norm_axes must be left out for penalties that draw or compare single coordinates or need the shapes of whole parameters, and "
            f"for parts of your own; got {penalty}. "
            "A device cannot tell the place of its part in the whole. Use sharded arrays under plain jit."
        )


def _check_nothing_undeclared(named: list[tuple[str, Any]], params: Tree, axes: tuple[str, ...], fun: Callable[[Tree], Any]) -> None:
    """Raise if the parameters seem to be parts of a whole that spans several devices."""
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    if not manual:
        return
    program: Any = jax.make_jaxpr(fun)(params)
    communicated = communicated_axes(program.jaxpr)
    for axis in sorted(manual & communicated - set(axes)):
        if not _is_tracked((axis,)):
            raise ValueError(
                f"norm_axes must be given where fun communicates over an axis and shard_map does not track how values vary "
                f"(check_vma=False); got None, and a loss that communicates over {axis!r}. {REMEDY}"
            )
        for name, leaf in named:
            if axis in varying(leaf):
                raise ValueError(
                    f"norm_axes must name the axes along which parameters differ from device to device; got None, and {name!r} varies over "
                    f"{axis!r}, over which fun communicates. {REMEDY}"
                )
    gathered = gathered_axes(program.jaxpr, set(program.jaxpr.invars))
    for axis in sorted(gathered & set(axes)):
        raise ValueError(
            f"norm_axes must name the axes along which parameters differ from device to device; got None, and fun gathers a parameter over "
            f"{axis!r}. {REMEDY}"
        )
