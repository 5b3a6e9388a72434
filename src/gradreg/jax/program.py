"""What the program of a loss does, as JAX traces it: the axes over which it communicates, and whether it convolves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core

_NO_COMMUNICATION = {"pvary", "axis_index"}
_SAME_ARRAY = {"convert_element_type", "reshape", "squeeze", "transpose", "copy", "pvary", "broadcast_in_dim"}


def _axes_of(equation: Any) -> set[str]:
    found = equation.params.get("axes", equation.params.get("axis_name", ()))
    names = found if isinstance(found, (tuple, list, set, frozenset)) else (found,)
    return {name for name in names if isinstance(name, str)}


def communicated_axes(jaxpr: Any) -> set[str]:
    """The axes over which a program communicates."""
    found: set[str] = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name not in _NO_COMMUNICATION:
            found |= _axes_of(equation)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found |= communicated_axes(inner)
    return found


def gathered_axes(jaxpr: Any, parameters: set[Any]) -> set[str]:
    """The axes over which a program gathers ``parameters``, some of its variables, as they are."""
    found: set[str] = set()
    parameters = set(parameters)
    for equation in jaxpr.eqns:
        inputs = [not isinstance(v, jax.extend.core.Literal) and v in parameters for v in equation.invars]
        if not any(inputs):
            continue
        name = equation.primitive.name
        if "all_gather" in name or name in ("all_to_all", "pbroadcast", "ppermute"):
            found |= _axes_of(equation)
        elif name in _SAME_ARRAY:
            parameters |= set(equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            # Programs within take the last arguments of the equation: those before are constants or conditions.
            pairs = zip(reversed(inner.invars), reversed(inputs), strict=False)
            found |= gathered_axes(inner, {variable for variable, is_parameter in pairs if is_parameter})
    return found


def convolves(fun: Callable[..., Any], *args: Any) -> bool:
    """Whether the program of ``fun(*args)`` convolves, anywhere within."""
    program: Any = jax.make_jaxpr(fun)(*args)
    return _convolves(program.jaxpr)


def _convolves(jaxpr: Any) -> bool:
    if any(equation.primitive.name == "conv_general_dilated" for equation in jaxpr.eqns):
        return True
    return any(_convolves(inner) for equation in jaxpr.eqns for inner in jax.extend.core.jaxprs_in_params(equation.params))
