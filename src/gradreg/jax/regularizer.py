"""The gradient oracle for JAX: ``jax.value_and_grad`` of a regularized loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp

from gradreg import checks
from gradreg.held_out import HeldOut
from gradreg.jax.directions import ascent_direction
from gradreg.jax.held_out import HeldOutStep, LearnedRadius, check_measurable
from gradreg.jax.loss_fn import bound, check_parameters, checked_loss_scale, evaluate_with, with_step
from gradreg.jax.masks import coordinates, selected_leaves, selected_parameters
from gradreg.jax.microbatches import EachPart
from gradreg.jax.mixing import mix, weigh_plain
from gradreg.jax.norms import Tree, gradient_norm
from gradreg.jax.parallel import AxisName, axis_names, check_bound, mean, per_shard
from gradreg.jax.program import convolves
from gradreg.jax.shards import NormAxes, shards_of
from gradreg.jax.state import HELD_OUT, RADIUS, State, carries_state, check_state, initial, radius_of
from gradreg.jax.step import Measured, Step
from gradreg.jax.step_values import step_values
from gradreg.penalties import GradientPenalty
from gradreg.plan import StepValues
from gradreg.registry import check_known

Scope = Literal["local", "global"]
Branch = Literal["auto", "cond", "select"]


class Metrics(NamedTuple):
    """What a step measured, for loggers: scalar arrays, the same on all shards.

    Args:
        gradient_norm: L2 norm of the first pass's gradient over all perturbed leaves; with ``scope="local"`` the mean over the shards.
        strength: the penalty's at this step (λ or γ); 0 without a penalty.
        radius: its radius at this step (r, ρ or ε); NaN for an exact penalty.
        coefficient: c = strength / radius, the weight of the perturbed gradient; NaN for an exact penalty.
        cosine: between the gradient at the unperturbed parameters and the first one at perturbed ones; NaN where there is only one of them.
    """

    gradient_norm: Any
    strength: Any
    radius: Any
    coefficient: Any
    cosine: Any


def metrics_of(values: StepValues | None, measured: Measured) -> Metrics:
    """What was measured beside the step's ``values``, None without a penalty, in one dtype."""
    strength, radius, c = (0.0, None, None) if values is None else (values.strength, values.radius, values.coefficient)
    if values is not None and not isinstance(values.acts, bool) and c is not None:
        c = jnp.where(values.acts, c, 0.0)  # 1 at all steps that act is known to be 1, also at those that rest
    metrics = Metrics(measured.gradient_norm, strength, radius, c, measured.cosine)
    return Metrics(*(jnp.asarray(jnp.nan if number is None else number, measured.gradient_norm.dtype) for number in metrics))


