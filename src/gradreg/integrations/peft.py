"""Bi-LoRA with PEFT: beside the adapter that is trained, a second one that climbs: the perturbation of sharpness-aware training.

It is no part of a penalty, because it changes the model: the perturbation is an adapter of its own, with parameters that the optimizer
moves. ``gradreg.flat_lora`` is one, and any penalty of this library may be used with LoRA as it is: it then perturbs the adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from gradreg import checks
from gradreg.extras import needing

with needing("gradreg.integrations.peft", "peft"):
    import torch
    from peft import PeftModel, PeftType
    from peft.tuners.lora import LoraLayer
    from torch import Tensor, nn
    from transformers import TrainerCallback

NAME = "bi_lora"
"""Of the second adapter, in the model."""


class BiLora:
    """Bi-LoRA: ``min over (B₁, A₁), max over (B₂, A₂) with ‖s·B₂·A₂‖ ≤ ρ, of L(W + s·B₁·A₁ + s·B₂·A₂)``, both by one gradient a step.

    ::

        model = get_peft_model(model, LoraConfig(r=8, ...))
        bi_lora = BiLora(model, rho=0.05)  # before the optimizer is made
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
        bi_lora.attach(optimizer)  # or, with a Trainer: callbacks=[bi_lora.callback]
        ...  # any loop; loss.backward(), optimizer.step()
        bi_lora.remove()  # what is left is the first adapter

    The gradients of the second adapter arrive in ``.grad`` with their sign turned, so that any optimizer climbs; after its step the
    adapter is scaled back into the ball, over all layers together. In evaluation mode the model computes with the first adapter alone.

    Both adapters are in the model's state and in a Trainer's checkpoint. To resume, make the model and ``BiLora`` as before, then
    ``load_state_dict``, or ``trainer.train(resume_from_checkpoint=...)``: to activate the first adapter activates the second too.

    Args:
        model: a PEFT model with one active LoRA adapter.
        rho: ρ > 0, the largest Frobenius norm of the perturbation of the weights, over all layers together.
        rank: of the second adapter; None for that of the first. 8 in the paper.

    Cost: 1 gradient evaluation, the memory and arithmetic of a second adapter, and no device sync.
    Source: Liu et al. 2025, arXiv 2508.19564, equations 9 and 10, algorithm 1, with one learning rate for both adapters, as there.
    Differs from the paper: the ball is that of s·B₂·A₂, with PEFT's scaling s, which is what is added to the weights.

    Raises:
        TypeError: a model that is not PEFT's.
        ValueError: several active adapters, another kind than LoRA, modules that are trained as a whole (``modules_to_save``), DoRA, or a
            bad ``rho`` or ``rank``.
    """

    def __init__(self, model: PeftModel, *, rho: float, rank: int | None = None) -> None:
        if not isinstance(model, PeftModel):  # type: ignore[unnecessary-isinstance]
            raise TypeError(
                f"model must be a peft.PeftModel; got {checks.describe(model)}. Call peft.get_peft_model(model, LoraConfig(...))."
            )
        self.rho = checks.positive("rho", rho, remedy="Leave Bi-LoRA out for plain LoRA.")
        active = model.active_adapters
        config: Any = copy.deepcopy(model.peft_config[active[0]])
        if len(active) != 1 or config.peft_type != PeftType.LORA or config.use_dora or config.modules_to_save or NAME in model.peft_config:
            raise ValueError(
                "model must have one active adapter, of plain LoRA without modules_to_save, and no Bi-LoRA yet; got "
                f"{active} of type {config.peft_type}. Make it by get_peft_model(model, LoraConfig(r=8))."
            )
        if rank is not None:
            config.r = checks.whole("rank", rank, minimum=1)
        self.model = model
        self.primary: str = active[0]
        """The name of the adapter that is trained for the task."""
        model.add_adapter(NAME, config)
        self._activate(self.primary)
        # A Trainer that resumes loads both adapters and then activates the first one alone, which would freeze the second.
        vars(model)["set_adapter"] = self._activate
        self.layers = [m for m in model.modules() if isinstance(m, LoraLayer) and NAME in m.lora_A]
        self._scaling = [layer.scaling[NAME] for layer in self.layers]
        hooks: list[Any] = [p.register_hook(torch.neg) for p in self.parameters]
        for layer, scaling in zip(self.layers, self._scaling, strict=True):
            hooks.append(layer.register_forward_pre_hook(_only_in_training(scaling)))  # type: ignore[attr-defined]  # layers are modules
        self._hooks = hooks

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the second adapter: leave them out of a penalty."""
        return [p for layer in self.layers for part in (layer.lora_A, layer.lora_B) for p in part[NAME].parameters()]

    @property
    def callback(self) -> TrainerCallback:
        """For a Trainer, which makes its own optimizer."""
        return _Clips(self)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale the second adapter back into the ball after every step of ``optimizer``."""
        self._hooks.append(optimizer.register_step_post_hook(lambda *_: self.clip()))

    @torch.no_grad()
    def norm(self) -> Tensor:
        """‖s·B₂·A₂‖, the Frobenius norm over all layers, without forming the products: ‖B·A‖² = ⟨BᵀB, AAᵀ⟩."""
        squares: list[Tensor] = []
        for layer, scaling in zip(self.layers, self._scaling, strict=True):
            a, b = cast(Tensor, layer.lora_A[NAME].weight), cast(Tensor, layer.lora_B[NAME].weight)
            squares.append(scaling**2 * ((b.T @ b) * (a @ a.T)).sum())
        return torch.stack([s.to(squares[0]) for s in squares]).sum().clamp(min=0.0).sqrt()

    @torch.no_grad()
    def clip(self) -> None:
        """Scale A₂ and B₂ by √(ρ/norm) each, if the norm is larger than ρ."""
        factor = (self.rho / self.norm()).clamp(max=1.0).sqrt()
        for p in self.parameters:
            p.mul_(factor.to(p))

    def remove(self) -> None:
        """Take the second adapter away, with all that was added to the model and to optimizers."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        vars(self.model).pop("set_adapter", None)
        self.model.set_adapter(self.primary)
        self.model.delete_adapter(NAME)

    def _activate(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """The model's ``set_adapter``, by which the second adapter follows the first; its other arguments differ by PEFT's version."""
        type(self.model).set_adapter(self.model, adapter_name, *args, **kwargs)
        if adapter_name == self.primary:
            tuner: Any = self.model.base_model
            tuner.set_adapter([self.primary, NAME], *args, **kwargs)

    @contextmanager
    def removed_after(self) -> Iterator[BiLora]:
        """A context at whose end ``remove()`` is called, after an exception too."""
        try:
            yield self
        finally:
            self.remove()


class _Clips(TrainerCallback):
    """Clips after the optimizer's step."""

    def __init__(self, bi_lora: BiLora) -> None:
        self._bi_lora = bi_lora

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bi_lora.clip()


def _only_in_training(scaling: float) -> Any:
    """A hook that lets a layer add its second adapter in training mode only."""

    def before(layer: Any, inputs: Any) -> None:
        layer.scaling[NAME] = scaling if layer.training else 0.0

    return before
