"""The loss function as the engine evaluates it: loss, aux and gradient, with checks of what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from gradreg import checks
from gradreg.jax.norms import Tree
from gradreg.jax.parallel import mean


class Evaluated(NamedTuple):
    """The loss, the function's aux, and a gradient."""

    value: jax.Array
    aux: Any
    gradients: Tree


Evaluate: TypeAlias = Callable[[Tree], Evaluated]
"""From parameters to loss, aux and gradient; the batch, and the mean over shards if there is one, are already inside."""


def evaluate_with(
    fun: Callable[..., Any], name: str, has_aux: bool, axes: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Evaluate:
    """The evaluation of ``fun`` with ``args`` and ``kwargs``, loss and gradient averaged over ``axes``; errors call it ``name``."""
    differentiated = jax.value_and_grad(_checked(fun, name, has_aux), has_aux=True)

    def evaluate(at: Tree) -> Evaluated:
        (value, aux), gradients = differentiated(at, *args, **kwargs)
        value, gradients = mean((value, gradients), axes)
        return Evaluated(value, aux, gradients)

    return evaluate


def _checked(fun: Callable[..., Any], name: str, has_aux: bool) -> Callable[..., tuple[jax.Array, Any]]:
    """``fun`` returning ``(loss, aux)``, aux None if it has none, and raising for anything but a real floating scalar loss."""

    def checked(*args: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        result = fun(*args, **kwargs)
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"{name} must return (loss, aux) with has_aux=True; got {checks.describe(result)}. Leave has_aux out, or add aux."
            )
        if not has_aux and isinstance(result, tuple):
            raise TypeError(f"{name} must return the loss alone; got a tuple of {len(result)}. Pass has_aux=True to return (loss, aux).")
        loss, aux = result if has_aux else (result, None)
        if not isinstance(loss, (jax.Array, float)) or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            got = f"dtype {loss.dtype}" if isinstance(loss, jax.Array) else checks.describe(loss)
            raise TypeError(f"{name} must return a real floating loss; got {got}. Return the loss as it is differentiated.")
        if jnp.shape(loss) != ():
            raise ValueError(f"{name} must return a scalar loss; got shape {jnp.shape(loss)}. Reduce it with .mean() or .sum().")
        return jnp.asarray(loss), aux

    return checked
