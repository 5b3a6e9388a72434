"""Lightning's automatic optimization with the gradient of ``loss + penalty``: a callback, without changes to the module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

from gradreg.integrations.refusals import refuse_decoupled
from gradreg.penalties import GradientPenalty
from gradreg.torch import GradientRegularizer
from gradreg.torch.regularizer import Scope

Selection = Callable[[str, nn.Parameter], bool]
_BESIDE_THE_STATE = ("_update_count", "_computed", "_forward_cache")


class GradientRegularization(Callback):
    """Regularizes the gradient of any ``LightningModule`` in automatic optimization.

    ::

        trainer = Trainer(callbacks=[GradientRegularization(gradreg.sam(rho=0.05))], accumulate_grad_batches=4, gradient_clip_val=1.0)

    With ``accumulate_grad_batches`` one perturbation is made from the whole accumulated gradient: ``training_step`` is deferred for all
    batches until the last one, whose outputs hold the mean loss; the others have no outputs.

    Only the first pass counts: a repeated ``training_step`` logs nothing, and the states of torchmetrics in the module are restored
    after it. A ``training_step`` that writes elsewhere should ask ``callback.repeats_pass``. The hooks ``on_before_backward`` and
    ``on_after_backward`` run once a step, with the first pass's loss and the regularized gradient. The penalty's clock is the trainer's
    ``global_step``.

    Args:
        penalty: what is penalized; None trains without a penalty, through the same path.
        parameters: ``(name, parameter) -> bool`` with the module's own names: see ``parameters`` of ``GradientRegularizer``.
        scope: "local" or "global", under data parallelism: see ``GradientRegularizer``.

    Raises:
        ValueError: a decoupled penalty; when fitting starts: manual optimization (which needs no callback), a ``training_step`` that draws
            its own batches, or a strategy that runs its own backward pass.
    """

    def __init__(self, penalty: GradientPenalty | None, *, parameters: Selection | None = None, scope: Scope = "local") -> None:
        super().__init__()
        GradientRegularizer(nn.Linear(1, 1), penalty, scope=scope)  # so that a bad value raises here
        refuse_decoupled(penalty, "Lightning")
        self.penalty = penalty
        self.parameters = parameters
        self.scope: Scope = scope
        self.regularizer: GradientRegularizer | None = None
        self.repeats_pass = False
        self._counts = {"step": 0, "evaluations": 0}
        self._waiting: list[_Batch] = []

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores: the regularizer's counts."""
        return dict(self._counts) if self.regularizer is None else self.regularizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a checkpoint; the clock comes with the trainer's ``global_step``."""
        self._counts = dict(state_dict)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the regularizer from the model as the strategy has wrapped it, and replace the backward pass."""
        _check_supported(trainer, pl_module)
        names: dict[int, str] = {id(p): name for name, p in pl_module.named_parameters()}
        choose = self.parameters
        parameters = None if choose is None else lambda name, p: choose(names[id(p)], p)
        model = cast(nn.Module, trainer.strategy.model)
        self.regularizer = GradientRegularizer(model, self.penalty, parameters=parameters, scope=self.scope)
        self.regularizer.load_state_dict(self._counts)
        self._waiting = []
        loop = trainer.fit_loop.epoch_loop.automatic_optimization

        def make_closure(kwargs: Any, optimizer: Any, batch_idx: int) -> Closure:
            zero_grad = loop._make_zero_grad_fn(batch_idx, optimizer)
            return _RegularizedClosure(self, trainer, _Batch(self, trainer, loop._make_step_fn(kwargs), kwargs.get("batch")), zero_grad)

        vars(loop)["_make_closure"] = make_closure

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the trainer as it was."""
        vars(trainer.fit_loop.epoch_loop.automatic_optimization).pop("_make_closure", None)
        self._counts = self.state_dict()
        self._waiting = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the trainer as it was."""
        self.on_train_end(trainer, pl_module)

    def _gradient(self, trainer: Trainer) -> Tensor:
        """Fill ``.grad`` with the regularized gradient of the deferred batches; returns their mean loss."""
        module, regularizer = trainer.lightning_module, self.regularizer
        assert regularizer is not None
        scaler = getattr(trainer.strategy.precision_plugin, "scaler", None)
        before = False

        def backward(loss: Tensor) -> None:
            nonlocal before
            if not before:
                before = True
                call._call_callback_hooks(trainer, "on_before_backward", loss)
                call._call_lightning_module_hook(trainer, "on_before_backward", loss)
            module.backward(loss if scaler is None else scaler.scale(loss))

        loss = regularizer.backward(self._waiting, backward=backward, scaler=scaler, step=trainer.global_step)
        call._call_callback_hooks(trainer, "on_after_backward")
        call._call_lightning_module_hook(trainer, "on_after_backward")
        return loss

    @contextmanager
    def _repeating(self, module: LightningModule) -> Iterator[None]:
        """A context in which nothing is logged and no metric changes."""
        metrics = [m for m in module.modules() if isinstance(m, Metric)]
        states = [(m, {**m._copy_state_dict(), **{name: getattr(m, name) for name in _BESIDE_THE_STATE}}) for m in metrics]
        vars(module)["log"] = vars(module)["log_dict"] = lambda *_, **__: None
        self.repeats_pass = True
        try:
            yield
        finally:
            self.repeats_pass = False
            del vars(module)["log"], vars(module)["log_dict"]
            for metric, state in states:
                for name, value in state.items():
                    setattr(metric, name, value)


class _Batch:
    """``training_step`` on one batch, as a closure: only its first call counts and logs."""

    def __init__(self, owner: GradientRegularization, trainer: Trainer, step: Callable[[], ClosureResult], batch: Any) -> None:
        self.owner = owner
        self.trainer = trainer
        self.step = step
        self.batch = batch
        self.result: ClosureResult | None = None

    def __call__(self) -> Tensor:
        if self.result is None:
            results = self.trainer._results
            if results is not None and self.batch is not None and results.batch is not self.batch:
                results.batch, results.batch_size = self.batch, None  # from which self.log takes the weight of a mean
            self.result = self.step()
            loss, self.result.closure_loss = self.result.closure_loss, None
        else:
            with self.owner._repeating(self.trainer.lightning_module):
                loss = self.step().closure_loss
        if loss is None and len(self.owner._waiting) > 1:
            raise ValueError(
                "training_step must return a loss for every batch of an accumulation; got None. Return a loss times 0 to leave a batch out."
            )
        if loss is None:
            raise _SkippedStep
        return loss


class _SkippedStep(Exception):
    """``training_step`` returned None."""


class _RegularizedClosure(Closure):
    """Replaces forward, ``zero_grad`` and backward: all passes at the last batch of an accumulation, nothing before it."""

    def __init__(self, owner: GradientRegularization, trainer: Trainer, batch: _Batch, zero_grad: Callable[[], None] | None) -> None:
        super().__init__(batch.step, zero_grad_fn=zero_grad)
        self._owner = owner
        self._trainer = trainer
        self._batch = batch

    def closure(self, *args: Any, **kwargs: Any) -> ClosureResult:
        owner = self._owner
        if self._zero_grad_fn is not None:
            owner._waiting = []
            self._zero_grad_fn()
        if self._batch not in owner._waiting:
            owner._waiting.append(self._batch)
        if self._trainer.fit_loop._should_accumulate():
            return ClosureResult(None)
        for batch in owner._waiting:
            batch.result = None
        try:
            loss = owner._gradient(self._trainer)
        except _SkippedStep:
            self.warning_cache.warn("`training_step` returned `None`. If this was on purpose, ignore this warning...")
            return ClosureResult(None)
        result = cast(ClosureResult, self._batch.result)
        result.loss = loss
        return result


def _check_supported(trainer: Trainer, module: LightningModule) -> None:
    if not module.automatic_optimization:
        raise ValueError(
            "automatic_optimization must be True for this callback; got False. In manual optimization call "
            "GradientRegularizer(self, penalty).backward(closure, backward=self.manual_backward) and step the optimizer."
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            "training_step must be given its batch, so that it can be repeated; got one with a dataloader_iter. "
            "Write training_step(self, batch, batch_idx)."
        )
    if trainer.strategy.handles_gradient_accumulation:
        raise ValueError(
            f"the strategy must leave the backward pass to PyTorch; got {type(trainer.strategy).__name__}. "
            "Use 'ddp', or ModelParallelStrategy with fully_shard."
        )
