"""The penalties under the names and symbols of their papers; each constructor returns a ``GradientPenalty``."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from gradreg import checks
from gradreg.auto_radius import AutoRadius, self_set_radius_in
from gradreg.directions import (
    Adaptive,
    Clipped,
    EmaDirection,
    FanScaled,
    Friendly,
    Lambda,
    Layout,
    LossEquated,
    MergedNoise,
    Random,
    Unified,
)
from gradreg.mixing import ClipEach, GradientMixing, Reuse, SurrogateGap
from gradreg.penalties import GradientPenalty
from gradreg.plan import Difference
from gradreg.registry import constructor
from gradreg.schedules import JaxScalar, Schedule, Value, as_schedule, is_jax_scalar
from gradreg.validation import NO_PENALTY, value_of


@constructor
def sam(*, rho: Value = 0.05, steps: int = 1) -> GradientPenalty:
    """Sharpness-aware minimization: ``G = ∇L(θ + ρ·g/‖g‖)``.

    The forward difference of the penalty ρ‖g‖ with strength = radius = ρ, so that c = 1.

    Args:
        rho: perturbation radius ρ, the L2 norm over all perturbed parameters together, > 0; a float, a schedule, ``AutoRadius()`` or
            ``LETS()``. 0.05 is the authors' value for CIFAR-10 and ImageNet.
        steps: S ≥ 1 ascent steps of ρ / S, each along the normalised gradient found where the last one ended.

    Cost: S + 1 gradient evaluations.
    Source: Foret et al. 2021, arXiv 2010.01412, algorithm 1 (p = 2).
    Differs from the paper: a zero gradient is not perturbed, where theirs divides by zero.
    """
    radius = _radius(rho)
    return GradientPenalty(power=1, strength=radius, radius=radius, difference="forward", ascent_steps=steps)


@constructor
def gnp(*, r: Value, alpha: float | JaxScalar, mixing: GradientMixing | str = "plain") -> GradientPenalty:
    """Penalizing the gradient norm: ``G = (1 − α)·g + α·∇L(θ + r·g/‖g‖)``, the gradient of ``L + λ‖g‖`` with λ = α·r.

    Args:
        r: perturbation radius r, the L2 norm over all perturbed parameters together, > 0; a float, a schedule, ``AutoRadius()`` or
            ``LETS()``. 0.1 on CIFAR and 0.05 on ImageNet in the paper's recipes.
        alpha: balance coefficient α = λ / r, ≥ 0; 1 is SAM, 0 the plain gradient, more than 1 extrapolates. 0.8 in the paper's recipes.
        mixing: "plain" as the paper says; "unit" mixes (1 − α)·ĝ in place of (1 − α)·g, as the authors' code does by default.

    Cost: 2 gradient evaluations.
    Source: Zhao et al. 2022, arXiv 2202.03599, algorithm 1.
    Differs from the paper: a zero gradient is not perturbed.
    """
    radius = value_of("r", r, allow_zero=isinstance(r, Schedule))
    if is_jax_scalar(alpha):
        strength = as_schedule(value_of("alpha", alpha, allow_zero=True)) * cast("float | Schedule", radius)
        return GradientPenalty(power=1, strength=strength, radius=radius, difference="forward", mixing=mixing)  # type: ignore[arg-type]  # names are accepted
    balance = checks.non_negative("alpha", alpha, remedy=NO_PENALTY)
    if isinstance(radius, Schedule) and balance == 0.0:
        return GradientPenalty(power=1, strength=0.0, radius=radius, difference="forward", mixing=mixing)  # type: ignore[arg-type]  # names are accepted
    strength: Value = radius if balance == 1.0 else balance * cast("float | Schedule", radius)
    return GradientPenalty(power=1, strength=strength, radius=radius, difference="forward", mixing=mixing)  # type: ignore[arg-type]  # names are accepted


@constructor
def fgr(*, gamma: Value | None = None, epsilon: Value, steps: int = 1, clip: float | None = None) -> GradientPenalty:
    """Forward finite-difference gradient regularization: ``G = (1 − γ/ε)·g + (γ/ε)·∇L(θ + ε·g)``, of the penalty (γ/2)‖g‖².

    Args:
        gamma: strength γ, ≥ 0; a float or a schedule. May be left out for a radius that sets itself, which it then follows.
        epsilon: ascent step ε on the gradient as it is (not normalised), > 0; a float, a schedule, ``AutoRadius()`` or ``LETS()``. The
            paper finds large ε best, and γ = ε = 0.05 for an MLP and a ResNet on CIFAR-10.
        steps: S ≥ 1 ascent steps of ε / S, each along the gradient found where the last one ended: with θ' the end of the last,
            ``[∇L(θ') − g] / ε = H·g + O(ε)``.
        clip: M > 0, a norm at which both gradients are clipped before they are used, as in arXiv 2602.18037 (10 there); None for no limit.

    Cost: S + 1 gradient evaluations; with ``clip`` the first gradient is held through the second pass.
    Source: Karakida et al. 2023, arXiv 2210.02720, equation 3.
    """
    penalty = replace(_squared("forward", gamma, epsilon), ascent_steps=steps)
    if clip is None:
        return penalty
    limit = checks.positive("clip", clip, remedy="Leave it out for no limit.")
    return replace(penalty, direction=Clipped(max_norm=limit), mixing=ClipEach(max_norm=limit))


@constructor
def bgr(*, gamma: Value | None = None, epsilon: Value) -> GradientPenalty:
    """Backward finite-difference gradient regularization: ``G = (1 + γ/ε)·g − (γ/ε)·∇L(θ − ε·g)``, of the penalty (γ/2)‖g‖².

    Args:
        gamma: strength γ, ≥ 0; a float or a schedule. May be left out for a radius that sets itself, which it then follows.
        epsilon: descent step ε on the gradient as it is, > 0; a float or a schedule.

    Cost: 2 gradient evaluations.
    Source: Karakida et al. 2023, arXiv 2210.02720, section 3.
    """
    return _squared("backward", gamma, epsilon)


@constructor
def cgr(*, gamma: Value | None = None, epsilon: Value) -> GradientPenalty:
    """Central finite-difference gradient regularization: ``G = g + (γ/2ε)·[∇L(θ + ε·g) − ∇L(θ − ε·g)]``, of the penalty (γ/2)‖g‖².

    Args:
        gamma: strength γ, ≥ 0; a float or a schedule. May be left out for a radius that sets itself, which it then follows.
        epsilon: step ε on the gradient as it is, both ways, > 0; a float or a schedule.

    Cost: 3 gradient evaluations, for an error of O(ε²) where ``fgr`` has O(ε).
    Source: Karakida et al. 2023, arXiv 2210.02720, section 3.
    """
    return _squared("central", gamma, epsilon)


@constructor
def exact(*, gamma: Value, power: int = 2) -> GradientPenalty:
    """The penalty's gradient by double backpropagation: ``G = g + γ·H·g`` (power 2) or ``g + γ·H·g/‖g‖`` (power 1), no finite difference.

    Args:
        gamma: strength, γ of (γ/2)‖g‖² or λ of λ‖g‖, ≥ 0; a float or a schedule.
        power: 2 (the default) or 1.

    Cost: one closure call, about 3 gradient evaluations (9L − 5 matrix products against 3L − 1 on an MLP of L layers), and the memory of
    the backward graph. Needs every operation to be twice differentiable, which fused attention kernels and some compiled models are not,
    and parameters that are not sharded. Otherwise use ``fgr``, which needs neither.
    Source: Drucker and LeCun 1992 ("double backpropagation"); DB in Karakida et al. 2023, arXiv 2210.02720.
    """
    return GradientPenalty(power=power, strength=value_of("gamma", gamma, allow_zero=True), radius=None, difference="exact")


@constructor
def asam(*, rho: Value, eta: float = 0.01, one_dimensional: bool = False) -> GradientPenalty:
    """Adaptive sharpness-aware minimization: ``G = ∇L(θ + ρ·T²g/‖T·g‖)`` with ``T = |θ| + η`` elementwise.

    Args:
        rho: radius ρ in the coordinates T⁻¹θ, > 0; a float or a schedule. About ten times SAM's: the authors use 0.5 on CIFAR-10 and 1 on
            CIFAR-100 and ImageNet.
        eta: η ≥ 0; 0.01 in the paper.
        one_dimensional: whether biases and normalization layers have that T too, instead of T = 1.

    Cost: 2 gradient evaluations.
    Source: Kwon et al. 2021, arXiv 2102.11600, algorithm 1 (p = 2).
    Differs from the paper: a zero gradient is not perturbed; T = 1 for one-dimensional tensors, as in the authors' code.
    """
    radius = _radius(rho)
    return GradientPenalty(power=1, strength=radius, radius=radius, direction=Adaptive(eta=eta, one_dimensional=one_dimensional))


@constructor
def layerwise_sam(*, rho: Value, eta: float = 0.01, one_dimensional: bool = False) -> GradientPenalty:
    """Layer-wise adaptive SAM: ``G = ∇L(θ + ρ·T²g/‖T·g‖)`` with ``T = ‖θ_ℓ‖ + η``, one number for each tensor θ_ℓ.

    Args:
        rho: radius ρ in the coordinates T⁻¹θ, > 0; a float or a schedule.
        eta: η ≥ 0, what lets tensors that begin at zero be perturbed.
        one_dimensional: whether biases and normalization layers have that T too, instead of T = 1.

    Cost: 2 gradient evaluations.
    Source: Müller et al. 2023, arXiv 2306.04226 (their layer-wise variant of ASAM).
    Differs from the paper: a zero gradient is not perturbed; their code has T = (1 + η)·‖θ_ℓ‖. Not the layer-wise scaling of Look-LayerSAM.
    """
    radius = _radius(rho)
    direction = Adaptive(eta=eta, scale="tensor", one_dimensional=one_dimensional)
    return GradientPenalty(power=1, strength=radius, radius=radius, direction=direction)


@constructor
def friendly_sam(*, rho: Value, sigma: float = 1.0, beta: float = 0.9) -> GradientPenalty:
    """Friendly SAM: ``m ← β·m + (1 − β)·g``, ``d = g − σ·m``, ``G = ∇L(θ + ρ·d/‖d‖)``: ascend along what is specific to this batch.

    Args:
        rho: perturbation radius ρ, > 0; a float or a schedule.
        sigma: σ ≥ 0; 1 in the paper, 0 is SAM.
        beta: decay of the average in [0, 1), λ in the paper.

    Cost: 2 gradient evaluations, and the memory of one more copy of the parameters.
    Source: Li et al. 2024, arXiv 2403.12350, algorithm 1.
    Differs from the paper: a direction of zeros is not perturbed; see ``gradreg.Friendly`` for its authors' code.
    """
    radius = _radius(rho)
    return GradientPenalty(power=1, strength=radius, radius=radius, direction=Friendly(sigma=sigma, beta=beta))


@constructor
def le_sam(*, sigma: Value, rho_max: float = 0.3) -> GradientPenalty:
    """Loss-equated SAM: ``G = ∇L(θ + min(σ/‖g‖, ρ_max)·g/‖g‖)``: the loss rises by σ to first order, whatever the norm of the gradient.

    Args:
        sigma: first-order rise σ of the loss, > 0; a float or a schedule. 0.35 in the authors' command for CIFAR-100. They anneal it to 0
            over the last fifth of training: ``sigma=Anneal(value=0.35, start=..., steps=...)``; steps at which it is 0 are plain ones.
        rho_max: cap ρ_max > 0 on the L2 norm of the perturbation. 0.3 is the default of the authors' code; that command has 999, no cap.

    Cost: 2 gradient evaluations.
    Source: Wang et al. 2026, arXiv 2605.10183.
    Differs from the paper: a zero gradient is not perturbed, where theirs adds a small constant to the norm.
    """
    rise = value_of("sigma", sigma, allow_zero=isinstance(sigma, Schedule))
    return GradientPenalty(power=2, strength=rise, radius=rise, direction=LossEquated(rho_max=rho_max))


@constructor
def unified_sam(*, rho: Value, lam: float | Lambda = "1-1/t") -> GradientPenalty:
    """Unified SAM: ``G = ∇L(θ + ρ·(1 − λ + λ/‖g‖)·g)``, between the perturbations by ρ·g (λ = 0) and by ρ·g/‖g‖ (λ = 1, SAM).

    Args:
        rho: ρ > 0; a float or a schedule. 0.1 to 0.4 in the paper.
        lam: λ in [0, 1], or "1-1/t" (the paper's best, from the gradient to its unit vector) or "1/t", with t = step + 1.

    Cost: 2 gradient evaluations.
    Source: Oikonomou and Loizou 2025, arXiv 2503.02225, Unified SAM.
    Differs from the paper: a zero gradient is not perturbed.
    """
    radius = _radius(rho)
    return GradientPenalty(power=2, strength=radius, radius=radius, direction=Unified(lam=lam))


@constructor
def mup2_sam(*, rho: Value, layout: Layout | None = None) -> GradientPenalty:
    """μP²: ``G = ∇L(θ + ρ·T²g/‖T·g‖)`` with ``T = √(fan_out/fan_in)`` of each tensor: layerwise radii at which one ρ serves all widths.

    For networks in μP (initialization and learning rates that hold across widths), where plain SAM perturbs nearly only the last layer.

    Args:
        rho: perturbation radius ρ in the coordinates T⁻¹θ, > 0; a float, a schedule, ``AutoRadius()`` or ``LETS()``.
        layout: "out-in" for weights of shape (out, in, ...), "in-out" for (..., in, out); None is "out-in" in PyTorch, and JAX needs one.

    Cost: 2 gradient evaluations.
    Source: Haas et al. 2024, arXiv 2411.00075.
    Differs from the paper: a zero gradient is not perturbed; T is of fans, theirs of powers of one width (see ``gradreg.FanScaled``).
    """
    radius = _radius(rho)
    return GradientPenalty(power=1, strength=radius, radius=radius, direction=FanScaled(layout=layout))


@constructor
def remembered(*, epsilon: Value, decay: float = 0.5) -> GradientPenalty:
    """F-GR along the average of earlier results, at no extra pass: ``G = ∇L(θ + ε·m)``, then ``m ← decay·m + (1 − decay)·G``.

    With γ = ε (c = 1) the plain gradient has no weight, and the direction does not need it either, so that pass is left out.

    Args:
        epsilon: step ε on the average as it is (not normalised), > 0; a float or a schedule.
        decay: in [0, 1).

    Cost: 1 gradient evaluation, and the memory of one more copy of the parameters. The loss returned is that at the perturbed parameters.
    Source: none known to us. Not MSAM (``msam``), which goes the other way and normalises.
    """
    radius = value_of("epsilon", epsilon, allow_zero=isinstance(epsilon, Schedule))
    return GradientPenalty(power=2, strength=radius, radius=radius, direction=EmaDirection(decay=decay))


@constructor
def msam(*, rho: Value, decay: float = 0.9) -> GradientPenalty:
    """Momentum-SAM, at no extra pass: ``G = ∇L(θ − ρ·m/‖m‖)``, then ``m ← decay·m + (1 − decay)·G``.

    The perturbation goes where the momentum goes, down along earlier gradients; ``remembered`` goes up along them.

    Args:
        rho: perturbation radius ρ, > 0; a float or a schedule.
        decay: in [0, 1): the optimizer's momentum coefficient in the paper, and 0.9 there.

    Cost: 1 gradient evaluation, and the memory of one more copy of the parameters. The loss returned is that at the perturbed parameters.
    Source: Becker et al. 2024, arXiv 2401.12033, algorithm 1.
    Differs from the paper: m is kept here, so that it works with any optimizer; theirs is the optimizer's momentum, which has the same
    direction apart from the weight decay in it.
    """
    radius = _radius(rho)
    return GradientPenalty(power=1, strength=radius, radius=radius, direction=EmaDirection(decay=decay, ahead=True))


@constructor
def random_sam(*, rho: Value, seed: int = 0) -> GradientPenalty:
    """The control: SAM along a random direction, ``G = ∇L(θ + ρ·s/‖s‖)`` with s of +1 and −1 drawn again every step.

    Args:
        rho: perturbation radius ρ, > 0; a float or a schedule.
        seed: a whole number from 0 to 2³² − 1.

    Cost: 1 gradient evaluation. The loss returned is that at the perturbed parameters.
    """
    radius = _radius(rho)
    return GradientPenalty(power=1, strength=radius, radius=radius, direction=Random(seed=seed))


@constructor
def flat_lora(*, sigma: Value, seed: int = 0) -> GradientPenalty:
    """Flat-LoRA, for low-rank adapters at no extra pass: ``G = ∇L(W + s·B·A + σ·E)`` with ``E = ‖W + s·B·A‖·ξ/√(n)``, row by row.

    The gradient is that of the adapters A and B; the noise is on the merged weights, which are what is used in the end. n is the number
    of inputs of a layer, s the adapter's scaling, and ξ ~ N(0, 1) for each entry, drawn again every step.

    Args:
        sigma: σ > 0, the standard deviation of an entry as a share of its row's root mean square; a float or a schedule. 0.05 in the
            authors' command for Llama 2, whose code raises it along half a cosine: ``sigma=Cosine(start=0.0, end=0.05, steps=...)``.
        seed: a whole number from 0 to 2³² − 1.

    Cost: 1 gradient evaluation, and the drawing of the noise twice for each layer. The loss returned is that at the perturbed weights. No
    memory but that of the noise of one layer. PyTorch only, for adapters on ``torch.nn.Linear`` layers (PEFT's LoRA).
    Source: Li et al. 2025, arXiv 2409.14396.
    Differs from the paper: see ``gradreg.MergedNoise``.
    """
    radius = value_of("sigma", sigma, allow_zero=isinstance(sigma, Schedule))
    return GradientPenalty(power=2, strength=radius, radius=radius, direction=MergedNoise(seed=seed))


@constructor
def gsam(*, rho: Value, a: float) -> GradientPenalty:
    """Surrogate-gap guided SAM: ``G = g₂ − a·(part of g orthogonal to g₂)`` with ``g₂ = ∇L(θ + ρ·g/‖g‖)``.

    Args:
        rho: perturbation radius ρ, > 0; a float or a schedule.
        a: weight α ≥ 0 of the surrogate gap; 0 is SAM.

    Cost: 2 gradient evaluations; the first gradient is held through the second pass.
    Source: Zhuang et al. 2022, arXiv 2203.08065, algorithm 1.
    Differs from the paper: a zero gradient is not perturbed; ρ follows the schedule it is given, where theirs follows the learning rate
    (for one that falls along half a cosine, ``rho=Cosine(start=..., end=..., steps=...)``).
    """
    radius = _radius(rho)
    return GradientPenalty(power=1, strength=radius, radius=radius, mixing=SurrogateGap(a=a))


@constructor
def wsam(*, rho: Value, gamma: float, decoupled: bool = False) -> GradientPenalty:
    """Weighted SAM: ``g + γ/(1 − γ)·(g₂ − g)`` with ``g₂ = ∇L(θ + ρ·g/‖g‖)``.

    Coupled, this is ``gnp(r=ρ, alpha=γ/(1 − γ))``. Decoupled, g alone goes through the optimizer, and ``lr·γ/(1 − γ)·(g₂ − g)`` is
    subtracted from the parameters separately: in PyTorch by ``regularizer.decoupled_step(optimizer)`` after ``optimizer.step()``.

    Args:
        rho: perturbation radius ρ, > 0; a float or a schedule.
        gamma: weight γ in [0, 1) of the sharpness; 1/2 is SAM, 0 the plain gradient. The paper's default is 0.9.
        decoupled: whether the sharpness is kept out of the optimizer.

    Cost: 2 gradient evaluations; decoupled, the first gradient is held through the second pass.
    Source: Yue et al. 2023, arXiv 2305.15817, algorithm 1 (decoupled) and its generic form.
    Differs from the paper: a zero gradient is not perturbed.
    """
    weight = checks.fraction("gamma", gamma)
    coupled = gnp(r=_radius(rho), alpha=1.0 if weight == 0.5 else weight / (1.0 - weight))
    return replace(coupled, decoupled=True) if checks.flag("decoupled", decoupled) else coupled


@constructor
def looksam(*, rho: Value, k: int = 5, a: float = 0.7) -> GradientPenalty:
    """LookSAM: SAM at every k-th step, and between them ``G = g + a·(‖g‖/‖h‖)·h``, h the last SAM gradient's part orthogonal to its g.

    Args:
        rho: perturbation radius ρ, > 0; a float or a schedule.
        k: optimizer steps, ≥ 1; 1 is SAM. 5 and 10 in the paper.
        a: weight α ≥ 0 of what is reused; 0.7 in the paper.

    Cost: 1 + 1/k gradient evaluations on average, and the memory of one more copy of the parameters.
    Source: Liu et al. 2022, arXiv 2203.02714, algorithm 1.
    Differs from the paper: a zero gradient is not perturbed.
    """
    radius = _radius(rho)
    return GradientPenalty(power=1, strength=radius, radius=radius, reuse=Reuse(k=k, a=a))


@constructor
def auto(*, target: float = 0.95) -> GradientPenalty:
    """The penalty for those who do not know which: F-GR with a radius that sets itself, ``fgr(epsilon=AutoRadius(target=target))``.

    With the radius set to one alignment, SAM and F-GR are the same within noise, and on digits with wrong labels as good as the best
    fixed radius of a sweep (docs/choosing.md). It does not know whether a penalty helps: where a network underfits, use none, or give
    ``regularizer.backward`` held-out samples by ``held_out=``, with ``HeldOut(steps_per_epoch=...)``.

    Args:
        target: the alignment that the radius aims at, in (0, 1); smaller is stronger. See ``gradreg.AutoRadius``.

    Cost: 2 gradient evaluations.
    Source: none known to us; the penalty is that of Karakida et al. 2023, arXiv 2210.02720.
    """
    return fgr(epsilon=AutoRadius(target=target))


def _radius(rho: Value) -> Value:
    return value_of("rho", rho, allow_zero=isinstance(rho, Schedule))


def _squared(difference: Difference, gamma: Value | None, epsilon: Value) -> GradientPenalty:
    if gamma is None and self_set_radius_in(epsilon) is None:
        name = {"forward": "fgr", "backward": "bgr", "central": "cgr"}[difference]
        raise TypeError(
            f"{name} needs gamma; got only epsilon={epsilon!r}. Write {name}(gamma=..., epsilon=...), or {name}(epsilon=AutoRadius())."
        )
    return GradientPenalty(
        power=2,
        strength=value_of("gamma", epsilon if gamma is None else gamma, allow_zero=True),
        radius=value_of("epsilon", epsilon, allow_zero=isinstance(epsilon, Schedule)),
        difference=difference,
    )
