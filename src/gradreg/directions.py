"""How the ascent direction is formed: what the parameters are perturbed along for the second gradient.

A penalty perturbs the parameters by ``radius · v / ‖w‖`` (power 1) or ``radius · v`` (power 2):

    ============  =============================  =====================  ==========================================
    direction     v                              w                      first pass
    ============  =============================  =====================  ==========================================
    Gradient      g                              g                      yes
    Adaptive      T²·g                           T·g                    yes
    Friendly      g − σ·m, m an EMA of g         v                      yes
    LossEquated   g / ‖g‖², capped               its own                yes
    Unified       (1 − λ + λ/‖g‖)·g              its own                yes
    Clipped       min(1, M/‖g‖)·g                its own                yes
    FanScaled     T²·g, T = √(fan_out/fan_in)    T·g                    yes
    EmaDirection  ±m, an EMA of the results G    v                      none
    Random        ±1 each, drawn                 v                      none
    MergedNoise   ‖W'_i‖·ξ/√n, ξ drawn           its own                none
    ============  =============================  =====================  ==========================================

``LossEquated``, ``Unified``, ``Clipped`` and ``MergedNoise`` set the length themselves, and go with power 2, which perturbs by
``radius · v``.
``MergedNoise`` perturbs the frozen weights W under low-rank adapters instead of the parameters (W' = W + B·A, i its rows).
A direction without a first pass needs no gradient at the unperturbed parameters: where c = strength / radius is 1, the step costs 1
evaluation. EMAs begin at zero and are updated with the gradient of every step, also of those at which the strength is 0.

A direction is a frozen dataclass that says what it needs; each engine has one function per direction (``gradreg.torch.directions``,
``gradreg.jax.directions``), found by type. ``docs/extending.md`` adds one from a file of one's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from gradreg import checks
from gradreg.serialization import Part

Scale = Literal["element", "tensor"]
Layout = Literal["out-in", "in-out"]
Lambda = Literal["1/t", "1-1/t"]


class Direction(Part, tag="direction"):
    """One of the kinds in this module's table, or one of your own; immutable, compared by value."""

    needs_gradient: ClassVar[bool] = True
    """Whether it is formed from the gradient at the unperturbed parameters, and a step therefore begins with a pass there."""

    is_gradient: ClassVar[bool] = False
    """Whether it is the gradient itself, which double backpropagation, several ascent steps and unit mixing require."""

    averages: ClassVar[Literal["gradients", "results"] | None] = None
    """What it needs an exponential moving average of: the gradients at θ, the results G, or None for no average."""

    ascends: ClassVar[bool] = False
    """Whether the loss of the step's batch rises along it, to first order, wherever the gradient is not 0."""

    powers: ClassVar[tuple[int, ...]] = (1, 2)
    """The powers of the norm for which it is defined."""

    scales_with_radius: ClassVar[bool] = True
    """Whether the perturbation is proportional to the radius."""

    needs_real: ClassVar[bool] = False
    """Whether it is defined for real parameters only."""

    depends_on_step: ClassVar[bool] = False
    """Whether the number of the step enters, so that the JAX engine must be given it."""

    perturbs_adapted_layers: ClassVar[bool] = False
    """Whether the weights under low-rank adapters are perturbed in its place, while a pass runs, and no parameter is."""

    @property
    def average_decay(self) -> float:
        """The decay of that average, in [0, 1)."""
        raise NotImplementedError(f"{type(self).__name__} must define average_decay, because it declares averages = {self.averages!r}.")

    @property
    def has_memory(self) -> bool:
        """Whether it depends on earlier steps."""
        return self.averages is not None


@dataclass(frozen=True, kw_only=True)
class Gradient(Direction, name="gradient"):
    """The gradient itself: ``v = w = g``."""

    is_gradient: ClassVar[bool] = True
    ascends: ClassVar[bool] = True

    def __str__(self) -> str:
        return "gradient"