@dataclass(frozen=True, eq=False)
class RegularizedValueAndGrad:
    """From ``(params, *args, step=..., **kwargs)`` to loss and gradient, and with ``state=``, where there is a state, to the next state.

    Made by ``value_and_grad``, whose arguments these are.
    """

    fun: Callable[..., Any]
    penalty: GradientPenalty | None
    has_aux: bool
    parameters: Callable[[str, Any], bool] | None
    ascent: Callable[..., Any] | None
    axes: tuple[str, ...]
    scope: Scope
    norm_axes: NormAxes | None = None
    branch: Branch = "auto"
    with_metrics: bool = False
    held_out: Callable[..., Any] | None = None
    rule: HeldOut | None = None

    @property
    def carries_state(self) -> bool:
        """Whether the function takes ``state=`` and returns the next one."""
        return carries_state(self.penalty) or self.rule is not None

    def looked(self, before: State, after: State) -> bool:
        """Whether the step from one state to the next, both known, evaluated the held-out loss."""
        learned = None if self.penalty is None else self.penalty.learned_radius
        if learned is None and self.rule is None:
            return False
        (kind, counter), rule = ((HELD_OUT, "count"), self.rule) if learned is None else ((RADIUS, "steps"), learned)
        assert rule is not None
        count = int(before[kind][counter])
        return int(after[kind][counter]) > count and count % rule.every == 0

    def is_on(self, state: State) -> bool:
        """Whether the penalty was on in the step that gave ``state``, a known one."""
        return self.rule is None or bool(state[HELD_OUT]["helps_now"])

    def init(self, params: Tree) -> State:
        """The state before the first step, for penalties that have one: a dictionary of arrays, sharded as ``params`` are.

        Raises:
            ValueError: the penalty has no state.
        """
        if self.penalty is None or not self.carries_state:
            raise ValueError(
                f"init is for penalties that carry a state from step to step; got {self.penalty}. "
                "Leave it out, and call the function without state=; penalty.has_memory says which is which."
            )
        return initial(self.penalty, params, self._selected(params), self.rule)

    def __call__(self, params: Tree, /, *args: Any, step: Any = None, loss_scale: Any = None, **kwargs: Any) -> tuple[Any, ...]:
        selected, penalty = self._selected(params), self.penalty
        state: State = {}
        if penalty is not None and self.carries_state:
            state = kwargs.pop("state", None)
            check_state(state, penalty, params, selected, self.rule)
        elif "state" in kwargs:
            raise TypeError(
                f"state must be left out for a penalty that carries none from step to step; got it with {penalty}. "
                "penalty.has_memory says which penalties do; pass a model's state to fun under another name, or by position."
            )
        values = None if penalty is None else step_values(penalty, step, radius_of(state))
        check_bound(self.axes)
        loss = bound(self.fun, "fun", self.has_aux, args, with_step(self.fun, "fun", args, kwargs, step))
        shards = shards_of(params, self.norm_axes, self.axes, self.scope, penalty, loss)
        axes = tuple(axis for axis in self.axes if axis not in shards.averaged)
        shared, unequal = (axes, ()) if self.scope == "global" else ((), axes)
        scale = None if loss_scale is None else checked_loss_scale(loss_scale)
        if scale is not None and hasattr(self.fun, "divides_into_parts"):
            raise ValueError(
                "loss_scale must be left out for a microbatched fun; got one. Its gradients are taken before the scale is known, "
                "so small gradients would be lost. Train in bfloat16, or without microbatched."
            )
        evaluate = evaluate_with(loss, shared, shards, scale)
        params = per_shard(params, axes)
        measured = Measured()
        if penalty is None or values is None:
            value, aux, gradients = evaluate(params)
            if self.with_metrics:
                norm = gradient_norm(gradients, selected, shards.leaves)
                measured = Measured(norm, jnp.nan * norm)
            value, gradients, measured = mean((value, gradients, measured), unequal)
        else:
            ascend = None
            if self.ascent is not None:
                ascent = bound(self.ascent, "ascent", self.has_aux, args, with_step(self.ascent, "ascent", args, kwargs, step))
                ascend = evaluate_with(ascent, shared, shards, scale)
            looks: HeldOutStep | None = None
            learned: LearnedRadius | None = None
            if self.held_out is not None:
                kept = bound(self.held_out, "held_out", False, args, with_step(self.held_out, "held_out", args, kwargs, step))
                evaluate_kept = evaluate_with(kept, shared, shards, scale)
                if penalty.learned_radius is not None:
                    learned = LearnedRadius(penalty.learned_radius, evaluate_kept, state[RADIUS], values.fresh)
                elif self.rule is not None:
                    looks = HeldOutStep(self.rule, evaluate_kept, state[HELD_OUT], values.fresh)
            acting = values if looks is None else looks.help.values(values)
            values = values if looks is None else looks.help.shown(values)
            both = self._computes_both(acting, loss, params)
            this = Step(
                penalty,
                acting,
                evaluate,
                ascend,
                selected,
                axes,
                unequal,
                state,
                shards,
                both,
                self.with_metrics,
                scale is not None,
                looks,
                learned,
            )
            (value, aux, gradients), state, measured = this.run(params)
        beside = (value, *((aux,) if self.has_aux else ()))
        if self.with_metrics:
            beside = (*beside, metrics_of(values, measured))
        found = (beside if len(beside) > 1 else value), gradients
        return (*found, state) if self.carries_state else found

    def _computes_both(self, values: StepValues, loss: Callable[[Tree], Any], params: Tree) -> bool:
        """Whether both sides of a step that may rest are computed and selected from, in place of a ``cond``."""
        if self.branch != "auto" or isinstance(values.fresh, bool):
            return self.branch == "select"
        # Convolutions inside control flow do not use the CPU's fast kernels (jax#12868), and are slower by far more than a gradient.
        return jax.default_backend() == "cpu" and convolves(loss, params)

    def _selected(self, params: Tree) -> list[bool]:
        return selected_leaves(params, self.parameters, None if self.penalty is None else self.penalty.mask)


