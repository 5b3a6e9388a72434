"""The keys ``loss`` and ``metric`` of a recipe, and what they build: cross entropy and accuracy, or functions of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from gradreg import checks, own_code
from gradreg.own_code import Code
from gradreg.study.tasks import Metric

if TYPE_CHECKING:
    from torch import Tensor

ACCURACY = Metric("accuracy", "max", percent=True)
LOSS = Metric("loss", "min")

_KEYS = ("name", "mode", "percent", "label", "finish")
_OURS = {"accuracy": ACCURACY, "loss": LOSS}


class Loss(Protocol):
    """What a run trains on."""

    def training(self, outputs: Any, targets: Any, *, reduction: str = "mean") -> Tensor:
        """The mean over the samples of a (micro-)batch, or with "none" the loss of each."""
        ...

    def total(self, outputs: Any, targets: Any, samples: int) -> Tensor:
        """The sum over the samples of a batch, in evaluation."""
        ...


class Judge(Protocol):
    """What a run is judged by: sums over batches, and the values that they make in the end."""

    def sums(self, outputs: Any, targets: Any, samples: int) -> list[Tensor]:
        """Sums over the samples of a batch, each a number or a vector."""
        ...

    def values(self, means: Sequence[float]) -> dict[str, float]:
        """The metrics, by name, from the sums over a set divided by its samples."""
        ...


@dataclass(frozen=True)
class Objective:
    """A loss and what is judged by, as a configuration describes them; what they name is imported when it is first needed.

    Args:
        loss: the block ``loss``; None for cross entropy.
        metric: the block ``metric``; None for accuracy.
        label_smoothing: of cross entropy, in training alone.
        code: where the files of one's own functions are.
    """

    loss: Mapping[str, Any] | None = None
    metric: Mapping[str, Any] | None = None
    label_smoothing: float = 0.0
    code: Code | None = None

    def __post_init__(self) -> None:
        for key, block in (("loss", self.loss), ("metric", self.metric)):
            if block is not None and not isinstance(block.get("name"), str):
                raise ValueError(f"{key} must have a name; got {checks.describe(block)}. Write {{name: mine:{key}}}, say.")
        name = None if self.loss is None else self.loss["name"]
        if name is not None and not own_code.is_own(name):
            raise ValueError(
                f"loss.name must be a function, as in mine:loss or torch.nn.functional:mse_loss; got {name!r}. Leave the block out for "
                "cross entropy."
            )
        _ = self.judged

    @property
    def own_loss(self) -> bool:
        """Whether the loss is not ours."""
        return self.loss is not None

    @cached_property
    def judged(self) -> Metric:
        """What epochs are ranked by, and studies judge by."""
        if self.metric is None:
            return ACCURACY
        name = self.metric["name"]
        if name in _OURS:
            given = [key for key in self.metric if key != "name"]
            if given:
                raise ValueError(f"metric.{given[0]} must be left out for {name!r}, which is known; got {self.metric[given[0]]!r}.")
            return _OURS[name]
        if not own_code.is_own(name):
            raise ValueError(checks.unknown("metric", name, [*_OURS, "mine:metric"]))
        mode, percent, finish = self.metric.get("mode"), self.metric.get("percent"), self.metric.get("finish")
        if mode is None:
            raise ValueError(f"metric.mode must say what is better, max or min, for {name!r}; got none. Add mode: max.")
        label = self.metric.get("label", name.rpartition(":")[2])
        if label == "loss":
            raise ValueError(
                f"metric.label must not be 'loss', which is recorded beside the metric; got it for {name!r}. Write another label."
            )
        if finish is not None and finish not in _FINISHES and not own_code.is_own(finish):
            raise ValueError(checks.unknown("metric.finish", finish, [*_FINISHES, "mine:finish"]))
        try:
            return Metric(label, mode, label == "accuracy" if percent is None else percent)
        except (ValueError, TypeError) as error:
            raise type(error)(f"metric {name!r}: {error} In a recipe the name is metric.label.") from error

    def check(self) -> None:
        """Import what it names, and check the options.

        Raises:
            ValueError, TypeError: as ``own_code``'s ``load`` and ``check_call``.
        """
        _ = self.build_loss(), self.build_judge()

    def build_loss(self) -> Loss:
        """What is trained on."""
        return CrossEntropy(self.label_smoothing) if self.loss is None else OwnLoss(_function("loss", self.loss, ("name",), self.code))

    def build_judge(self) -> Judge:
        """What is judged by."""
        if self.metric is None or self.metric["name"] == "accuracy":
            return Accuracy()
        if self.metric["name"] == "loss":
            return LossAlone()
        finish = self.metric.get("finish")
        if finish is not None:
            finish = _FINISHES.get(finish) or own_code.load(finish, self.code, key="metric.finish")
        return OwnMetric(_function("metric", self.metric, _KEYS, self.code), self.metric["name"], self.judged, finish)


class CrossEntropy:
    """The cross entropy of logits (n, classes) and classes (n,), or their probabilities (n, classes)."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self._smoothing = label_smoothing

    def training(self, outputs: Any, targets: Any, *, reduction: str = "mean") -> Tensor:
        from torch.nn.functional import cross_entropy

        self._check(outputs, targets)
        return cross_entropy(outputs, targets, label_smoothing=self._smoothing, reduction=reduction)

    def total(self, outputs: Any, targets: Any, samples: int) -> Tensor:
        from torch.nn.functional import cross_entropy

        self._check(outputs, targets)
        if outputs.dim() > 2:  # a class for each pixel or token: the mean over these
            return cross_entropy(outputs, targets) * samples
        return cross_entropy(outputs, targets, reduction="sum")

    def _check(self, outputs: Any, targets: Any) -> None:
        """Raise for what is not classification: one column of outputs, say, has no cross entropy but 0."""
        shapes = getattr(outputs, "shape", ()), getattr(targets, "shape", None)
        if len(shapes[0]) < 2 or shapes[0][1] < 2 or shapes[1] is None:
            raise ValueError(
                f"loss must be given for outputs {_described(outputs)} and targets {_described(targets)}, of which there is no cross "
                "entropy; got none. Write loss: {name: torch.nn.functional:mse_loss}, or {name: mine:loss}."
            )


