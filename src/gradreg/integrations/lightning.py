"""Lightning's automatic optimization with the gradient of ``loss + penalty``: a callback, without changes to the module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from gradreg.extras import needing
from gradreg.integrations.refusals import refuse_decoupled, refuse_learned
from gradreg.penalties import GradientPenalty

with needing("gradreg.integrations.lightning", "lightning"):
    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
    from lightning.pytorch.trainer import call
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
    from torch import Tensor, nn
    from torchmetrics import Metric

    from gradreg.torch import GradientRegularizer
    from gradreg.torch.calls import Scope

Selection = Callable[[str, nn.Parameter], bool]
_BESIDE_THE_STATE = ("_update_count", "_computed", "_forward_cache")
_ABSENT: Any = object()


class GradientRegularization(Callback):
    """Regularizes the gradient of any ``LightningModule`` in automatic optimization.

    ::

        trainer = Trainer(callbacks=[GradientRegularization(gradreg.sam(rho=0.05))], accumulate_grad_batches=4, gradient_clip_val=1.0)

    With ``accumulate_grad_batches`` one perturbation is made from the whole accumulated gradient: ``training_step`` is deferred for all
    batches until the last one, whose outputs hold the mean loss; the others have no outputs. In steps where the penalty does not act
    (``None``, a warm-up, ``every(k)``) nothing is deferred, and every hook is called as without the callback.

    Only the first pass counts: a repeated ``training_step`` logs nothing, and the states of torchmetrics in the module are restored
    after it. A ``training_step`` that writes elsewhere should ask ``callback.repeats_pass``. In steps where the penalty acts the hooks
    ``on_before_backward`` and ``on_after_backward`` run once, with the first pass's loss and the regularized gradient. The penalty's clock
    is the trainer's ``global_step``.

    Every backward pass goes through the strategy and its precision plugin. A factor by which a custom one multiplies the loss is a loss
    scale: the direction is formed without it.

    Args:
        penalty: what is penalized; None trains without a penalty, through the same path.
        parameters: ``(name, parameter) -> bool`` with the module's own names: see ``parameters`` of ``GradientRegularizer``.
        scope: "local" or "global", under data parallelism: see ``GradientRegularizer``.

    Raises:
        ValueError: a decoupled penalty, or a radius that is learned from held-out data; when fitting starts, with a penalty: manual
            optimization (which needs no callback), a ``training_step`` that draws its own batches, a strategy that runs its own backward
            pass, or ``torch.optim.LBFGS``.
    """

    def __init__(self, penalty: GradientPenalty | None, *, parameters: Selection | None = None, scope: Scope = "local") -> None:
        super().__init__()
        GradientRegularizer(_Number(), penalty, scope=scope)  # so that a bad value raises here
        refuse_decoupled(penalty, "Lightning")
        refuse_learned(penalty, "Lightning")
        self.penalty = penalty
        self.parameters = parameters
        self.scope: Scope = scope
        self.regularizer: GradientRegularizer | None = None
        self.repeats_pass: bool = False
        self._saved: dict[str, Any] = _fresh()
        self._module: LightningModule | None = None
        self._waiting: list[_Batch] = []
        self._complete = True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores: the regularizer's counts and the penalty's state."""
        return dict(self._saved) if self.regularizer is None else self.regularizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a checkpoint; the clock comes with the trainer's ``global_step``."""
        self._saved = dict(state_dict)
        self.regularizer = None  # built from it in the next step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the backward pass of ``fit``, before anything can run it: a search for a learning rate comes first."""
        if stage != "fit":
            return
        self._saved = self.state_dict() if self._module is pl_module else _fresh()
        self._module, self.regularizer = pl_module, None
        self._waiting, self._complete = [], True
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        # Set on the instance, because a tuner replaces the trainer's callbacks by its own while it trains.
        vars(loop)["_make_closure"] = partial(self._make_closure, trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the regularizer from the model as the strategy has wrapped it."""
        if self.penalty is not None:
            self._build(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the batches of an accumulation that was not completed."""
        self._waiting, self._complete = [], True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        if stage == "fit":
            vars(trainer.fit_loop.epoch_loop.automatic_optimization).pop("_make_closure", None)
            self._waiting, self._complete = [], True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the trainer as it was."""
        self.teardown(trainer, pl_module, "fit")

    def _build(self, trainer: Trainer) -> GradientRegularizer:
        """The regularizer, built if there is none."""
        if self.regularizer is not None:
            return self.regularizer
        module = trainer.lightning_module
        if self.penalty is not None:
            _check_supported(trainer, module)
        names: dict[int, str] = {id(p): name for name, p in module.named_parameters()}
        choose = self.parameters
        parameters = None if choose is None else lambda name, p: choose(names[id(p)], p)
        model = cast(nn.Module, trainer.strategy.model)
        regularizer = GradientRegularizer(model, self.penalty, parameters=parameters, scope=self.scope)
        if self._saved != _fresh():
            if ("memory" in self._saved) != ("memory" in regularizer.state_dict()):
                raise ValueError(
                    f"the checkpoint must be of a run with a penalty of the same kind; got {self.penalty} and the state "
                    f"{sorted(self._saved)}. To go on from its weights only, load them into the module and leave out ckpt_path."
                )
            regularizer.load_state_dict(self._saved)
        self.regularizer = regularizer
        return regularizer

    def _make_closure(self, trainer: Trainer, kwargs: Any, optimizer: Any, batch_idx: int) -> Closure:
        """What Lightning's loop makes of a batch: its own closure where there is nothing to regularize, or one of ours."""
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        closure = type(loop)._make_closure(loop, kwargs, optimizer, batch_idx)
        acts, last = self._acts(trainer.global_step), not trainer.fit_loop._should_accumulate()
        by_itself = trainer.strategy.handles_gradient_accumulation
        # Without a backward pass an epoch only collects statistics, as that of stochastic weight averaging.
        if loop._skip_backward or not (acts or last) or (self.penalty is None and by_itself):
            return closure
        self._build(trainer)
        batch = _Batch(self, trainer, closure, kwargs.get("batch"))
        if not acts:
            return _RegularizedClosure(self, trainer, [batch], last, acts)
        if self._complete or closure._zero_grad_fn is not None:
            self._waiting = []
        self._waiting.append(batch)
        self._complete = last
        return _RegularizedClosure(self, trainer, self._waiting, last, acts)

    def _acts(self, step: int) -> bool:
        """Whether a step is more than one plain pass."""
        return self.penalty is not None and (self.penalty.has_memory or self.penalty.strength_at(step) != 0.0)

    @contextmanager
    def _repeating(self, module: LightningModule) -> Iterator[None]:
        """A context in which nothing is logged and no metric changes."""
        metrics = [m for m in module.modules() if isinstance(m, Metric)]
        states = [(m, {**m._copy_state_dict(), **{name: getattr(m, name) for name in _BESIDE_THE_STATE}}) for m in metrics]
        self.repeats_pass = True
        try:
            with _silenced([module], ("log", "log_dict")):
                yield
        finally:
            self.repeats_pass = False
            for metric, state in states:
                for name, value in state.items():
                    setattr(metric, name, value)


class _Batch:
    """``training_step`` on one batch, as a closure: only its first call counts and logs, and clears the gradients as Lightning does."""

    def __init__(self, owner: GradientRegularization, trainer: Trainer, closure: Closure, batch: Any) -> None:
        self.owner = owner
        self.trainer = trainer
        self.step = closure._step_fn
        self.backward = cast("Callable[[Tensor], None]", closure._backward_fn)
        self.zero_grad = closure._zero_grad_fn
        self.batch = batch
        self.alone = True
        self.earlier: _EarlierGradients | None = None
        self.result: ClosureResult | None = None

    def __call__(self) -> Tensor:
        if self.result is not None:
            with self.owner._repeating(self.trainer.lightning_module):
                return self._checked(self.step().closure_loss)
        results = self.trainer._results
        if results is not None and self.batch is not None and results.batch is not self.batch:
            results.batch, results.batch_size = self.batch, None  # from which self.log takes the weight of a mean
        if self.earlier is not None:
            self.earlier.give_back()
        self.result = self.step()
        if self.zero_grad is not None:
            self.zero_grad()
        if self.earlier is not None:
            self.earlier.take()
        loss, self.result.closure_loss = self.result.closure_loss, None
        return self._checked(loss)

    def _checked(self, loss: Tensor | None) -> Tensor:
        if loss is None and not self.alone:
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

    def __init__(self, owner: GradientRegularization, trainer: Trainer, batches: list[_Batch], last: bool, acts: bool) -> None:
        super().__init__(batches[-1].step, batches[-1].backward, batches[-1].zero_grad)
        self._owner = owner
        self._trainer = trainer
        self._batches = batches
        self._last = last
        self._acts = acts

    @torch.enable_grad()
    def closure(self, *args: Any, **kwargs: Any) -> ClosureResult:
        if not self._last:
            return ClosureResult(None)
        for batch in self._batches:
            batch.result, batch.alone = None, len(self._batches) == 1
        try:
            loss = self._regularized()
        except _SkippedStep:
            self.warning_cache.warn("`training_step` returned `None`. If this was on purpose, ignore this warning...")
            loss = None
        result = cast(ClosureResult, self._batches[-1].result)
        if loss is not None and len(self._batches) > 1:
            result.loss = loss
        return result

    def _regularized(self) -> Tensor:
        """Fill ``.grad`` with the regularized gradient of the batches; returns their mean loss."""
        trainer, regularizer = self._trainer, self._owner._build(self._trainer)
        earlier = self._batches[0].earlier = _EarlierGradients(trainer.lightning_module)
        scale = _loss_scale(trainer, self._owner.penalty)
        hooked: Iterable[Any] = (trainer.lightning_module, *cast(Any, trainer).callbacks)
        before = after = False

        def backward(loss: Tensor) -> None:
            nonlocal before
            if isinstance(scale, _MeasuredScale):
                scale.measure(loss)
            if not self._acts:
                earlier.give_back()  # this pass accumulates onto them, as Lightning's own
                self._batches[-1].backward(loss)
                return
            with _silenced(hooked, ("on_after_backward", *(("on_before_backward",) if before else ()))):
                before = True
                self._batches[-1].backward(loss)

        earlier.take()
        try:
            loss = regularizer.backward(self._batches, backward=backward, scaler=scale, step=trainer.global_step)
            after = self._acts
        finally:
            earlier.give_back()
        if after:
            call._call_callback_hooks(trainer, "on_after_backward")
            call._call_lightning_module_hook(trainer, "on_after_backward")
        return loss


class _EarlierGradients:
    """Gradients in ``.grad`` that are not of this step: hidden from its passes, and there for ``training_step`` and ``zero_grad``."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = list(module.parameters())
        self._taken: list[tuple[nn.Parameter, Tensor]] = []

    def take(self) -> None:
        """Take all gradients away."""
        self._taken = [(p, p.grad) for p in self._parameters if p.grad is not None]
        for p, _ in self._taken:
            p.grad = None

    @torch.no_grad()
    def give_back(self) -> None:
        """Add them to those that are there."""
        for p, gradient in self._taken:
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        self._taken = []


class _MeasuredScale:
    """The factor by which a custom precision or strategy multiplies the loss, known once a backward pass has begun."""

    def __init__(self) -> None:
        self._factor: Tensor | float = 1.0

    def measure(self, loss: Tensor) -> None:
        """Learn the factor from the gradient that ``loss`` receives."""
        loss.register_hook(self._learn)

    def _learn(self, received: Tensor) -> None:
        self._factor = received.detach()

    def scale(self, outputs: Tensor) -> Tensor:
        """``outputs`` times the factor."""
        return outputs * self._factor


class _Number(nn.Module):
    """The smallest model, which takes nothing from the generator of random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(1))


