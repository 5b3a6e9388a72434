"""Modules whose forward pass reads what it writes: buffers, frozen parameters, Python attributes, and random numbers of every source.

Each stands between two linear layers (``problem_with``). All of them depend on their state strongly enough that a pass which starts from
another state gives another gradient.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from .cases import Problem

WIDTH = 6


class BatchRenorm(nn.Module):
    """Ioffe 2017: batch statistics corrected towards the running ones, within bounds that widen with the number of batches seen."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("mean", torch.full((width,), 0.3))
        self.register_buffer("deviation", torch.full((width,), 0.8))
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.weight * (x - self.mean) / self.deviation
        widest = 1.0 + 0.4 * min(int(self.batches), 5)
        mean, deviation = x.mean(0), x.std(0) + 1e-3
        r = (deviation / self.deviation).detach().clamp(1 / widest, widest)
        d = ((mean - self.mean) / self.deviation).detach().clamp(-widest, widest)
        with torch.no_grad():
            self.mean += 0.2 * (mean - self.mean)
            self.deviation += 0.2 * (deviation - self.deviation)
            self.batches += 1
        return self.weight * ((x - mean) / deviation * r + d)


class Codebook(nn.Module):
    """Vector quantization with a codebook that is an average of what it stood for, as vector-quantize-pytorch writes it: through ``.data``.

    The first batch makes the codebook (a row of the batch for each code and one round of k-means over half of it).
    """

    def __init__(self, codes: int = 4) -> None:
        super().__init__()
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("codes", torch.zeros(codes, WIDTH))
        self.register_buffer("sums", torch.zeros(codes, WIDTH))
        self.register_buffer("counts", torch.zeros(codes))

    def nearest(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.cdist(x, self.codes).argmin(1), len(self.codes)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        seen = x.detach()
        if self.training and not self.started:
            self.codes.data.copy_(seen[: len(self.codes)])
            sample = seen[::2]
            chosen = self.nearest(sample)
            self.codes.data.copy_((chosen.T @ sample) / chosen.sum(0).clamp_min(1)[:, None])
            self.sums.data.copy_(self.codes)
            self.counts.data.fill_(1.0)
            self.started.data.fill_(True)
        chosen = self.nearest(seen)
        quantized = chosen @ self.codes
        if self.training:
            self.counts.data.lerp_(chosen.sum(0), 0.3)
            self.sums.data.lerp_(chosen.T @ seen, 0.3)
            self.codes.data.copy_(self.sums / (self.counts + 1e-5)[:, None])
        return x + (quantized - x).detach() + 0.5 * (x - quantized)


class Queue(nn.Module):
    """MoCo: each sample against the keys of earlier batches, whose oldest rows the batch then replaces."""

    def __init__(self, size: int = 12) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("queue", nn.functional.normalize(torch.randn(size, WIDTH, generator=generator), dim=1))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        similar = torch.softmax(x @ self.queue.T.clone(), 1) @ self.queue.clone()
        if self.training:
            rows = (int(self.pointer) + torch.arange(len(x))) % len(self.queue)
            with torch.no_grad():
                self.queue[rows] = nn.functional.normalize(x.detach(), dim=1)
                self.pointer[0] = (int(self.pointer) + len(x)) % len(self.queue)
        return x + 2 * similar


class Observed(nn.Module):
    """Quantization-aware training: weights and activations pass PyTorch's observers (averages of minimum and maximum)."""

    def __init__(self) -> None:
        super().__init__()
        from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

        self.linear = nn.Linear(WIDTH, WIDTH)
        bounds = {"observer": MovingAverageMinMaxObserver, "quant_min": 0, "quant_max": 255, "averaging_constant": 0.3}
        self.activations, self.weights = FakeQuantize(**bounds), FakeQuantize(**bounds)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.activations(x), self.weights(self.linear.weight), self.linear.bias)


