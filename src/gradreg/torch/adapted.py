"""Noise on the frozen weights under low-rank adapters, which exists only while a layer computes (``gradreg.MergedNoise``).

The forward and the backward pass of each layer draw the same noise from the same seed, add it to the weight, and drop the sum. Perturbing
the weights in place would need a copy of the whole frozen model to restore them from, and keeping the sums for the backward pass another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from gradreg.hashing import hashed


@dataclass(frozen=True)
class AdaptedLayer:
    """A linear layer under low-rank adapters.

    Args:
        adapters: the module that holds both: PEFT's ``LoraLayer``, or one with its attributes ``lora_A``, ``active_adapters``, ``merged``,
            ``disable_adapters`` and its methods ``get_base_layer`` and ``get_delta_weight``.
        base: the layer, whose weight W is frozen.
        index: the index of that weight in the model.
    """

    adapters: Any
    base: nn.Linear
    index: int

    @torch.no_grad()
    def row_scale(self) -> Tensor:
        """‖W'_i‖/√n of each row i of the merged weight W', as a column."""
        weight, over = self.base.weight, self.adapters
        if not (over.merged or over.disable_adapters):
            deltas = [over.get_delta_weight(name) for name in over.active_adapters if name in over.lora_A]
            weight = sum(deltas, weight)
        return torch.linalg.vector_norm(weight, dim=1, keepdim=True) / weight.shape[1] ** 0.5


class LayerNoise:
    """The noise of a step in ``layers``, while it is on.

    Args:
        layers: those that are perturbed.
        seed: of the step.
    """

    def __init__(self, layers: Sequence[AdaptedLayer], seed: int) -> None:
        self._layers = layers
        self._seed = seed
        self.distance: float | Tensor = 0.0
        self.was_drawn = False
        """Whether any of the layers has computed with it."""

    def begin(self, distance: float | Tensor) -> None:
        """From now on the layers compute with ``W + distance·v``."""
        self.distance = distance
        for layer in self._layers:
            vars(layer.base)["forward"] = partial(self._compute, layer)

    def end(self) -> None:
        """The layers compute with W again; may be called twice."""
        for layer in self._layers:
            vars(layer.base).pop("forward", None)

    def _compute(self, layer: AdaptedLayer, x: Tensor) -> Tensor:
        self.was_drawn = True
        draw = partial(self._added, layer, self.distance, layer.row_scale())
        return _Noisy.apply(x, layer.base.weight, layer.base.bias, draw)  # type: ignore[return-value]

    def _added(self, layer: AdaptedLayer, distance: float | Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        """``weight`` with the noise added, a new tensor."""
        generator = torch.Generator(weight.device).manual_seed(hashed(self._seed, layer.index))
        noise = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype)
        return noise.mul_(distance * scale.to(weight.dtype)).add_(weight)


class _Noisy(torch.autograd.Function):
    """A linear layer at a perturbed weight, of which nothing is kept for the backward pass but the seed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, draw: Any) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight)
        ctx.draw, ctx.dtype = draw, x.dtype
        return linear(x, draw(weight), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        of_x = (gradient @ ctx.draw(weight).to(gradient.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return of_x, None, of_bias, None


def adapted_layers(model: nn.Module, selected: Mapping[nn.Parameter, str]) -> list[AdaptedLayer]:
    """The layers of ``model`` under low-rank adapters whose weights are ``selected``.

    Raises:
        ValueError: there are none, or one that cannot be perturbed in this way.
    """
    places = {p: index for index, p in enumerate(model.parameters())}
    found: list[AdaptedLayer] = []
    for name, module in model.named_modules():
        if not all(hasattr(module, attribute) for attribute in ("lora_A", "get_base_layer", "get_delta_weight")):
            continue
        base = module.get_base_layer()  # type: ignore[operator]
        weight: Any = getattr(base, "weight", None)
        if weight not in selected:
            continue
        if type(base) is not nn.Linear:
            raise _cannot(f"lie on torch.nn.Linear layers; got {name!r} on {type(base).__name__}. Leave it out of target_modules")
        if getattr(module, "lora_variant", None):
            raise _cannot(f"be plain LoRA; got {name!r} with a variant of it (DoRA, say). Leave that out of the LoraConfig")
        if weight.requires_grad:
            raise _cannot(f"lie on frozen weights; got {selected[weight]!r} with requires_grad=True. Freeze it")
        if "forward" in vars(base):
            raise _cannot(
                f"lie on layers that compute by themselves; got {name!r}, whose forward was replaced (offloading, say). Load it whole"
            )
        found.append(AdaptedLayer(module, base, places[weight]))
    if not found:
        raise _cannot(
            f"be in the model: layers with lora_A, get_base_layer and get_delta_weight, as PEFT's have; got {type(model).__name__} with "
            "none among those selected. Call peft.get_peft_model first, or select their weights by name"
        )
    compiled = next((m for m in model.modules() if hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None), None)
    if compiled is not None:
        raise _cannot("not be compiled, because a compiled layer does not draw noise; got a compiled module. Leave torch.compile out")
    return found


def _cannot(rule: str) -> ValueError:
    return ValueError(f"low-rank adapters must {rule}, or use gradreg.sam(rho=...), which perturbs the adapters themselves.")