@dataclass(frozen=True, eq=False)
class RegularizedGrad:
    """``both`` without the loss. Made by ``grad``."""

    both: RegularizedValueAndGrad

    def init(self, params: Tree) -> State:
        """As ``RegularizedValueAndGrad.init``."""
        return self.both.init(params)

    def __call__(self, params: Tree, /, *args: Any, step: Any = None, loss_scale: Any = None, **kwargs: Any) -> Any:
        value, gradients, *state = self.both(params, *args, step=step, loss_scale=loss_scale, **kwargs)
        found = [gradients, *(value[1:] if self.both.has_aux or self.both.with_metrics else ())]
        return tuple(found + state) if len(found + state) > 1 else gradients


def check_parts(penalty: GradientPenalty) -> None:
    """Raise unless the engine has a function for every part of ``penalty``.

    Raises:
        TypeError: as ``gradreg.registry.check_known``.
    """
    if penalty.direction.perturbs_adapted_layers:
        raise TypeError(
            f"direction must perturb parameters in JAX; got {penalty.direction}, which perturbs the frozen weights under adapters, of "
            "which a function of the adapters has none. Add it inside of the loss, from a key folded with the step, with penalty=None."
        )
    check_known(penalty.direction, ascent_direction, engine="JAX")
    check_known(penalty.mixing, mix if penalty.mixing.plain_gradient == "apart" else weigh_plain, engine="JAX")
    if penalty.mask is not None:
        check_known(penalty.mask, selected_parameters if penalty.mask.level == "parameters" else coordinates, engine="JAX")