@dataclass(frozen=True, kw_only=True)
class Adaptive(Direction, name="adaptive"):
    """The gradient in coordinates scaled by the parameters themselves: ``v = T²·g``, ``w = T·g``.

    With η = 0, rescaling a layer and undoing it in the next changes nothing. T is treated as constant in the second gradient.

    Args:
        eta: η ≥ 0, what lets small parameters be perturbed.
        scale: "element" for ``T = |θ| + η`` elementwise; "tensor" for ``T = ‖θ_ℓ‖ + η``, one number for each tensor θ_ℓ ("layer-wise").
        one_dimensional: whether tensors of one dimension (biases, normalization layers) and scalars have that T too, instead of T = 1.

    Source: Kwon et al. 2021, arXiv 2102.11600, equation 5 and section 3 ("element"; the authors' code leaves one-dimensional tensors at T =
    1); Müller et al. 2023, arXiv 2306.04226 ("tensor": their layer-wise variant).
    Differs from the paper: for "tensor" their code has T = (1 + η)·‖θ_ℓ‖.
    """

    eta: float = 0.01
    scale: Scale = "element"
    one_dimensional: bool = False

    ascends: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "eta", checks.non_negative("eta", self.eta))
        checks.choice("scale", self.scale, get_args(Scale))
        checks.flag("one_dimensional", self.one_dimensional)

    def __str__(self) -> str:
        everywhere = ", also one-dimensional tensors" if self.one_dimensional else ""
        return f"adaptive by {self.scale}(eta {self.eta:g}{everywhere})"


@dataclass(frozen=True, kw_only=True)
class Friendly(Direction, name="friendly"):
    """The gradient without what it has in common with earlier ones: ``m ← β·m + (1 − β)·g``, then ``v = w = g − σ·m``.

    Args:
        sigma: σ ≥ 0, how much of the average is taken away; 0 is ``Gradient``.
        beta: β in [0, 1), the decay of the average (λ in the paper); 0.9 averages over about ten steps.

    Source: Li et al. 2024, arXiv 2403.12350, algorithm 1, with m = 0 before the first step.
    Differs from the paper: nothing. The authors' code starts with m = g and subtracts the average of the former steps, which at σ = 1
    gives the same direction from the second step on, apart from that start.
    """

    sigma: float = 1.0
    beta: float = 0.9

    averages: ClassVar[Literal["gradients", "results"] | None] = "gradients"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", checks.non_negative("sigma", self.sigma))
        object.__setattr__(self, "beta", checks.fraction("beta", self.beta))

    @property
    def average_decay(self) -> float:
        return self.beta

    def __str__(self) -> str:
        return f"friendly(sigma {self.sigma:g}, beta {self.beta:g})"


@dataclass(frozen=True, kw_only=True)
class LossEquated(Direction, name="loss-equated"):
    """The gradient at a length that gives a fixed first-order rise of the loss: ``radius·v = min(σ/‖g‖, ρ_max)·g/‖g‖``, the radius being σ.

    Where the cap does not bind, ``v = g/‖g‖²``, so that to first order in σ the result is the gradient of ``L + σ·log‖g‖``.

    Args:
        rho_max: ρ_max > 0, the largest L2 norm of the perturbation; where the gradient is smaller than σ/ρ_max this is SAM's radius.

    Source: Wang et al. 2026, arXiv 2605.10183 (LE-SAM).
    Differs from the paper: a zero gradient is not perturbed, where theirs adds a small constant to the norm.
    """

    rho_max: float = 0.3

    powers: ClassVar[tuple[int, ...]] = (2,)
    ascends: ClassVar[bool] = True
    scales_with_radius: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "rho_max", checks.positive("rho_max", self.rho_max, remedy="Use a large number for no cap."))

    def __str__(self) -> str:
        return f"loss-equated(rho_max {self.rho_max:g})"