class OwnLoss:
    """A function of (outputs, targets) that returns the mean over the samples.

    Raises:
        ValueError: it returns something else than a tensor with one element.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def training(self, outputs: Any, targets: Any, *, reduction: str = "mean") -> Tensor:
        from torch import Tensor

        loss = self._function(outputs, targets)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise ValueError(
                f"loss must return a scalar tensor, the mean over the batch; got {_described(loss)}. Return loss.mean(), or with a size of "
                "1 loss.squeeze()."
            )
        return loss

    def total(self, outputs: Any, targets: Any, samples: int) -> Tensor:
        return self.training(outputs, targets) * samples


class Accuracy:
    """Shares of the samples whose class has the largest output, or is among the five largest (all, if there are fewer classes)."""

    def sums(self, outputs: Any, targets: Any, samples: int) -> list[Tensor]:
        if getattr(outputs, "ndim", None) != 2 or getattr(targets, "ndim", None) != 1 or targets.is_floating_point():
            raise ValueError(
                f"metric must be given for outputs {_described(outputs)} and targets {_described(targets)}: accuracy needs logits "
                "(n, classes) and whole numbers (n,). Write metric: {name: loss}, or {name: mine:metric, mode: max}."
            )
        best = outputs.topk(min(5, outputs.shape[1]), dim=1).indices == targets[:, None]
        return [best[:, 0].sum(), best.sum()]

    def values(self, means: Sequence[float]) -> dict[str, float]:
        return {"accuracy": means[0], "top5": means[1]}


class LossAlone:
    """Nothing beside the loss."""

    def sums(self, outputs: Any, targets: Any, samples: int) -> list[Tensor]:
        return []

    def values(self, means: Sequence[float]) -> dict[str, float]:
        return {}


class OwnMetric:
    """A function of (outputs, targets) that returns the mean over a batch: a number, or several, from which ``finish`` makes the metric.

    Batches are weighed by their samples, so that the means are those over the set, whatever the size of the batches.

    Raises:
        ValueError: it returns something else than numbers, or the metric is not one number.
    """

    def __init__(self, function: Callable[..., Any], name: str, metric: Metric, finish: Callable[..., Any] | None) -> None:
        self._function, self._name, self._metric, self._finish = function, name, metric, finish

    def sums(self, outputs: Any, targets: Any, samples: int) -> list[Tensor]:
        import torch

        returned = self._function(outputs, targets)
        try:
            if isinstance(returned, (tuple, list)):
                returned = torch.stack([torch.as_tensor(value).detach().reshape(()) for value in returned])
            value = torch.as_tensor(returned).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"metric {self._name!r} must return a number, or a list of numbers, for each batch; got {_described(returned)}. Take means."
            ) from error
        if value.dim() > 1 or (value.dim() == 1 and self._finish is None and len(value) != 1):
            raise ValueError(
                f"metric {self._name!r} must return a number, the mean over the batch; got {_described(value)}. Return value.mean(), or "
                "several means as a vector with metric.finish, which makes one number of them."
            )
        return [value.double() * samples if value.device.type != "mps" else value * samples]

    def values(self, means: Sequence[float]) -> dict[str, float]:
        value: Any = means[0] if len(means) == 1 else list(means)
        if self._finish is not None:
            try:
                value = self._finish(value)
            except (OverflowError, ZeroDivisionError) as error:
                value = math.inf if isinstance(error, OverflowError) else math.nan
            except (ValueError, TypeError) as error:
                if all(math.isfinite(mean) for mean in means):
                    raise ValueError(f"metric.finish must make a number of {value}; got {type(error).__name__}: {error}.") from error
                value = math.nan
        try:
            value = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"metric {self._name!r} must be one number; got {checks.describe(value)}. Give metric.finish.") from error
        if self._metric.percent and math.isfinite(value) and not 0 <= value <= 1:
            raise ValueError(
                f"metric {self._name!r} must be a share between 0 and 1, which is shown in percent; got {value:g}. Leave percent out."
            )
        return {self._metric.name: value}


_FINISHES: dict[str, Callable[[float], float]] = {"sqrt": math.sqrt, "exp": math.exp}


def _function(key: str, block: Mapping[str, Any], keys: Sequence[str], code: Code | None) -> Callable[..., Any]:
    """What a block names, with its options: a function of (outputs, targets), or a class whose instances are such."""
    name, options = block["name"], {option: value for option, value in block.items() if option not in keys}
    function, reserved = own_code.load(name, code, key=f"{key}.name"), set(keys)
    if isinstance(function, type):
        own_code.check_call(function, name, key=key, options=options, reserved=reserved)
        return function(**options)
    own_code.check_call(function, name, "outputs", "targets", key=key, options=options, reserved=reserved)
    if not options:
        return function
    return lambda outputs, targets: function(outputs, targets, **options)


def _described(value: Any) -> str:
    """``float32 (32, 1)``, or what it is."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None:
        return checks.describe(value)
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
