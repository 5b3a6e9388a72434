"""The gradient oracle for JAX: ``jax.value_and_grad`` of a regularized loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gradreg import checks
from gradreg.directions import Gradient
from gradreg.jax.data_parallel import AxisName, axis_names, check_bound, mean, per_shard
from gradreg.jax.perturbation import Tree
from gradreg.jax.step import Evaluate, Evaluated, Step, amounts
from gradreg.mixing import GradientMixing
from gradreg.penalties import GradientPenalty

Scope = Literal["local", "global"]


def value_and_grad(
    fun: Callable[..., Any],
    penalty: GradientPenalty | None,
    *,
    has_aux: bool = False,
    parameters: Callable[[str, Any], bool] | None = None,
    ascent: Callable[..., Any] | None = None,
    axis_name: AxisName | None = None,
    scope: Scope = "local",
) -> Callable[..., tuple[Any, Any]]:
    """The loss and the gradient of ``loss + penalty``: in place of ``jax.value_and_grad(fun, has_aux=has_aux)``.

    The gradient is ``g + strength·H·d`` as ``gradreg.penalties`` tabulates it, from the same ``GradientPenalty`` objects that drive
    PyTorch; for the forward difference, ``G = (1 − c)·g + c·∇L(θ + radius·d)`` with c = strength / radius. Every pass calls ``fun`` with
    the same arguments, so a dropout key among them gives all passes the same masks.

    Args:
        fun: ``(params, *args, **kwargs) -> loss``, or ``-> (loss, aux)`` with ``has_aux``; ``loss`` a real floating scalar. Pure.
        penalty: what is penalised; None for the plain gradient, through the same calls.
        has_aux: whether ``fun`` returns ``(loss, aux)``; ``aux`` (batch statistics, say) is what the first pass returned.
        parameters: ``(name, leaf) -> bool``: which leaves of ``params`` are perturbed and counted in the norm; all by default. ``name`` is
            the leaf's path joined by "/", as in "params/Dense_0/kernel". The others stay where they are in the further passes, and
            their gradients are combined by the same rule.
        ascent: the function from which the direction d comes instead of ``fun``, called with the same arguments; usually ``fun`` on part
            of the batch: ``ascent=lambda params, x, y: loss(params, x[:32], y[:32])``. It returns what ``fun`` returns. If c is known to be
            1 (``sam``; strength and radius alike), ``fun`` is evaluated only at the perturbed parameters and loss and aux are those of
            ``ascent``; otherwise they are those of ``fun``, which is evaluated at θ too. Not for "exact" and unit mixing.
        axis_name: the mapped axis, or axes, of ``jax.shard_map`` (or of ``jax.vmap(..., axis_name=...)``) over which the batch is
            sharded. The loss and the gradient are then averaged over it, and are the same on every shard; ``aux`` stays each shard's own.
            Leave it out for arrays sharded under plain ``jit``, where everything is global already.
        scope: "local" perturbs each shard by its own gradient (one all-reduce a step; the m-sharpness of the SAM paper), "global" by
            the gradient averaged over ``axis_name`` (two all-reduces).

    Returns:
        A function ``(params, *args, step=0, **kwargs)`` giving ``(loss, grads)`` or ``((loss, aux), grads)``; ``grads`` has the structure,
        shapes and dtypes of ``params``. ``step`` is the optimizer step (≥ 0) for the penalty's schedules, a Python int or an integer
        scalar array; it is not passed on to ``fun``. Pass it as an array under ``jit``, so that one compilation serves all steps.

    Cost in gradient evaluations: 2 (forward, backward), 3 (central), 1 where the strength is 0. "exact" costs about 2.5 to 3.3: one
    ``jax.linearize`` of the gradient, forward over reverse. Measured on a CPU, that took 3.0 on an MLP and 2.5 on a convolutional network,
    reverse over reverse 2.6 and 10.7. Where the strength is a schedule that may be 0 and ``step`` is traced, ``jax.lax.cond`` decides when
    the program runs; under ``vmap`` over ``step`` itself both sides are paid. ``ascent`` costs its share of the batch, and 1 more
    evaluation unless c = 1.

    Precision: leaves of fewer than 32 bits are perturbed, and their gradients combined, in float32 and rounded once; the norm is taken in
    float32 at least. ``fun`` still receives parameters of their own dtype, and a perturbation below half a unit in the last place of
    a bfloat16 parameter does not move it: with small radii keep the parameters in float32 and cast to bfloat16 inside ``fun``.

    A zero gradient has no direction and is not perturbed: the result is finite. If schedules make the radius 0 at a traced step where
    the strength is not, the gradient is not finite (``GradientPenalty.coefficient_at`` raises for such a step).

    Raises:
        TypeError, ValueError: here, for arguments of the wrong kind; when traced, for a loss that is no real floating scalar, parameters
            that are not real floating arrays, a predicate that selects none, a bad step, and an ``axis_name`` that is not mapped.

    Sources: those of each penalty's constructor; scope: Foret et al. 2021, arXiv 2010.01412, section 4.1 (m-sharpness).

    On ½·aᵀθ² the Hessian is diag(a), so F-GR's gradient is aθ + γ·a²θ:

    >>> import gradreg, jax.numpy as jnp
    >>> loss = lambda theta, a: 0.5 * jnp.sum(a * theta**2)
    >>> regularized = value_and_grad(loss, gradreg.fgr(gamma=0.5, epsilon=0.25))
    >>> value, gradient = regularized(jnp.array([1.0, 1.0]), jnp.array([1.0, 2.0]))
    >>> float(value), gradient.tolist()
    (1.5, [1.5, 4.0])
    """
    if not callable(fun):
        raise TypeError(f"fun must be callable; got {checks.describe(fun)}. Pass the loss function, not its value.")
    if penalty is not None and not isinstance(penalty, GradientPenalty):
        raise TypeError(f"penalty must be a GradientPenalty or None; got {checks.describe(penalty)}. Use gradreg.sam(rho=0.05), say.")
    if penalty is not None:
        _check_supported(penalty)
    for name, option in (("parameters", parameters), ("ascent", ascent)):
        if option is not None and not callable(option):
            raise TypeError(f"{name} must be a function or None; got {checks.describe(option)}.")
    if ascent is not None and penalty is not None and penalty.difference == "exact":
        raise ValueError("ascent must be None for an exact penalty, which takes no finite step; got a function. Use fgr() or gnp().")
    if ascent is not None and penalty is not None and penalty.mixing == "unit":
        raise ValueError(
            "ascent must be None with mixing='unit', which needs the plain gradient first; got a function. Use mixing='plain'."
        )
    checks.choice("scope", scope, ("local", "global"))
    axes = axis_names(axis_name)
    if scope == "global" and not axes:
        raise ValueError(
            "scope must be 'local' without axis_name; got 'global'. Name the mapped axis, or leave scope out: without a mapped axis "
            "there is one gradient, and it is global."
        )

    def regularized_value_and_grad(params: Tree, /, *args: Any, step: Any = 0, **kwargs: Any) -> tuple[Any, Any]:
        selected = _selected(params, parameters)
        check_bound(axes)

        def evaluation(of: Callable[..., Any], name: str, shared: tuple[str, ...]) -> Evaluate:
            differentiated = jax.value_and_grad(_checked(of, name, has_aux), has_aux=True)

            def evaluate(at: Tree) -> Evaluated:
                (value, aux), gradients = differentiated(at, *args, **kwargs)
                value, gradients = mean((value, gradients), shared)
                return Evaluated(value, aux, gradients)

            return evaluate

        shared, at_the_end = (axes, ()) if scope == "global" else ((), axes)
        evaluate = evaluation(fun, "fun", shared)
        params = per_shard(params, axes)
        if penalty is None:
            value, aux, gradients = evaluate(params)
        else:
            ascend = None if ascent is None else evaluation(ascent, "ascent", shared)
            value, aux, gradients = Step(penalty, amounts(penalty, step), evaluate, ascend, selected, axes).regularized(params)
        value, gradients = mean((value, gradients), at_the_end)
        return ((value, aux) if has_aux else value), gradients

    return regularized_value_and_grad


def grad(
    fun: Callable[..., Any],
    penalty: GradientPenalty | None,
    *,
    has_aux: bool = False,
    parameters: Callable[[str, Any], bool] | None = None,
    ascent: Callable[..., Any] | None = None,
    axis_name: AxisName | None = None,
    scope: Scope = "local",
) -> Callable[..., Any]:
    """The gradient of ``loss + penalty``: in place of ``jax.grad(fun, has_aux=has_aux)``.

    The arguments, cost and errors are those of ``value_and_grad``.

    Returns:
        A function ``(params, *args, step=0, **kwargs)`` giving ``grads``, or ``(grads, aux)`` with ``has_aux``.

    SAM on ½θ², where every gradient is the place at which it is taken: G = θ + ρ·sign(θ).

    >>> import gradreg, jax.numpy as jnp
    >>> float(grad(lambda theta: 0.5 * theta**2, gradreg.sam(rho=0.5))(jnp.array(-2.0)))
    -2.5
    """
    both = value_and_grad(fun, penalty, has_aux=has_aux, parameters=parameters, ascent=ascent, axis_name=axis_name, scope=scope)

    def regularized_grad(params: Tree, /, *args: Any, step: Any = 0, **kwargs: Any) -> Any:
        value, gradients = both(params, *args, step=step, **kwargs)
        return (gradients, value[1]) if has_aux else gradients

    return regularized_grad


def _check_supported(penalty: GradientPenalty) -> None:
    default = (Gradient(), None, 1)
    if (penalty.direction, penalty.mask, penalty.ascent_steps) != default or isinstance(penalty.mixing, GradientMixing):
        raise ValueError(
            f"penalty must have the gradient as direction, no mask, one ascent step and plain or unit mixing in JAX; got {penalty}. "
            "Use gradreg.torch for the others."
        )


def _selected(params: Tree, parameters: Callable[[str, Any], bool] | None) -> list[bool]:
    """For each leaf of ``params``, checked to be a real floating array, whether it is perturbed."""
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    for name, leaf in named:
        dtype = getattr(leaf, "dtype", type(leaf))
        if dtype is not float and not (hasattr(leaf, "dtype") and jnp.issubdtype(dtype, jnp.floating)):
            got = f"dtype {dtype}" if hasattr(leaf, "dtype") else checks.describe(leaf)
            raise TypeError(
                f"params must hold real floating arrays only; got {got} at {name!r}. Keep what is not trained out of params: pass it as "
                "another argument, or partition the model (equinox.partition, flax.nnx.split)."
            )
    selected = [parameters is None or bool(parameters(name, leaf)) for name, leaf in named]
    if not any(selected):
        example = f" Their names look like {named[0][0]!r}." if named else ""
        raise ValueError(f"parameters must select at least one leaf of params, which has {len(named)}; got none.{example}")
    return selected


def _checked(fun: Callable[..., Any], name: str, has_aux: bool) -> Callable[..., tuple[jax.Array, Any]]:
    """``fun`` returning ``(loss, aux)``, aux None if it has none, and failing in words for anything but a real floating scalar loss."""

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
