"""The gradient oracle for JAX: ``jax.value_and_grad`` of a regularized loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradreg import checks
from gradreg.jax.data_parallel import AxisName, axis_names
from gradreg.jax.oracle import RegularizedGrad, RegularizedValueAndGrad, Scope
from gradreg.penalties import GradientPenalty


def value_and_grad(
    fun: Callable[..., Any],
    penalty: GradientPenalty | None,
    *,
    has_aux: bool = False,
    parameters: Callable[[str, Any], bool] | None = None,
    ascent: Callable[..., Any] | None = None,
    axis_name: AxisName | None = None,
    scope: Scope = "local",
) -> RegularizedValueAndGrad:
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
            ``ascent``; otherwise they are those of ``fun``, which is evaluated at θ too. Not for "exact", other mixings than "plain", and
            directions that need no gradient.
        axis_name: the mapped axis, or axes, of ``jax.shard_map`` (or of ``jax.vmap(..., axis_name=...)``) over which the batch is
            sharded. The loss and the gradient are then averaged over it, and are the same on every shard; ``aux`` stays each shard's own.
            Leave it out for arrays sharded under plain ``jit``, where everything is global already.
        scope: "local" perturbs each shard by its own gradient (one all-reduce a step; the m-sharpness of the SAM paper), "global" by
            the gradient averaged over ``axis_name`` (two all-reduces). What is remembered is the same on every shard in either scope: with
            "local", the average of ``Friendly`` and the choice of a Fisher mask take one more all-reduce in the steps that change them.

    Returns:
        A function ``(params, *args, step=0, **kwargs)`` giving ``(loss, grads)`` or ``((loss, aux), grads)``; ``grads`` has the structure,
        shapes and dtypes of ``params``. ``step`` is the optimizer step (≥ 0) for the penalty's schedules, a Python int or an integer
        scalar array; it is not passed on to ``fun``. Pass it as an array under ``jit``, so that one compilation serves all steps.

        For a penalty with memory (``penalty.has_memory``) and for ``Decoupled`` mixing, the function takes the keyword ``state``, which is
        not passed on to ``fun`` either, and gives ``(loss, grads, state)`` or ``((loss, aux), grads, state)``. Its method
        ``init(params)`` makes the first state, every call the next: a dictionary of arrays whose structure, shapes and dtypes stay as they
        are, to be carried, donated, sharded and saved as an optimizer's is. See ``docs/jax.md``.

    Cost in gradient evaluations: 2 (forward, backward), 3 (central), 1 where the strength is 0. "exact" costs about 2.5 to 3.3: one
    ``jax.linearize`` of the gradient, forward over reverse. Measured on a CPU, that took 3.0 on an MLP and 2.5 on a convolutional network,
    reverse over reverse 2.6 and 10.7. Where the strength is a schedule that may be 0 and ``step`` is traced, ``jax.lax.cond`` decides when
    the program runs; under ``vmap`` over ``step`` itself both sides are paid. ``ascent`` costs its share of the batch, and 1 more
    evaluation unless c = 1. A direction that needs no gradient (``remembered``, ``random_sam``) with c = 1 costs 1, and
    ``Reuse`` 1 between its fresh steps. State: one more copy of the parameters, for a Fisher mask an eighth to a quarter of one.

    Precision: leaves of fewer than 32 bits are perturbed, and their gradients combined, in float32 and rounded once; the norm is taken in
    float32 at least. ``fun`` still receives parameters of their own dtype, and a perturbation below half a unit in the last place of
    a bfloat16 parameter does not move it: with small radii keep the parameters in float32 and cast to bfloat16 inside ``fun``.

    A zero gradient has no direction and is not perturbed: the result is finite. If schedules make the radius 0 at a traced step where
    the strength is not, the gradient is not finite (``GradientPenalty.coefficient_at`` raises for such a step).

    Raises:
        TypeError, ValueError: here, for arguments of the wrong kind; when traced, for a loss that is no real floating scalar, parameters
            that are not real floating arrays, a predicate or a mask that selects none, a bad step, a state forgotten or not of these
            parameters, and an ``axis_name`` that is not mapped.

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
    for name, option in (("parameters", parameters), ("ascent", ascent)):
        if option is not None and not callable(option):
            raise TypeError(f"{name} must be a function or None; got {checks.describe(option)}.")
    if ascent is not None and penalty is not None:
        penalty.check_ascent("a function")
    checks.choice("scope", scope, ("local", "global"))
    axes = axis_names(axis_name)
    if scope == "global" and not axes:
        raise ValueError(
            "scope must be 'local' without axis_name; got 'global'. Name the mapped axis, or leave scope out: without a mapped axis "
            "there is one gradient, and it is global."
        )
    return RegularizedValueAndGrad(fun, penalty, has_aux, parameters, ascent, axes, scope)


def grad(
    fun: Callable[..., Any],
    penalty: GradientPenalty | None,
    *,
    has_aux: bool = False,
    parameters: Callable[[str, Any], bool] | None = None,
    ascent: Callable[..., Any] | None = None,
    axis_name: AxisName | None = None,
    scope: Scope = "local",
) -> RegularizedGrad:
    """The gradient of ``loss + penalty``: in place of ``jax.grad(fun, has_aux=has_aux)``.

    The arguments, cost and errors are those of ``value_and_grad``.

    Returns:
        A function ``(params, *args, step=0, **kwargs)`` giving ``grads``, or ``(grads, aux)`` with ``has_aux``; and with a ``state``,
        as ``value_and_grad``'s, ``(grads, state)`` or ``(grads, aux, state)``.

    SAM on ½θ², where every gradient is the place at which it is taken: G = θ + ρ·sign(θ).

    >>> import gradreg, jax.numpy as jnp
    >>> float(grad(lambda theta: 0.5 * theta**2, gradreg.sam(rho=0.5))(jnp.array(-2.0)))
    -2.5
    """
    return RegularizedGrad(
        value_and_grad(fun, penalty, has_aux=has_aux, parameters=parameters, ascent=ascent, axis_name=axis_name, scope=scope)
    )