@dataclass(frozen=True, kw_only=True)
class Unified(Direction, name="unified"):
    """Between the gradient and its unit vector: ``v = (1 − λ + λ/‖g‖)·g``.

    Args:
        lam: λ in [0, 1]: 1 is SAM's normalized perturbation, 0 the gradient as it is; or, with t = step + 1, "1-1/t" from the gradient to
            the unit vector, and "1/t" from the unit vector to the gradient.

    Source: Oikonomou and Loizou 2025, arXiv 2503.02225, Unified SAM.
    Differs from the paper: where the gradient is zero, nothing is perturbed.
    """

    lam: float | Lambda = "1-1/t"

    powers: ClassVar[tuple[int, ...]] = (2,)
    ascends: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.lam, str):
            checks.choice("lam", self.lam, get_args(Lambda))
        else:
            object.__setattr__(self, "lam", checks.share("lam", self.lam))

    @property
    def depends_on_step(self) -> bool:  # type: ignore[override]  # of other directions a class variable
        return isinstance(self.lam, str)

    def lam_at(self, step: Any) -> Any:
        """λ at ``step``, a whole number or a traced one."""
        if not isinstance(self.lam, str):
            return self.lam
        first = 1.0 / ((step + 1) / 1)  # whole numbers divided by 1 are floats, as strict promotion of JAX asks
        return first if self.lam == "1/t" else 1.0 - first

    def __str__(self) -> str:
        return f"unified(lambda {self.lam if isinstance(self.lam, str) else format(self.lam, 'g')})"


@dataclass(frozen=True, kw_only=True)
class Clipped(Direction, name="clipped"):
    """The gradient, no longer than M: ``v = min(1, M/‖g‖)·g``, so that a perturbation by ε·v is never longer than ε·M.

    Args:
        max_norm: M > 0.

    Source: the code of Ackermann et al. 2026, arXiv 2602.18037, which clips the gradient before it perturbs by it.
    Differs from their code: the norm is that over the perturbed parameters, theirs over all trained ones.
    """

    max_norm: float

    powers: ClassVar[tuple[int, ...]] = (2,)
    ascends: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_norm", checks.positive("max_norm", self.max_norm, remedy="Use Gradient() for no limit."))

    def __str__(self) -> str:
        return f"gradient clipped at {self.max_norm:g}"


@dataclass(frozen=True, kw_only=True)
class FanScaled(Direction, name="fan-scaled"):
    """The gradient with layerwise radii that hold across widths: ``v = T²·g``, ``w = T·g``, ``T = √(fan_out/fan_in)`` for each tensor.

    In μP (maximal update parameterization) the gradient of a layer has a norm of the order of √(fan_in/fan_out). With this T every layer
    contributes a term of the order of 1 to ‖w‖, and is perturbed by a matrix of spectral norm of the order of radius·√(fan_out/fan_in),
    which changes what it computes by an amount that does not depend on the width. Without it the last layer has nearly all of the norm.

    A matrix or kernel of a convolution has the fans of ``torch.nn.init``, of which the receptive field cancels. Biases, parameters of
    normalization layers, and in PyTorch the tables of ``nn.Embedding``, have fan_in = 1; a scalar has T = 1.

    Args:
        layout: where the outputs are: "out-in" for weights of shape (out, in, ...), as in PyTorch and Equinox; "in-out" for (..., in, out),
            as in Flax. None is "out-in" in PyTorch, where transposed convolutions are told by their modules; the JAX engine asks for one.

    Source: Haas et al. 2024, arXiv 2411.00075 (μP², maximal update and perturbation parameterization): the condition that the perturbation
    of every layer has a spectral norm of the order of √(fan_out/fan_in).
    Differs from the paper: written with fans, where theirs has powers of one width, so the constants of input and output layers differ.
    """

    layout: Layout | None = None

    ascends: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.layout is not None:
            checks.choice("layout", self.layout, get_args(Layout))

    def scale_of(self, shape: Sequence[int], *, layout: Layout, looked_up: bool = False) -> float:
        """T of a tensor of ``shape``.

        Args:
            shape: of the whole tensor, not of a shard.
            layout: where the outputs are.
            looked_up: whether it is a table (rows, features) of which an input selects rows.
        """
        if not shape:
            return 1.0
        if len(shape) == 1 or looked_up:
            return math.sqrt(shape[-1])
        fan_out, fan_in = shape[:2] if layout == "out-in" else (shape[-1], shape[-2])
        return math.sqrt(fan_out / fan_in)

    def __str__(self) -> str:
        return f"fan-scaled({self.layout})" if self.layout else "fan-scaled"


