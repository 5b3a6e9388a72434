"""Hugging Face: a ``transformers.Trainer`` with a penalty on the gradient norm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradreg.penalties import GradientPenalty
from gradreg.torch import GradientRegularizer
from gradreg.torch.regularizer import Scope


class GradientRegularizationMixin:
    """Put before a Trainer, gives it the arguments ``penalty``, ``parameters`` and ``scope`` of ``GradientRegularizer``.

    ::

        class Trainer(GradientRegularizationMixin, transformers.Trainer): ...

        Trainer(model=model, args=arguments, train_dataset=data, penalty=gradreg.fgr(gamma=0.5, epsilon=0.5)).train()

    One perturbation is made for all ``gradient_accumulation_steps`` micro-batches together, at the boundary; clipping, loss scale,
    logging, checkpoints and ``accelerate`` work as before. Schedules follow ``state.global_step``, so a resumed run goes on where it was.
    What a loss of TRL's trainers adds to their metrics is kept from the first pass only; no test runs them yet.

    Args:
        penalty: what is penalised; None trains without a penalty, through the same calls.
        parameters: see ``GradientRegularizer``, and ``except_embeddings`` for language models.
        scope: see ``GradientRegularizer``.

    Differs from arXiv 2602.18037: the two gradients are not clipped one by one; ``max_grad_norm`` clips their combination.
    """

    _KEPT = ("_metrics", "_total_train_tokens")

    def __init__(
        self,
        *args: Any,
        penalty: GradientPenalty | None,
        parameters: Callable[[str, nn.Parameter], bool] | None = None,
        scope: Scope = "local",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._penalty, self._selection, self._scope = penalty, parameters, scope
        self._regularizer: GradientRegularizer | None = None
        self._waiting: list[Callable[[], Tensor]] = []

    @property
    def regularizer(self) -> GradientRegularizer | None:
        """The one in use, for its ``.metrics``; None before the first step."""
        return self._regularizer

    def compute_loss(self: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """In training: collect the micro-batches of a step, evaluate them all at the last, and return a loss without a graph."""
        if not model.training or kwargs.get("return_outputs") or (args and args[0]):
            return cast(Any, super()).compute_loss(model, inputs, *args, **kwargs)
        parts = self.current_gradient_accumulation_steps
        items = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
        shares = 1 if self._divides_by_items(items) else parts
        seen: list[None] = []

        def closure() -> Tensor:
            with self._unlogged(repeated=bool(seen)):
                loss = cast(Any, super(GradientRegularizationMixin, self)).compute_loss(model, inputs, *args, **kwargs)
            seen.append(None)
            return loss.mean() / shares

        if not self._waiting:
            self._begin_step(model)
        self._waiting.append(closure)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device, requires_grad=True)
        closures, self._waiting = self._waiting, []
        loss = self._regularizer.backward(closures, backward=self.accelerator.backward, scaler=self.accelerator.scaler)
        # The Trainer divides what it reports, and derives it: from here on there is nothing to derive.
        return (loss * shares).detach().requires_grad_()

    def _begin_step(self: Any, model: nn.Module) -> None:
        if self._regularizer is None or self._regularizer.model is not model:
            self._regularizer = GradientRegularizer(model, self._penalty, parameters=self._selection, scope=self._scope)
        self._regularizer.load_state_dict({**self._regularizer.state_dict(), "step": self.state.global_step})

    def _divides_by_items(self: Any, items: Any) -> bool:
        """Whether the loss is already divided by the number of items of all micro-batches, as the Trainer asks itself."""
        if getattr(self, "loss_is_scaled_for_ga", None) is not None:
            return self.loss_is_scaled_for_ga
        return (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None

    @contextmanager
    def _unlogged(self: Any, *, repeated: bool) -> Iterator[None]:
        """What a repeated pass adds to the metrics of TRL's trainers is forgotten."""
        kept = {n: copy.deepcopy(vars(self)[n]) for n in self._KEPT if n in vars(self)} if repeated else {}
        yield
        vars(self).update(kept)


def except_embeddings(model: Any) -> Callable[[str, nn.Parameter], bool]:
    """The selection for language models: all parameters but those of the input embeddings and of the output head.

    Args:
        model: a ``PreTrainedModel``, or anything with its ``get_input_embeddings`` and ``get_output_embeddings``.

    Source: the code of arXiv 2602.18037.
    """
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    left_out = {id(p) for layer in layers if layer is not None for p in layer.parameters()}
    return lambda name, parameter: id(parameter) not in left_out