class Teacher(nn.Module):
    """BYOL: a frozen copy follows the trained layer, updated at the head of the forward pass ``by`` one of three ways of writing."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.student = nn.Linear(WIDTH, WIDTH)
        self.teacher = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                if self.by == "in place":
                    with torch.no_grad():
                        mine.lerp_(theirs, 0.3)
                elif self.by == "data":
                    mine.data.mul_(0.7).add_(theirs.data, alpha=0.3)
                else:
                    mine.data = mine.data * 0.7 + theirs.data * 0.3
        return self.student(x) * self.teacher(x)


class AveragedTeacher(nn.Module):
    """The same with PyTorch's own averaging, which counts its updates in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        self.student = nn.Linear(WIDTH, WIDTH)
        self.teacher = AveragedModel(self.student, multi_avg_fn=get_ema_multi_avg_fn(0.7)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.teacher.update_parameters(self.student)
        return self.student(x) * self.teacher(x)


class Counter(nn.Module):
    """Scales by how often it was called, counted ``by``: a buffer, an attribute that is a number, or one that is a tensor."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by
        if by in ("buffer", "reassigned"):
            self.register_buffer("calls", torch.zeros(()))
        else:
            self.calls = 0 if by == "number" else torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        if self.by == "buffer" or self.by == "tensor":
            self.calls += 1
        else:
            self.calls = self.calls + 1
        return x * (1.0 + 0.3 * self.calls)


class Metered(nn.Module):
    """A metric of torchmetrics in the forward pass, whose sums are attributes and no buffers."""

    def __init__(self) -> None:
        super().__init__()
        from torchmetrics import SumMetric

        self.seen = SumMetric()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.update(x.detach().abs().mean().float())
        return x * (1.0 + 0.3 * self.seen.sum_value)


class Average(nn.Module):
    """Subtracts an average of earlier batches, kept in a buffer of any number of dimensions and written ``by`` some way.

    With ``every=3`` it is written at every third call only.
    """

    def __init__(self, by: str, *, dimensions: int = 2, every: int = 1) -> None:
        super().__init__()
        self.by, self.every = by, every
        self.register_buffer("average", torch.full((1,) * (dimensions - 1) + (WIDTH,), 0.5))
        if every > 1:
            self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        out = (x - self.average.reshape(-1)).square() + x
        mean = x.detach().mean(0).view_as(self.average)
        if self.every > 1:
            self.calls += 1
            if int(self.calls) % self.every:
                return out
        if self.by == "data":
            self.average.data.mul_(0.6).add_(mean, alpha=0.4)
        elif self.by == "in place":
            self.average = self.average.clone() if self.average.requires_grad else self.average
            self.average.mul_(0.6).add_(mean, alpha=0.4)
        elif self.by == "set":
            self.average.set_(0.6 * self.average + 0.4 * mean)
        elif self.by == "numpy":
            memory = self.average.numpy()
            memory *= 0.6
            memory += 0.4 * mean.numpy()
        else:
            self.average = 0.6 * self.average + 0.4 * mean
        return out


class Lazy(nn.Module):
    """Registers its buffer in the first forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        if "average" not in self._buffers:
            self.register_buffer("average", x.detach().mean(0))
        out = x * (1 + (x - self.average))
        self.average.lerp_(x.detach().mean(0) + 1.0, 0.4)
        return out


class Growing(nn.Module):
    """Re-registers a longer table when asked for more, as rotary embeddings do for longer texts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.register_buffer("table", torch.arange(len(self.table) + 1, dtype=x.dtype), persistent=False)
        return x * (1.0 + 0.3 * self.table[-1])


class Dropped(nn.Module):
    """Dropout whose mask comes from one of the sources of random numbers."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.generator = torch.Generator().manual_seed(11) if source == "generator" else None
        self.numbers = np.random.default_rng(11) if source == "numpy generator" else None
        self.random = random.Random(11) if source == "random generator" else None

    def mask(self, x: Tensor) -> Tensor:
        if self.source in ("torch", "generator"):
            return torch.rand(x.shape, generator=self.generator, dtype=x.dtype)
        if self.source in ("numpy", "numpy generator"):
            draw = np.random.random if self.numbers is None else self.numbers.random
            return torch.from_numpy(draw(tuple(x.shape)))
        draw_one = random.random if self.random is None else self.random.random
        return torch.tensor([draw_one() for _ in range(x.numel())], dtype=x.dtype).view_as(x)

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.mask(x) > 0.4).to(x.dtype) / 0.6 if self.training else x