@dataclass(frozen=True, kw_only=True)
class EmaDirection(Direction, name="ema"):
    """The average of the results of earlier steps: ``v = w = m``; after the step ``m ← decay·m + (1 − decay)·G``.

    The average is zero at first, so the first step gives the plain gradient.

    Args:
        decay: in [0, 1); 0 keeps the last step alone.
        ahead: whether the parameters are perturbed the other way, ``v = −m``: to where descent would take them.

    Source: with ``ahead``, Becker et al. 2024, arXiv 2401.12033 (MSAM); none known to us for a perturbation up along this average.
    Differs from the paper: m is kept here, of regularized gradients alone, in place of the optimizer's momentum, which is 1 / (1 − decay)
    times as long and has the optimizer's weight decay in it.
    """

    decay: float = 0.5
    ahead: bool = False

    needs_gradient: ClassVar[bool] = False
    averages: ClassVar[Literal["gradients", "results"] | None] = "results"

    def __post_init__(self) -> None:
        object.__setattr__(self, "decay", checks.fraction("decay", self.decay))
        checks.flag("ahead", self.ahead)

    @property
    def average_decay(self) -> float:
        return self.decay

    def __str__(self) -> str:
        return f"average of results(decay {self.decay:g}{', ahead' if self.ahead else ''})"


@dataclass(frozen=True, kw_only=True)
class Random(Direction, name="random"):
    """+1 or −1 in each coordinate, drawn again every step: the control that a meaningful direction must beat.

    The signs depend only on the seed, the step, the parameter's index in the model and the coordinate's index in the parameter
    (``gradreg.hashing``). For power 1 only: a squared norm's direction has the scale of the gradient, which is not computed here. Because
    no gradient is used, parameters that the loss does not depend on are perturbed too, and counted in the norm.

    Args:
        seed: a whole number from 0 to 2³² − 1.
    """

    seed: int = 0

    needs_gradient: ClassVar[bool] = False
    powers: ClassVar[tuple[int, ...]] = (1,)
    needs_real: ClassVar[bool] = True
    depends_on_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", checks.seed(self.seed))

    def __str__(self) -> str:
        return f"random(seed {self.seed})"


@dataclass(frozen=True, kw_only=True)
class MergedNoise(Direction, name="merged-noise"):
    """Gaussian noise on the frozen weights under low-rank adapters: ``v_ij = ‖W'_i‖/√n·ξ_ij`` with ``W' = W + s·B·A``, ξ ~ N(0, 1).

    i is a row of the merged weight W' (an output), of n entries (inputs). So the output of a layer gets noise of a standard deviation in
    proportion to its own scale and to the radius, whatever the width. The noise is drawn again every step, and is the same in all
    micro-batches and on all ranks; it depends on the seed, the step and the place of the weight in the model (and on the kind of device,
    whose generator draws it).

    A layer adds it to its weight while it computes, forward and backward, and drops it: nothing of the size of the frozen model is stored
    or copied. No parameter is perturbed. For models whose adapters lie on ``torch.nn.Linear`` layers, as those of PEFT's LoRA do; PyTorch
    only.

    Args:
        seed: a whole number from 0 to 2³² − 1.

    Source: Li et al. 2025, arXiv 2409.14396 (Flat-LoRA), the refined perturbation of the merged weight; its authors' code.
    Differs from the paper: their code draws by the time of day, separately on each rank, and subtracts the noise from the weight
    again, which leaves rounding errors in it.
    """

    seed: int = 0

    needs_gradient: ClassVar[bool] = False
    powers: ClassVar[tuple[int, ...]] = (2,)
    depends_on_step: ClassVar[bool] = True
    perturbs_adapted_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", checks.seed(self.seed))

    def __str__(self) -> str:
        return f"merged noise(seed {self.seed})"
