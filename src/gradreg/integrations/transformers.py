"""Hugging Face ``Trainer`` with the gradient of ``loss + penalty``: a mixin for any trainer, and ``RegularizedTrainer``."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gradreg.extras import needing
from gradreg.integrations.refusals import refuse_decoupled, refuse_learned
from gradreg.penalties import GradientPenalty

with needing("gradreg.integrations.transformers", "transformers"):
    import torch
    from torch import Tensor, nn
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import ExportableState

    from gradreg.torch import GradientRegularizer
    from gradreg.torch.calls import Scope

Selection = Callable[[str, nn.Parameter], bool]
_Base = Trainer if TYPE_CHECKING else object


class RegularizerState(TrainerCallback, ExportableState):
    """The regularizer's counts, stored in ``trainer_state.json`` of a checkpoint."""

    def __init__(self) -> None:
        self.step = 0
        self.evaluations = 0
        self.attempts = 0

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Counts the updates, also those that a loss scale skips, which ``global_step`` need not count."""
        self.attempts += 1

    def state(self) -> dict[str, Any]:
        """What the Trainer saves."""
        return {"args": {}, "attributes": {"step": self.step, "evaluations": self.evaluations}}


class RegularizedTrainerMixin(_Base):
    """A mixin for any trainer class: adds the arguments ``penalty``, ``parameters`` and ``scope``, and regularizes its gradient.

    ::

        class RegularizedSFTTrainer(RegularizedTrainerMixin, SFTTrainer): ...

        trainer = RegularizedSFTTrainer(model, args=args, train_dataset=data, penalty=gradreg.fgr(gamma=1e-2, epsilon=1e-3))

    With ``gradient_accumulation_steps`` one perturbation is made from the whole accumulated gradient: forward passes are deferred until the
    last micro-batch, whose ``training_step`` returns the loss of all; the others return 0, so that logged losses do not change.
    Clipping, schedules, ``accelerate`` and checkpoints work as before, and the penalty's clock is the Trainer's ``global_step``. The state
    of a penalty that has one is in the checkpoint too, a file for each process; a resumed run whose checkpoint lacks it warns.

    Only the first pass counts: what a repeated pass logs, or changes in the trainer's numbers and ``_metrics``, is undone, and
    it starts from the same random numbers and the same trainer state. A custom ``compute_loss`` that writes elsewhere should check
    ``self.repeats_pass`` first.

    Args:
        penalty: what is penalized; None trains without a penalty, through the same path.
        parameters: ``(name, parameter) -> bool`` with the model's own names: see ``parameters`` of ``GradientRegularizer``.
            ``without_embeddings(model)`` is one.
        scope: "local" or "global", under data parallelism: see ``GradientRegularizer``.

    While ``training_step`` runs, the loss that it gets from ``compute_loss`` stands for the loss to come: its value is 1. One that does
    more than scale it raises; put what is more (terms added to the loss, several losses) into ``compute_loss``.

    Also logs ``first_gradient_norm`` (of the first pass), ``penalty_strength``, and ``gradient_evaluations`` so far.

    Raises:
        ValueError: DeepSpeed, Megatron-LM, LOMO, or context or sequence parallelism, which run their own backward pass; when training, a
            ``training_step`` that does more than scale one loss.
    """

    repeats_pass = False
    """Whether the current forward pass repeats one that has been counted and logged."""

    def __init__(
        self, *args: Any, penalty: GradientPenalty | None, parameters: Selection | None = None, scope: Scope = "local", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.penalty = penalty
        self.parameters = parameters
        self.scope: Scope = scope
        self.regularizer: GradientRegularizer | None = None
        self._waiting: list[_MicroBatch] = []
        self._finished = (-1, -1)
        self._resumed_from: str | None = None
        _check_supported(self)
        GradientRegularizer(cast(nn.Module, self.model), penalty, parameters=parameters, scope=scope)  # so that bad arguments raise here
        refuse_decoupled(penalty, "the Trainer")
        refuse_learned(penalty, "the Trainer")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own; the regularizer is built again, from the model as it is then wrapped."""
        if not self._states():
            self.add_callback(RegularizerState())
        return super().train(*args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, which ``auto_find_batch_size`` begins again after a failure."""
        self.regularizer = None
        self._waiting.clear()
        self._finished, self._resumed_from = (-1, -1), None
        return super()._inner_training_loop(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The trainer's own, and beside it this process's part of the penalty's state."""
        super()._save_optimizer_and_scheduler(output_dir)
        state = {} if self.regularizer is None else self.regularizer.state_dict()
        if "memory" in state or "radius" in state:
            Path(output_dir).mkdir(parents=True, exist_ok=True)  # other processes may come before the one that saves the model
            kept = {key: state[key] for key in ("memory", "radius") if key in state}
            torch.save(kept if "radius" in kept else kept["memory"], self._memory_file(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The trainer's own; the regularizer, which does not exist yet, is told where its state is."""
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's own, with loss and backward pass deferred until the accumulation is complete."""
        if self.regularizer is None:
            self._build(model)
        if self.is_in_train and self._finished == self._updates():
            raise _does_more("calls the training_step beneath it more than once")
        accelerator, loss = self.accelerator, torch.zeros((), device=self.args.device)
        compute_loss, backward = self.compute_loss, accelerator.backward
        one = torch.ones((), requires_grad=True)  # in place of the loss; on the CPU, so that reading what becomes of it waits for nothing
        calls = {"compute_loss": 0, "backward": 0}

        def wait(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            calls["compute_loss"] += 1
            if calls["compute_loss"] > 1:
                raise _does_more("calls compute_loss more than once")
            if kwargs.get("return_outputs") or (args and args[0] is True):
                raise _does_more("uses the outputs of compute_loss")
            self._waiting.append(_MicroBatch(self, lambda: compute_loss(model, copy.copy(inputs), *args, **kwargs)))
            return one

        def finish(scaled: Tensor, **options: Any) -> None:
            calls["backward"] += 1
            if calls["backward"] > 1:
                raise _does_more("runs more than one backward pass")
            if calls["compute_loss"] == 0:
                raise _does_more("computes its loss without compute_loss")
            self._waiting[-1].factor = _factor(scaled, one)
            if accelerator.sync_gradients:
                del vars(self)["compute_loss"]
                loss.add_(self._regularized(lambda value: backward(value, **options)))

        # Set on the instances, so that they take precedence over anything that a subclass overrides.
        vars(self)["compute_loss"], vars(accelerator)["backward"] = wait, finish
        try:
            super().training_step(model, *args, **kwargs)
            if calls["backward"] == 0:
                raise _does_more("does not call accelerator.backward")
        except BaseException:
            self._waiting.clear()
            raise
        finally:
            vars(self).pop("compute_loss", None)
            del vars(accelerator)["backward"]
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's own; nothing during a repeated pass."""
        if self.repeats_pass:
            return
        if "loss" in logs and self.regularizer is not None and self.regularizer.step:
            m = self.regularizer.metrics
            logs |= {"first_gradient_norm": m.gradient_norm, "penalty_strength": m.strength, "gradient_evaluations": m.evaluations}
        super().log(logs, *args, **kwargs)

    def _build(self, model: nn.Module) -> None:
        names = {id(p): name for name, p in self.accelerator.unwrap_model(model).named_parameters()}
        choose = self.parameters
        parameters = None if choose is None else lambda name, p: choose(names.get(id(p), name), p)
        self.regularizer = GradientRegularizer(model, self.penalty, parameters=parameters, scope=self.scope)
        saved = cast("dict[str, Any]", self.state.stateful_callbacks).get("RegularizerState") if self.state.global_step else None
        if self.state.global_step and self.penalty is not None and self.penalty.has_memory:
            self._load_memory()
        if saved:
            self.regularizer.load_state_dict({**self.regularizer.state_dict(), **saved["attributes"]})

    def _load_memory(self) -> None:
        """Restore the penalty's state from the checkpoint, if every process finds its part there."""
        assert self.regularizer is not None
        file = None if self._resumed_from is None else self._memory_file(self._resumed_from)
        found = torch.tensor([file is not None and file.is_file()], device=self.args.device)
        if file is None or not bool(cast(Tensor, self.accelerator.gather(found)).all()):
            warnings.warn(
                f"the checkpoint that training resumes from has no state of {self.penalty} for each of {self.args.world_size} processes, "
                "so it starts from zero. Checkpoints have it that RegularizedTrainer saves with save_only_model=False; resume with as many "
                "processes as wrote it.",
                stacklevel=2,
            )
            return
        try:
            kept = torch.load(file, map_location="cpu", weights_only=True)
            kept = kept if "radius" in kept else {"memory": kept}
            self.regularizer.load_state_dict({**self.regularizer.state_dict(), **kept})
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
            raise ValueError(
                f"{str(file)!r} must hold the state of {self.penalty}; {type(error).__name__}: {error} Resume from another checkpoint, or "
                "remove the file to start from zero."
            ) from error

    def _memory_file(self, checkpoint: str) -> Path:
        """The file in ``checkpoint`` with this process's part of the penalty's state."""
        return Path(checkpoint) / f"gradreg-{self.args.process_index}-of-{self.args.world_size}.pt"

    def _regularized(self, backward: Callable[[Tensor], object]) -> Tensor:
        """The regularized gradient of the deferred micro-batches; returns their loss."""
        regularizer, closures = self.regularizer, self._waiting
        assert regularizer is not None
        self._waiting = []
        self._finished = self._updates()
        loss = regularizer.backward(closures, backward=backward, scaler=self.accelerator.scaler, step=self.state.global_step)
        for callback in self._states():
            callback.step, callback.evaluations = regularizer.step, regularizer.metrics.evaluations
        return loss

    def _states(self) -> list[RegularizerState]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, RegularizerState)]

    def _updates(self) -> tuple[int, int]:
        """Of the optimizer so far: those that are counted, and those tried."""
        return self.state.global_step, sum(callback.attempts for callback in self._states())

    @contextmanager
    def _repeating(self, before: dict[str, Any]) -> Iterator[None]:
        """A context that repeats a pass: the trainer has the attributes that it had ``before`` that pass."""
        now = dict(vars(self))
        self.__dict__.clear()
        self.__dict__.update(_copied(before), repeats_pass=True)
        try:
            yield
        finally:
            self.__dict__.clear()
            self.__dict__.update(now)


class RegularizedTrainer(RegularizedTrainerMixin, Trainer):
    """``transformers.Trainer`` with the arguments of ``RegularizedTrainerMixin``: ``penalty``, ``parameters`` and ``scope``.

    ::

        trainer = RegularizedTrainer(model, args, train_dataset=data, penalty=gradreg.sam(rho=0.05))
    """


def without_embeddings(model: nn.Module) -> Selection:
    """Selects all parameters but those of embeddings and of the output head: ``parameters=without_embeddings(model)``.

    Source: arXiv 2602.18037, whose code leaves them out of the perturbation.
    """

    def select(name: str, parameter: nn.Parameter) -> bool:
        # Looked up each time, because sharding replaces parameters.
        modules = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        left_out = [p for m in [*modules, *([head] if isinstance(head, nn.Module) else [])] for p in m.parameters()]
        return all(parameter is not p for p in left_out)

    return select


class _MicroBatch:
    """The closure of a micro-batch: only its first call changes the trainer."""

    def __init__(self, trainer: RegularizedTrainerMixin, forward: Callable[[], Any]) -> None:
        self.trainer = trainer
        self.forward = forward
        self.factor: Tensor | float = 1.0
        self.synchronises = trainer.accelerator.sync_gradients
        self.before: dict[str, Any] | None = None

    def __call__(self) -> Tensor:
        if self.before is None:
            self.before = _copied(vars(self.trainer))
            return self._loss()
        with self.trainer._repeating(self.before):
            return self._loss()

    def _loss(self) -> Tensor:
        gradients = self.trainer.accelerator.gradient_state
        synchronises, gradients.sync_gradients = gradients.sync_gradients, self.synchronises
        try:
            with self.trainer.compute_loss_context_manager():
                loss = self.forward()
        finally:
            gradients.sync_gradients = synchronises
        return (loss.mean() if loss.dim() else loss) * self.factor


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes, with copies of the lists of metrics."""
    return {name: copy.deepcopy(value) if name == "_metrics" else value for name, value in attributes.items()}


def _factor(scaled: Tensor, one: Tensor) -> Tensor:
    """By what ``training_step`` multiplied ``one``.

    Raises:
        ValueError: it did anything else, so that more than a factor would be lost.
    """
    if scaled is one:
        return one.detach()
    nodes, seen = [scaled.grad_fn], set[Any]()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", one) is not one:
            raise _does_more("adds a term that depends on parameters to the loss of compute_loss")
        nodes += [following for following, _ in node.next_functions]
    factor = torch.autograd.grad(scaled, one)[0] if scaled.requires_grad else None
    if factor is None or not torch.isclose(factor, scaled.detach().to(factor), rtol=1e-4):
        raise _does_more("does more with the loss of compute_loss than multiply it by a number")
    return factor


def _does_more(what: str) -> ValueError:
    return ValueError(
        f"training_step must scale the loss of one call of compute_loss and call accelerator.backward on it once; got one that {what}. The "
        "penalty evaluates the loss again at perturbed parameters, which only compute_loss can do: compute the whole loss there (extra "
        "terms, pairs, generated batches), and leave training_step to transformers.Trainer. Where that cannot be, write a loop of your own "
        "with gradreg.torch.GradientRegularizer."
    )


def _check_supported(trainer: RegularizedTrainerMixin) -> None:
    distributed = str(trainer.accelerator.distributed_type.value)
    if distributed in ("DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(
            f"the Trainer must leave the backward pass to PyTorch for a second one to follow; got {distributed}. "
            "Use DDP or FSDP2 (fsdp_version: 2)."
        )
    if "lomo" in str(trainer.args.optim).lower():
        raise ValueError(f"optim must not step during the backward pass; got {trainer.args.optim}. Use adamw_torch, say.")
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if parallel is not None and (getattr(parallel, "cp_enabled", False) or getattr(parallel, "sp_enabled", False)):
        raise ValueError(
            "the parallelism must not split sequences, whose buffers last for one pass only; got context or sequence parallelism. "
            "Use data parallelism (DDP or FSDP2)."
        )