class Wrapped(nn.Module):
    """A module in a module in a list, as frameworks wrap what they are given."""

    def __init__(self, inner: nn.Module, depth: int = 3) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"only": inner if depth == 0 else Wrapped(inner, depth - 1)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["only"](x)


class Checkpointed(nn.Module):
    """Gradient checkpointing: the backward pass runs the block, and writes its state, a second time."""

    def __init__(self, inner: nn.Module, *, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class CachedParametrization(nn.Module):
    """Two layers whose weights are computed once a step where ``torch.nn.utils.parametrize.cached()`` surrounds it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Symmetric(nn.Module):
    """A parametrization whose backward pass saves nothing, so that a second one through the same graph goes unnoticed."""

    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).T


def symmetric() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


class Tied(nn.Module):
    """One module with state, used twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first = self.second = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Shifted(nn.Module):
    """Adds a buffer that it never writes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.shift).square()


class SpecAugment(nn.Module):
    """A small Wav2Vec2 of transformers, in training: it masks spans of time that it draws by numpy, beside dropout by torch."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import Wav2Vec2Config, Wav2Vec2Model

        layers = {
            "conv_dim": (6, 6),
            "conv_stride": (4, 2),
            "conv_kernel": (8, 4),
            "num_feat_extract_layers": 2,
            "feat_extract_norm": "layer",
        }
        sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        masks = {"mask_time_prob": 0.4, "mask_time_length": 2, "attn_implementation": "eager"}
        positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
        self.model = Wav2Vec2Model(Wav2Vec2Config(**layers, **sizes, **masks, **positions))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.model(x.detach().repeat(1, 20)).last_hidden_state.mean(1)


def spectral_by_hooks() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))


def spectral_by_parametrization() -> nn.Module:
    return parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))


def instance_norm() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (3, 2)), nn.InstanceNorm1d(3, track_running_stats=True), nn.Flatten())


@dataclass(frozen=True)
class Stateful:
    """One module of the zoo.

    Args:
        make: the module.
        twice: whether it is twice differentiable.
        in_training: whether the model is in training mode, at each of three steps.
        cached: whether ``torch.nn.utils.parametrize.cached()`` surrounds the step.
        inference: whether the buffers are inference tensors, as those are that a module makes in a validation before training.
    """

    make: Callable[[], nn.Module]
    twice: bool = True
    in_training: tuple[bool, bool, bool] = (True, True, True)
    cached: bool = False
    inference: bool = False


ZOO: dict[str, Stateful] = {
    "spectral norm by hooks": Stateful(spectral_by_hooks),
    "spectral norm by parametrization": Stateful(spectral_by_parametrization),
    "batch renorm": Stateful(BatchRenorm),
    "batch norm": Stateful(lambda: nn.BatchNorm1d(WIDTH)),
    "instance norm": Stateful(instance_norm),
    "codebook": Stateful(Codebook),
    "queue": Stateful(Queue),
    "quantization observers": Stateful(Observed, twice=False),
    "teacher written in place": Stateful(lambda: Teacher("in place")),
    "teacher written through data": Stateful(lambda: Teacher("data")),
    "teacher with new data": Stateful(lambda: Teacher("rebound")),
    "teacher of torch.optim.swa_utils": Stateful(AveragedTeacher),
    "counter in a buffer": Stateful(lambda: Counter("buffer")),
    "counter in a reassigned buffer": Stateful(lambda: Counter("reassigned")),
    "counter in a number": Stateful(lambda: Counter("number")),
    "counter in a tensor": Stateful(lambda: Counter("tensor")),
    "torchmetrics": Stateful(Metered),
    "average in place": Stateful(lambda: Average("in place")),
    "average reassigned": Stateful(lambda: Average("reassigned")),
    "average through data, 1-d": Stateful(lambda: Average("data", dimensions=1)),
    "average through data, 2-d": Stateful(lambda: Average("data")),
    "average through data, 3-d": Stateful(lambda: Average("data", dimensions=3)),
    "average by set_": Stateful(lambda: Average("set")),
    "average through numpy": Stateful(lambda: Average("numpy")),
    "average every third call": Stateful(lambda: Average("in place", every=3)),
    "average every third call, through data": Stateful(lambda: Average("data", every=3)),
    "average every third call, reassigned": Stateful(lambda: Average("reassigned", every=3)),
    "buffer of the first forward": Stateful(Lazy),
    "buffer that grows": Stateful(Growing),
    "dropout by torch": Stateful(lambda: Dropped("torch")),
    "dropout by a torch generator": Stateful(lambda: Dropped("generator")),
    "dropout by numpy": Stateful(lambda: Dropped("numpy")),
    "dropout by a numpy generator": Stateful(lambda: Dropped("numpy generator")),
    "dropout by random": Stateful(lambda: Dropped("random")),
    "dropout by a random generator": Stateful(lambda: Dropped("random generator")),
    "SpecAugment of transformers": Stateful(SpecAugment),
    "wrapped": Stateful(lambda: Wrapped(spectral_by_hooks())),
    # Not by double backpropagation: each backward pass computes the block again, from state that the block itself has written since.
    "checkpointed": Stateful(lambda: Checkpointed(nn.Sequential(spectral_by_hooks(), Average("in place")), reentrant=False), twice=False),
    "checkpointed, reentrant": Stateful(
        lambda: Checkpointed(nn.Sequential(spectral_by_hooks(), Average("in place")), reentrant=True), twice=False
    ),
    "cached parametrization": Stateful(CachedParametrization, cached=True),
    "cached symmetric weights": Stateful(symmetric, cached=True),
    "tied": Stateful(lambda: Tied(spectral_by_hooks())),
    "tied average": Stateful(lambda: Tied(Average("data"))),
    "buffer of inference mode": Stateful(Shifted, inference=True),
    "buffer of inference mode, reassigned": Stateful(lambda: Average("reassigned"), inference=True),
    "evaluation, then training": Stateful(BatchRenorm, in_training=(False, True, True)),
    "codebook, evaluation, then training": Stateful(Codebook, in_training=(True, False, True)),
}


