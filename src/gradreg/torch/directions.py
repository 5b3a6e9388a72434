"""The vectors along which the parameters are perturbed: one function per direction, and the norm by which a normalized step divides.

To add a direction of your own, register a function for its class::

    @ascent_direction.register
    def _(direction: Mine, inputs: DirectionInputs) -> Ascent:
        return inputs.along([g.sign() for g in inputs.plain_gradients()])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import singledispatch
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from gradreg.directions import (
    Adaptive,
    Clipped,
    Direction,
    EmaDirection,
    FanScaled,
    Friendly,
    Gradient,
    LossEquated,
    MergedNoise,
    Random,
    Unified,
)
from gradreg.hashing import hashed
from gradreg.torch.adapted import AdaptedLayer, LayerNoise
from gradreg.torch.draws import signs
from gradreg.torch.norms import local_shards, norm_of_shards, safe_ratio, tensor_norms

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class Ascent:
    """Where to: θ + distance·vectors.

    Args:
        parameters: what is perturbed.
        vectors: v times ``weight`` and ``scale``: this rank's shards.
        norm: ‖w‖ times the same, or a function that measures it if it is needed.
        weight: a factor of the vectors, that of the pass whose gradient they are.
        scale: another, > 0: the loss scale of that pass.
        factor: what v is a multiple of the vectors by, beside both; for power 2 only.
        noise: what layers under adapters are perturbed by, in place of parameters.
    """

    parameters: Sequence[nn.Parameter]
    vectors: list[Tensor]
    norm: Tensor | float | Callable[[], Tensor]
    weight: float | Tensor = 1.0
    scale: float | Tensor = 1.0
    factor: float | Tensor = 1.0
    noise: LayerNoise | None = None

    def distance(self, power: int, radius: float | Tensor) -> float | Tensor:
        """The factor of the vectors for a step of ``radius``, which is negative for a step backward."""
        if power == 2:
            return radius * self.factor / self.weight / self.scale
        # The weighted vector is w·v and its norm |w|·‖v‖: only the sign of w remains, and the loss scale cancels.
        sign = torch.sign(self.weight) if isinstance(self.weight, Tensor) else 1.0 if self.weight > 0 else -1.0
        signed = radius * sign
        norm = self.norm() if callable(self.norm) else self.norm
        signed = signed.to(norm.dtype) if isinstance(signed, Tensor) and isinstance(norm, Tensor) else signed
        return safe_ratio(signed, norm) if isinstance(norm, Tensor) else signed / norm


@dataclass
class DirectionInputs:
    """What a direction is formed from.

    Args:
        parameters: those that are perturbed in this step. Of sharded ones all lists below hold this rank's shards.
        places: the index of every parameter in the model; ``indices`` are those of ``parameters``.
        step: the optimizer step.
        gradients: of each, the gradient times ``weight`` and ``scale``, or none if the direction needs no gradient. Read-only
            unless ``consumable``.
        norm: measures the L2 norm of ``gradients`` over all of them.
        average: the EMA that ``Direction.averages`` declares, including this step's gradient if it averages gradients; else empty.
        weight: the weight with which the gradients enter the result; never 0.
        scale: the loss scale, > 0.
        consumable: whether nothing else needs ``gradients``, so that they may be overwritten.
        radius: the penalty's radius at this step.
        model: what the parameters are of.
        layers: those under adapters, for a direction that declares ``perturbs_adapted_layers``.
    """

    parameters: Sequence[nn.Parameter]
    places: Mapping[nn.Parameter, int]
    step: int
    gradients: list[Tensor]
    norm: Callable[[], Tensor]
    average: list[Tensor] = field(default_factory=list)
    weight: float | Tensor = 1.0
    scale: float | Tensor = 1.0
    consumable: bool = False
    radius: float | Tensor = 0.0
    model: nn.Module | None = None
    layers: Sequence[AdaptedLayer] = ()

    @property
    def indices(self) -> list[int]:
        """The index of each parameter in the model."""
        return [self.places[p] for p in self.parameters]

    def plain_gradients(self) -> list[Tensor]:
        """The gradients without weight and loss scale; new tensors."""
        return list(torch._foreach_mul(self.gradients, 1.0 / (self.weight * self.scale)))

    def inverse_norm(self) -> float | Tensor:
        """1 / ‖g‖ of the gradients without weight and loss scale; 0 for a zero gradient."""
        return safe_ratio(abs(self.weight) * self.scale, self.norm())

    def along(self, vectors: list[Tensor]) -> Ascent:
        """An ascent along ``vectors``, one for each parameter, measured by their own length."""
        return Ascent(self.parameters, vectors, lambda: norm_of_shards(vectors, self.parameters))


@singledispatch
def ascent_direction(direction: Direction, inputs: DirectionInputs) -> Ascent:
    """The vectors v of ``direction``, and ‖w‖, as the table of ``gradreg.directions`` has them."""
    raise TypeError(f"no function for {direction!r}")  # the regularizer has checked that there is one


@ascent_direction.register
def _(direction: Gradient, inputs: DirectionInputs) -> Ascent:
    return _along_gradient(inputs)


@ascent_direction.register
def _(direction: Adaptive, inputs: DirectionInputs) -> Ascent:
    parameters, vectors = inputs.parameters, list(inputs.gradients)
    scaled = [i for i, p in enumerate(parameters) if p.dim() > 1 or direction.one_dimensional]
    if not scaled:
        return Ascent(parameters, vectors, inputs.norm, inputs.weight, inputs.scale)
    here = local_shards([parameters[i] for i in scaled])
    if direction.scale == "element":
        scales = torch._foreach_abs(here)
        torch._foreach_add_(scales, direction.eta)
    else:
        scales = torch._foreach_add(tensor_norms(here, [parameters[i] for i in scaled]), direction.eta)
    return _in_coordinates(inputs, vectors, scaled, scales)


@ascent_direction.register
def _(direction: FanScaled, inputs: DirectionInputs) -> Ascent:
    modules = [] if inputs.model is None else list(inputs.model.modules())
    tables = {p for m in modules if isinstance(m, _TABLES) for p in m.parameters(recurse=False)}
    transposed = {m.weight for m in modules if isinstance(m, _TRANSPOSED)}
    scales: list[float] = []
    for p in inputs.parameters:
        if p in transposed and direction.layout is None:  # (in, out, ...)
            scales.append(direction.scale_of((p.shape[1], p.shape[0]), layout="out-in"))
        else:
            scales.append(direction.scale_of(p.shape, layout=direction.layout or "out-in", looked_up=p in tables))
    return _in_coordinates(inputs, list(inputs.gradients), range(len(scales)), scales)


def _in_coordinates(inputs: DirectionInputs, vectors: list[Tensor], scaled: Sequence[int], scales: Any) -> Ascent:
    """v = T²·g and ‖T·g‖, with ``scales``, tensors or numbers, for those of the ``vectors`` g that are ``scaled``, and 1 for the others."""
    products = [vectors[i] for i in scaled]
    if inputs.consumable:
        torch._foreach_mul_(products, scales)
    else:
        products = torch._foreach_mul(products, scales)
    for i, product in zip(scaled, products, strict=True):
        vectors[i] = product
    norm = norm_of_shards(vectors, inputs.parameters)  # of T·g, before the second factor T
    torch._foreach_mul_(products, scales)
    return Ascent(inputs.parameters, vectors, norm, inputs.weight, inputs.scale)


@ascent_direction.register
def _(direction: LossEquated, inputs: DirectionInputs) -> Ascent:
    # σ·factor·‖g‖ = min(σ/‖g‖, ρ_max); dividing twice, because the square of a small norm underflows.
    inverse, cap = inputs.inverse_norm(), direction.rho_max / inputs.radius
    if isinstance(inverse, Tensor):
        limited: float | Tensor = inverse.clamp(max=cap.to(inverse)) if isinstance(cap, Tensor) else inverse.clamp(max=cap)
    else:
        limited = min(inverse, float(cap))
    return replace(_along_gradient(inputs), factor=inverse * limited)


@ascent_direction.register
def _(direction: Unified, inputs: DirectionInputs) -> Ascent:
    lam = direction.lam_at(inputs.step)
    return replace(_along_gradient(inputs), factor=(1.0 - lam) + lam * inputs.inverse_norm())


@ascent_direction.register
def _(direction: Clipped, inputs: DirectionInputs) -> Ascent:
    ratio = direction.max_norm * inputs.inverse_norm()
    return replace(_along_gradient(inputs), factor=ratio.clamp(max=1.0) if isinstance(ratio, Tensor) else min(ratio, 1.0))


def _along_gradient(inputs: DirectionInputs) -> Ascent:
    return Ascent(inputs.parameters, inputs.gradients, inputs.norm, inputs.weight, inputs.scale)


@ascent_direction.register
def _(direction: Friendly, inputs: DirectionInputs) -> Ascent:
    # The gradients carry weight and scale, the average does not: multiply it by both, so that they have one common factor.
    vectors, average, share = inputs.gradients, inputs.average, -direction.sigma * inputs.weight * inputs.scale
    if isinstance(share, Tensor):
        average, share = list(torch._foreach_mul(average, share)), 1.0
    if inputs.consumable:
        torch._foreach_add_(vectors, average, alpha=share)
    else:
        vectors = list(torch._foreach_add(vectors, average, alpha=share))
    return Ascent(inputs.parameters, vectors, norm_of_shards(vectors, inputs.parameters), inputs.weight, inputs.scale)


@ascent_direction.register
def _(direction: EmaDirection, inputs: DirectionInputs) -> Ascent:
    norm = norm_of_shards(inputs.average, inputs.parameters)
    return Ascent(inputs.parameters, inputs.average, norm, weight=-1.0 if direction.ahead else 1.0)


@ascent_direction.register
def _(direction: Random, inputs: DirectionInputs) -> Ascent:
    vectors = signs(direction.seed, inputs.step, list(zip(inputs.indices, inputs.parameters, strict=True)))
    return Ascent(inputs.parameters, vectors, sqrt(max(1, sum(p.numel() for p in inputs.parameters))))


@ascent_direction.register
def _(direction: MergedNoise, inputs: DirectionInputs) -> Ascent:
    return Ascent([], [], 1.0, noise=LayerNoise(inputs.layers, hashed(direction.seed, inputs.step)))
