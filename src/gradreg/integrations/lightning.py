"""Lightning: a callback that gives automatic optimization the regularized gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from gradreg.penalties import GradientPenalty
from gradreg.torch import GradientRegularizer
from gradreg.torch.regularizer import Scope
from gradreg.torch.step import Scaler


class GradientRegularization(pl.Callback):
    """Trains a ``LightningModule`` as it is with a penalty on the gradient norm: ``Trainer(callbacks=[GradientRegularization(penalty)])``.

    ``training_step`` runs once a pass. What it logs is logged by the first pass only; metrics objects of your own that it updates can ask
    ``callback.repeating``. Precision, clipping, checkpoints and strategies that keep whole parameters (one device, DDP) work as before.
    With ``accumulate_grad_batches`` every micro-batch is perturbed by its own gradient (the m-sharpness of the SAM paper). Schedules
    follow ``trainer.global_step`` and are part of Lightning's checkpoints.

    Args:
        penalty, parameters, scope: see ``GradientRegularizer``.

    Raises:
        ValueError: when training starts, under manual optimization: call ``regularizer.backward(closure, backward=self.manual_backward)``.
    """

    def __init__(
        self,
        penalty: GradientPenalty | None,
        *,
        parameters: Callable[[str, nn.Parameter], bool] | None = None,
        scope: Scope = "local",
    ) -> None:
        self.repeating = False
        self.regularizer: GradientRegularizer | None = None
        self._penalty, self._selection = penalty, parameters
        self._scope: Scope = scope
        self._loaded: dict[str, Any] | None = None
        self._gradients: list[Tensor | None] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError(
                "automatic_optimization must be True for the GradientRegularization callback; got False. In manual optimization call "
                "regularizer.backward(closure, backward=self.manual_backward) in training_step."
            )
        strategy: Any = trainer.strategy
        select = self._selection
        names = {id(p): n for n, p in pl_module.named_parameters()}  # without the prefix of a wrapper
        chosen = None if select is None else lambda _, p: select(names[id(p)], p)
        self.regularizer = GradientRegularizer(strategy.model, self._penalty, parameters=chosen, scope=self._scope)
        if self._loaded is not None:
            self.regularizer.load_state_dict(self._loaded)
        original = strategy.training_step
        strategy.training_step = lambda *batch: self._training_step(trainer, pl_module, lambda: original(*batch))
        pl_module.backward = lambda loss, *_, **__: self._put_gradients()  # type: ignore[method-assign]

    def _training_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, run: Callable[[], Any]) -> Any:
        assert self.regularizer is not None
        parameters = self.regularizer.parameters
        if trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches == 0:
            for p in parameters:  # Lightning drops the last step's gradients only after training_step
                p.grad = None
        outputs: list[Any] = []

        def closure() -> Tensor:
            self.repeating = bool(outputs)
            if self.repeating:
                pl_module.log = lambda *_, **__: None  # type: ignore[method-assign]
            try:
                output = run()
            finally:
                self.repeating = False
                vars(pl_module).pop("log", None)
            outputs.append(output)
            if output is None:
                raise ValueError("training_step must return a loss under GradientRegularization; got None. Skip batches in the dataloader.")
            return output["loss"] if isinstance(output, dict) else output

        factor = _Factor(getattr(trainer.precision_plugin, "scaler", None), trainer.accumulate_grad_batches)
        self.regularizer.load_state_dict({**self.regularizer.state_dict(), "step": trainer.global_step})
        loss = self.regularizer.backward(closure, scaler=factor)
        self._gradients = [p.grad for p in parameters]
        loss = loss.detach().requires_grad_()
        return {**outputs[0], "loss": loss} if isinstance(outputs[0], dict) else loss

    def _put_gradients(self) -> None:
        assert self.regularizer is not None
        for p, gradient in zip(self.regularizer.parameters, self._gradients, strict=True):
            p.grad = gradient
        self._gradients = []

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._undo(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._undo(trainer, pl_module)

    def _undo(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        vars(trainer.strategy).pop("training_step", None)
        vars(pl_module).pop("backward", None)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.regularizer is None else self.regularizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None


class _Factor:
    """The loss scale together with the division by the number of micro-batches: neither belongs to one micro-batch's objective."""

    def __init__(self, scaler: Scaler | None, parts: int) -> None:
        self._scaler, self._parts = scaler, parts

    def scale(self, outputs: Tensor) -> Tensor:
        return (outputs if self._scaler is None else self._scaler.scale(outputs)) / self._parts