def _fresh() -> dict[str, Any]:
    """The state before the first step."""
    return {"step": 0, "evaluations": 0}


def _loss_scale(trainer: Trainer, penalty: GradientPenalty | None) -> Any:
    """What multiplies the loss beyond the objective's own factors: a ``GradScaler``, what a custom plugin does, or None."""
    precision, strategy = trainer.strategy.precision_plugin, trainer.strategy
    through: list[Any] = [strategy.backward, strategy.pre_backward, precision.pre_backward, precision.backward]
    custom = any(not str(getattr(method, "__module__", "")).startswith("lightning.") for method in through)
    # An exact penalty needs the scale before the first backward pass; without one it raises if there is.
    if custom and (penalty is None or penalty.difference != "exact"):
        return _MeasuredScale()
    return getattr(precision, "scaler", None)


@contextmanager
def _silenced(objects: Iterable[Any], names: Iterable[str]) -> Iterator[None]:
    """A context in which these methods of the objects do nothing."""
    before = [(vars(o), name, vars(o).get(name, _ABSENT)) for o in objects for name in names]
    for attributes, name, _ in before:
        attributes[name] = _nothing
    try:
        yield
    finally:
        for attributes, name, value in reversed(before):
            if value is _ABSENT:
                attributes.pop(name, None)
            else:
                attributes[name] = value


def _nothing(*_: Any, **__: Any) -> None:
    """In place of a method that is silenced."""


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
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
        raise ValueError(
            "the optimizer must take one gradient a step; got LBFGS, whose line search compares losses, which a penalty on the gradient "
            "leaves as they are. Use SGD or Adam in configure_optimizers."
        )