def problem_with(module: Stateful) -> Problem:
    """The module between two linear layers, in float64, with eight samples."""
    torch.default_generator.manual_seed(2)  # torch.manual_seed seeds devices, too, and takes as long as making the model
    np.random.seed(2)
    random.seed(2)
    model = nn.Sequential(nn.Linear(3, WIDTH), module.make(), nn.Tanh(), nn.Linear(WIDTH, 2)).double()
    if module.inference:
        with torch.inference_mode():
            for part in model.modules():
                part._buffers.update({name: buffer.clone() for name, buffer in part._buffers.items() if buffer is not None})
    return Problem(model, torch.randn(8, 3, dtype=torch.float64), 2 * torch.randn(8, 2, dtype=torch.float64))


def own_copy(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with ``model``, even where an attribute is a tensor with a graph, as spectral norm's hooks leave one."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in [*vars(module).values(), *module._buffers.values()]:
            if isinstance(value, Tensor) and (not value.is_leaf or value.is_inference()):
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def random_state() -> tuple[Any, ...]:
    """Where the global streams of random numbers stand."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Everything that a forward pass may have changed, and nothing that is trained: buffers, frozen tensors, attributes, random numbers."""
    state = {f"frozen {name}": p for name, p in model.named_parameters() if not p.requires_grad}
    state.update({f"buffer {name}": buffer for name, buffer in model.named_buffers()})
    for name, module in model.named_modules():
        computed = {f"{hook.name}" for hook in module._forward_pre_hooks.values() if hasattr(hook, "name")}
        for key, value in vars(module).items():
            if key in computed or isinstance(value, bool):
                continue
            if isinstance(value, torch.Generator):
                state[f"generator {name}.{key}"] = value.get_state()
            elif isinstance(value, (np.random.Generator, random.Random)):
                ahead = copy.deepcopy(value)
                state[f"generator {name}.{key}"] = torch.tensor([float(ahead.random()) for _ in range(4)])
            elif isinstance(value, (int, float, Tensor)):
                state[f"attribute {name}.{key}"] = torch.as_tensor(value)
    numbers = random_state()
    state["random numbers of torch"] = numbers[0]
    state["random numbers of numpy"] = torch.cat([torch.from_numpy(numbers[1][1].astype(np.int64)), torch.tensor([numbers[1][2]])])
    state["random numbers of random"] = torch.tensor(numbers[2][1])
    return {name: value.detach().clone() for name, value in state.items()}