def value_and_grad(
    fun: Callable[..., Any],
    penalty: GradientPenalty | None,
    *,
    has_aux: bool = False,
    parameters: Callable[[str, Any], bool] | None = None,
    ascent: Callable[..., Any] | None = None,
    axis_name: AxisName | None = None,
    scope: Scope = "local",
    norm_axes: NormAxes | None = None,
    branch: Branch = "auto",
    with_metrics: bool = False,
    held_out: Callable[..., Any] | None = None,
    rule: HeldOut | None = None,
    perturb: Literal["all", "each"] = "all",
) -> RegularizedValueAndGrad:
    """The loss and the gradient of ``loss + penalty``: in place of ``jax.value_and_grad(fun, has_aux=has_aux)``.

    The gradient is ``g + strength·H·d`` as ``gradreg.penalties`` tabulates it, from the same ``GradientPenalty`` objects that drive
    PyTorch; for the forward difference, ``G = (1 − c)·g + c·∇L(θ + radius·d)`` with c = strength / radius. Every pass calls ``fun`` with
    the same arguments, so a dropout key among them gives all passes the same masks.

    Args:
        fun: ``(params, *args, **kwargs) -> loss``, or ``-> (loss, aux)`` with ``has_aux``; ``loss`` a real floating scalar. Pure.
        penalty: what is penalized; None for the plain gradient, through the same calls.
        has_aux: whether ``fun`` returns ``(loss, aux)``; ``aux`` (batch statistics, say) is what the first pass returned.
        parameters: ``(name, leaf) -> bool``: which leaves of ``params`` are perturbed and counted in the norm; all by default. ``name`` is
            the leaf's path joined by "/", as in "params/Dense_0/kernel". The others are not perturbed in the later passes, and
            their gradients are combined by the same rule.
        ascent: the function from which the direction d comes instead of ``fun``, called with the same arguments; usually ``fun`` on part
            of the batch: ``ascent=lambda params, x, y: loss(params, x[:32], y[:32])``. It returns what ``fun`` returns. If c is known to be
            1 (``sam``, or strength equal to radius), ``fun`` is evaluated only at the perturbed parameters, and loss and aux are those of
            ``ascent``; otherwise they are those of ``fun``, which is evaluated at θ first. Not for "exact", mixings other than "plain",
            ``reuse``, ``decoupled``, and directions that need no gradient.
        axis_name: the mapped axis, or axes, of ``jax.shard_map`` (or of ``jax.vmap(..., axis_name=...)``) over which the batch is
            sharded. The loss and the gradient are then averaged over it, and are the same on every shard; ``aux`` is not averaged.
            Leave it out for arrays sharded under plain ``jit``, where everything is already global.
        norm_axes: the mapped axes of ``jax.shard_map`` along which each device holds another part of a parameter (tensor parallel, ZeRO),
            so that norms are those of the whole model: a name, a tuple of names, or ``(name, leaf) -> names``, which is required with
            ``check_vma=False``. ``fun`` returns the same loss on every device along them, or, for an axis that is also in ``axis_name``
            (``scope="global"`` only), that of the device's own part of the batch. None raises where parameters seem to be divided;
            ``()`` says that none is. Not for penalties that draw or compare single coordinates, and for parts of your own.
        branch: what a step does that may rest, if that is known only when the program runs: "cond" runs one side (``jax.lax.cond``),
            "select" computes both and selects. "auto" is "select" where JAX's default backend is the CPU and ``fun`` convolves, because
            convolutions are very slow inside control flow there, else "cond".
        with_metrics: whether ``(loss, metrics)``, or ``(loss, aux, metrics)``, stands in place of the loss: see ``Metrics``.
        held_out: the loss on data that are not trained on, called with the same arguments and returning the loss alone:
            ``held_out=lambda params, x, y, kept_x, kept_y: loss(params, kept_x, kept_y)``, with a ``fun`` that takes these too. At every
            tenth penalized step its gradient is compared with what the penalty changed, and switches the penalty off while the two
            disagree (``gradreg.HeldOut``). The function then carries a state, whatever the penalty. Without a penalty it is not called.
            A radius that is learned (``LETS``) is moved by it instead, at every ``LETS.every``-th penalized step; its loss must be the
            same function as ``fun``'s, on other data. Not for "exact", and where no pass gives the plain gradient.
        rule: the rule of ``held_out``; None is ``HeldOut()``, or the radius's own where that is learned (``LETS``). With
            ``HeldOut(steps_per_epoch=...)`` the penalty is off until there is overfitting to prevent; the loss of ``held_out`` then has the
            scale of ``fun``'s.
        perturb: "all" makes one perturbation from the gradient of ``fun``; "each", for a ``microbatched`` one, gives every micro-batch its
            own, one after the other: the result is the mean of theirs (m-sharpness, as shards with scope "local" have it). Not with
            ``ascent``, ``held_out``, ``axis_name``, and a penalty that carries a state. To do it at once, also for single samples:
            ``jax.vmap(value_and_grad(fun, penalty, axis_name="m"), in_axes=(None, 0, 0), axis_name="m")``, whose results are alike.
        scope: "local" perturbs each shard by its own gradient (one all-reduce a step; the m-sharpness of the SAM paper), "global" by
            the gradient averaged over ``axis_name`` (two all-reduces). The state is the same on every shard in either scope: with
            "local", the average of ``Friendly`` and the choice of a Fisher mask take one more all-reduce in the steps that change them.

    Returns:
        A function ``(params, *args, step=..., loss_scale=None, **kwargs)`` giving ``(loss, grads)`` or ``((loss, aux), grads)``; ``grads``
        has the structure, shapes and dtypes of ``params``. ``step`` is the optimizer step (≥ 0) for the penalty's schedules, a Python int
        or an integer scalar array, required where ``penalty.depends_on_step``. Pass it as an array under ``jit``, so that one
        compilation serves all steps; a negative one then makes the gradient NaN. ``fun`` receives it if it has a parameter named ``step``.

        ``loss_scale`` (> 0, a number or an array) multiplies the loss before it is differentiated, and divides the gradients, for float16:
        loss and gradients are those without it. It must not be inside ``fun``, where the penalty would take it for part of the objective.

        For a penalty with memory (``penalty.has_memory``) and a decoupled one, the function takes the keyword ``state``, which is
        not passed on to ``fun`` either, and gives ``(loss, grads, state)`` or ``((loss, aux), grads, state)``. Its method
        ``init(params)`` makes the first state, every call the next: a dictionary of arrays whose structure, shapes and dtypes never
        change. Carry, donate, shard and save it like an optimizer state. See ``docs/jax.md``.

    Cost in gradient evaluations: 2 (forward, backward), 3 (central), 1 where the strength is 0. "exact" took 2.2 to 2.9 in
    ``benchmarks/results/jax_step_cost.json``: one ``jax.linearize`` of the gradient, forward over reverse. Where the strength is a
    schedule that may be 0 and ``step`` is traced, ``jax.lax.cond`` decides at run time (see ``branch``); under ``vmap`` over ``step``
    itself both branches run.
    ``ascent`` costs its share of the batch, and 1 more evaluation
    unless c = 1. A direction that needs no gradient (``remembered``, ``random_sam``) with c = 1 costs 1, and ``Reuse`` 1 between its
    fresh steps. State: one more copy of the parameters, for a Fisher mask an eighth to a quarter of one.

    Precision: leaves of fewer than 32 bits are perturbed, and their gradients combined, in float32 and rounded once; the norm is taken in
    float32 at least. ``fun`` still receives parameters of their own dtype, and a perturbation below half a unit in the last place of
    a bfloat16 parameter does not change it: with small radii keep the parameters in float32 and cast to bfloat16 inside ``fun``.

    A zero gradient has no direction and is not perturbed: the result is finite. If schedules make the radius 0 at a traced step where
    the strength is not, the gradient is not finite (``GradientPenalty.coefficient_at`` raises for such a step).

    Raises:
        TypeError, ValueError: here, for arguments of the wrong kind, a ``fun`` with a parameter named ``state`` or ``loss_scale``, and
            for a direction, mask or mixing of your own that has no function in
            this engine (``docs/extending.md``); when traced, for a loss that is not a real floating scalar, parameters
            that are not real floating arrays, a predicate or a mask that selects none, a bad or missing step, a missing state or one of
            other parameters, parameters that are divided over devices and not declared so, and an ``axis_name`` that is not mapped.

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
    for name, option in (("parameters", parameters), ("ascent", ascent), ("held_out", held_out)):
        if option is not None and not callable(option):
            raise TypeError(f"{name} must be a function or None; got {checks.describe(option)}.")
    if penalty is not None:
        check_parts(penalty)
        if ascent is not None:
            penalty.check_ascent("a function")
    if rule is not None and (held_out is None or not isinstance(rule, HeldOut)):  # type: ignore[unnecessary-isinstance]
        raise TypeError(f"rule must be a HeldOut, and go with held_out; got {checks.describe(rule)} with {checks.describe(held_out)}.")
    learns = penalty is not None and penalty.learned_radius is not None
    if learns and (held_out is None or rule is not None):
        raise ValueError(
            f"held_out must be given with {penalty}, whose radius is learned from held-out data, and rule left out; got held_out "
            f"{checks.describe(held_out)} and rule {checks.describe(rule)}. Pass held_out=lambda params, ...: loss, or use AutoRadius()."
        )
    if penalty is not None and held_out is not None:
        check_measurable(penalty, separate_ascent=ascent is not None)
    for name, function in (("fun", fun), ("ascent", ascent), ("held_out", held_out)):
        if function is not None:
            check_parameters(function, name)
    checks.choice("scope", scope, ("local", "global"))
    checks.choice("branch", branch, ("auto", "cond", "select"))
    checks.flag("with_metrics", with_metrics)
    axes = axis_names(axis_name)
    if scope == "global" and not axes:
        raise ValueError(
            "scope must be 'local' without axis_name; got 'global'. Name the mapped axis, or leave scope out: without a mapped axis "
            "there is one gradient, and it is global."
        )
    checks.choice("perturb", perturb, ("all", "each"))
    if perturb == "each":
        if not hasattr(fun, "divides_into_parts"):
            raise ValueError(
                f"perturb must be 'all' unless fun is microbatched; got 'each' with {checks.describe(fun)}. Write "
                "value_and_grad(microbatched(fun), penalty, perturb='each')."
            )
        if ascent is not None or held_out is not None or axes or (penalty is not None and carries_state(penalty)):
            raise ValueError(
                f"perturb must be 'all' with ascent, held_out, axis_name or a penalty that carries a state; got 'each' with {penalty}. Use "
                "jax.vmap(value_and_grad(fun, penalty, axis_name='m'), in_axes=..., axis_name='m')."
            )
        if penalty is not None:
            penalty.check_each()
        part = RegularizedValueAndGrad(
            cast(Any, fun).part, penalty, has_aux, parameters, None, (), "local", norm_axes, branch, with_metrics
        )
        return cast(RegularizedValueAndGrad, EachPart(part, cast(Any, fun).in_axes, has_aux, with_metrics))
    looks = held_out is not None and penalty is not None
    return RegularizedValueAndGrad(
        fun,
        penalty,
        has_aux,
        parameters,
        ascent,
        axes,
        scope,
        norm_axes,
        branch,
        with_metrics,
        held_out if looks else None,
        (rule or HeldOut()) if looks and not learns else None,
    )


def grad(
    fun: Callable[..., Any],
    penalty: GradientPenalty | None,
    *,
    has_aux: bool = False,
    parameters: Callable[[str, Any], bool] | None = None,
    ascent: Callable[..., Any] | None = None,
    axis_name: AxisName | None = None,
    scope: Scope = "local",
    norm_axes: NormAxes | None = None,
    branch: Branch = "auto",
    with_metrics: bool = False,
    held_out: Callable[..., Any] | None = None,
    rule: HeldOut | None = None,
    perturb: Literal["all", "each"] = "all",
) -> RegularizedGrad:
    """The gradient of ``loss + penalty``: in place of ``jax.grad(fun, has_aux=has_aux)``.

    The arguments, cost and errors are those of ``value_and_grad``.

    Returns:
        A function ``(params, *args, step=..., loss_scale=None, **kwargs)`` giving ``grads``, or ``(grads, aux)`` with ``has_aux``, then
        ``metrics`` if asked for; and with a ``state``,
        as ``value_and_grad``'s, ``(grads, state)`` or ``(grads, aux, state)``.

    SAM on ½θ², where every gradient is the point at which it is taken: G = θ + ρ·sign(θ).

    >>> import gradreg, jax.numpy as jnp
    >>> float(grad(lambda theta: 0.5 * theta**2, gradreg.sam(rho=0.5))(jnp.array(-2.0)))
    -2.5
    """
    both = value_and_grad(
        fun,
        penalty,
        has_aux=has_aux,
        parameters=parameters,
        ascent=ascent,
        axis_name=axis_name,
        scope=scope,
        norm_axes=norm_axes,
        branch=branch,
        with_metrics=with_metrics,
        held_out=held_out,
        rule=rule,
        perturb=perturb,
    )
    return RegularizedGrad(both)
