"""Parts from a user's own file: registered, they are run as the engine's own are, with what they declare."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import gradreg
from gradreg import GradientPenalty
from gradreg.jax import value_and_grad
from gradreg.jax.directions import DirectionInputs, ascent_direction
from gradreg.jax.masks import MaskInputs, coordinates, largest, selected_parameters
from gradreg.jax.mixing import MixingInputs, mix, weigh_plain

from .cases import assert_close, assert_same_bits, first_state, problem, squared_error


@dataclass(frozen=True, kw_only=True)
class OwnFriendly(gradreg.Direction):
    """``Friendly(sigma=1, beta=0.6)`` written anew: an average of gradients."""

    averages = "gradients"

    @property
    def average_decay(self) -> float:
        return 0.6


@dataclass(frozen=True, kw_only=True)
class OwnMomentum(gradreg.Direction):
    """``EmaDirection(decay=0.4)`` written anew: an average of results, and no gradient."""

    needs_gradient = False
    averages = "results"

    @property
    def average_decay(self) -> float:
        return 0.4


@dataclass(frozen=True, kw_only=True)
class OwnFisher(gradreg.Mask):
    """``Sparse(sparsity=0.5, every=2)`` written anew: chosen from gradients, kept between refreshes."""

    level = "coordinates"
    needs_gradient = True
    refresh_every = 2


@dataclass(frozen=True, kw_only=True)
class OnlyFirst(gradreg.Mask):
    """The leaves of the first layer."""

    level = "parameters"


@dataclass(frozen=True, kw_only=True)
class OwnUnit(gradreg.GradientMixing):
    """``Unit()`` written anew."""

    plain_gradient = "normalized"


@dataclass(frozen=True, kw_only=True)
class Midway(gradreg.GradientMixing):
    """``(g + P) / 2``: for c = 1 what gnp(alpha=0.5) is."""


@ascent_direction.register
def _(direction: OwnFriendly, inputs: DirectionInputs) -> Any:
    v = jax.tree.map(lambda g, m: g - m, inputs.gradients, inputs.average)
    return v, v


@ascent_direction.register
def _(direction: OwnMomentum, inputs: DirectionInputs) -> Any:
    assert inputs.gradients is None
    return inputs.average, inputs.average


@coordinates.register
def _(mask: OwnFisher, inputs: MaskInputs) -> Any:
    return largest(0.5, inputs.gradients, inputs.selected)


@selected_parameters.register
def _(mask: OnlyFirst, among: Any) -> set[str]:
    return {name for name in among if name.startswith("0/")}


@weigh_plain.register
def _(mixing: OwnUnit, weight: Any, norm: Any) -> Any:
    return weight / norm


@mix.register
def _(mixing: Midway, inputs: MixingInputs) -> Any:
    return jax.tree.map(lambda p, g: (p + g) / 2, inputs.result, inputs.plain)


def trained(penalty: GradientPenalty, **options: Any) -> Any:
    """Gradients and states of five steps, one program for all."""
    params, x, y = problem()
    oracle = value_and_grad(squared_error, penalty, **options)
    run, state, found = jax.jit(oracle), first_state(oracle, params), []
    for step in range(5):
        _, gradients, *following = run(params, jnp.roll(x, step, axis=0), y, step=jnp.int32(step), **state)
        state = {"state": following[0]} if following else {}
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
        found.append((gradients, following))
    return found


def along(direction: gradreg.Direction, **options: Any) -> GradientPenalty:
    return GradientPenalty(power=1, strength=0.3, radius=0.3, direction=direction, **options)


@pytest.mark.parametrize(
    ("own", "known"),
    [
        (along(OwnFriendly()).every(2), along(gradreg.Friendly(sigma=1.0, beta=0.6)).every(2)),
        (along(OwnMomentum()), along(gradreg.EmaDirection(decay=0.4))),
        (along(gradreg.Gradient(), mask=OwnFisher()), gradreg.sam(rho=0.3).sparse(0.5, every=2)),
        (gradreg.gnp(r=0.3, alpha=0.8, mixing=OwnUnit()), gradreg.gnp(r=0.3, alpha=0.8, mixing="unit")),
        (along(gradreg.Gradient(), mixing=Midway()), gradreg.gnp(r=0.3, alpha=0.5)),
    ],
    ids=["average-of-gradients", "average-of-results", "mask-by-gradients", "normalized", "apart"],
)
def test_an_own_part_is_run_as_the_known_one_that_it_repeats(own: GradientPenalty, known: GradientPenalty) -> None:
    assert_close(trained(own), trained(known), tolerance=1e-6)


def test_an_own_choice_of_parameters() -> None:
    by_name = trained(gradreg.sam(rho=0.3), parameters=lambda name, _: name.startswith("0/"))
    assert_same_bits(trained(along(gradreg.Gradient(), mask=OnlyFirst())), by_name)


def test_an_own_choice_of_parameters_that_finds_none() -> None:
    with pytest.raises(ValueError, match=r"mask=OnlyFirst\(\) must choose at least one selected leaf of params; got none"):
        trained(along(gradreg.Gradient(), mask=OnlyFirst()), parameters=lambda name, _: name.startswith("2/"))
