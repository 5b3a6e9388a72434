"""The loss function as the engine evaluates it: loss, aux and gradient, with checks of what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from gradreg import checks
from gradreg.jax.norms import Tree, widened
from gradreg.jax.parallel import mean
from gradreg.jax.shards import Shards


class Evaluated(NamedTuple):
    """The loss, the function's aux, and a gradient."""

    value: jax.Array
    aux: Any
    gradients: Tree


Evaluate: TypeAlias = Callable[[Tree], Evaluated]
"""From parameters to loss, aux and gradient; the batch, and the mean over shards if there is one, are already inside."""


RESERVED = ("state", "loss_scale")
"""The keywords that the regularized function keeps for itself."""


def check_parameters(fun: Callable[..., Any], name: str) -> None:
    """Raise if ``fun`` has a parameter that could be given only by a keyword that the regularized function keeps for itself."""
    remedies = {
        "state": "Rename it (model_state, say), because state= is that of the penalty",
        "loss_scale": "Return the loss as it is, and pass loss_scale= to the regularized function, which differentiates the scaled loss",
    }
    for keyword in RESERVED:
        if _takes(fun, keyword):
            raise ValueError(
                f"{name} must not have a parameter named {keyword!r}; got {checks.describe(fun)}. {remedies[keyword]}, or make it "
                "positional-only (def loss(params, state, /))."
            )


def with_step(fun: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], step: Any) -> Mapping[str, Any]:
    """The keyword arguments of ``fun``: with ``step``, if it has a parameter of that name that ``args`` do not reach.

    Raises:
        TypeError: it needs a step, and none was given.
    """
    if not _takes(fun, "step"):
        return kwargs
    signature = inspect.signature(fun)
    if (
        list(signature.parameters).index("step") <= len(args)
        and signature.parameters["step"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ):
        return kwargs
    if step is not None:
        return {**kwargs, "step": step}
    if signature.parameters["step"].default is inspect.Parameter.empty:
        raise TypeError(
            f"step must be given, because {name} has a parameter of that name; got none. Pass step=, the optimizer's step count."
        )
    return kwargs


def _takes(fun: Callable[..., Any], keyword: str) -> bool:
    """Whether ``fun`` has a parameter of that name that can be given by keyword."""
    try:
        parameter = inspect.signature(fun).parameters.get(keyword)
    except (TypeError, ValueError):  # a built-in function without a signature
        return False
    return parameter is not None and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def checked_loss_scale(value: Any) -> jax.Array:
    """``value`` as a scalar array; ``TypeError`` or ``ValueError`` for anything but a real number > 0."""
    if isinstance(value, (jax.Array, np.ndarray)):
        if jnp.shape(value) != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                f"loss_scale must be one real number; got an array of shape {jnp.shape(value)} and dtype {value.dtype}. "
                "Pass the scale by which the loss is to be multiplied."
            )
        return jnp.asarray(value)
    return jnp.asarray(checks.positive("loss_scale", value, remedy="Leave it out for none."), jnp.float32)


def evaluate_with(loss: Callable[[Tree], tuple[jax.Array, Any]], axes: tuple[str, ...], shards: Shards, loss_scale: Any = None) -> Evaluate:
    """The evaluation of ``loss``, a checked function of the parameters alone.

    Loss and gradient are averaged over ``axes`` and over the axes of which ``shards`` says so. What is differentiated is ``loss_scale``
    times the loss, and the gradient is divided by it again.
    """

    def objective(at: Tree) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        value, aux = loss(at)
        target = shards.objective(value)
        return (target if loss_scale is None else widened(target) * widened(loss_scale).astype(widened(target).dtype)), (value, aux)

    differentiated = jax.value_and_grad(objective, has_aux=True)

    def evaluate(at: Tree) -> Evaluated:
        (_, (value, aux)), gradients = differentiated(at)
        gradients = shards.gradients(gradients)
        if loss_scale is not None:
            gradients = jax.tree.map(lambda g: (widened(g) / widened(loss_scale).astype(widened(g).dtype)).astype(g.dtype), gradients)
        value, gradients = mean((value, gradients), axes)
        return Evaluated(mean(value, shards.averaged), aux, gradients)

    return evaluate


def bound(
    fun: Callable[..., Any], name: str, has_aux: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Callable[[Tree], tuple[jax.Array, Any]]:
    """``fun`` as a checked function of the parameters alone that returns loss and aux; errors call it ``name``."""
    checked = _checked(fun, name, has_aux)
    return lambda at: checked(at, *args, **kwargs)


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
