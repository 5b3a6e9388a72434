"""Buffers that a forward pass changes hold, after a step, what one plain forward pass leaves in them."""

import pytest
import torch
from torch import Tensor, nn

from gradreg import GradientPenalty

from .cases import (
    DURING_WARMUP,
    PENALTIES,
    Problem,
    assert_same_bits,
    each_finite_trait_unperturbed_first,
    each_trait_unperturbed_first,
    gradients,
    regularizer_at,
    values,
)


class CountingNorm(nn.Module):
    """A normalization layer of one's own that *replaces* its buffers, and keeps one that it never changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6, dtype=torch.float64))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("constant", torch.full((6,), 0.5, dtype=torch.float64))
        self.register_buffer("absent", None)
        self.scale = nn.Parameter(torch.ones(6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.calls = self.calls + 1
        return (x - x.mean(0)) * self.scale + self.constant


class Functional(nn.Module):
    """Batch statistics by the functional interface, without the counter that ``nn.BatchNorm1d`` has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.mean, self.variance, training=self.training)


LAYERS = {
    "batchnorm": lambda: nn.BatchNorm1d(6),
    "cumulative": lambda: nn.BatchNorm1d(6, momentum=None),  # type: ignore[arg-type]
    "replacing": CountingNorm,
    "functional": Functional,
    "instancenorm": lambda: nn.Sequential(nn.Unflatten(1, (3, 2)), nn.InstanceNorm1d(3, track_running_stats=True), nn.Flatten()),
}
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def problem_with(layer) -> Problem:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 6), layer(), nn.Tanh(), nn.Linear(6, 2)).double()
    return Problem(model, torch.randn(8, 3, dtype=torch.float64), 2 * torch.randn(8, 2, dtype=torch.float64))


@every_layer
@each_trait_unperturbed_first
def test_only_the_first_pass_changes_them(penalty: GradientPenalty, layer) -> None:
    problem, twin = problem_with(layer), problem_with(layer)
    before = values(twin.model)
    for _ in range(2):
        regularizer_at(DURING_WARMUP, problem.model, penalty).backward(problem.closure())
        twin.loss()
        assert_same_bits(values(problem.model), values(twin.model))
    assert any(not torch.equal(before[name], value) for name, value in values(twin.model).items())


@every_layer
@each_finite_trait_unperturbed_first
def test_every_pass_changes_them_on_request(penalty: GradientPenalty, layer) -> None:
    problem, twin = problem_with(layer), problem_with(layer)
    regularizer_at(100, problem.model, penalty, freeze_batch_statistics=False).backward(problem.closure())
    twin.loss()
    counters = [n for n, value in values(twin.model).items() if n.endswith(("num_batches_tracked", "calls")) and int(value) == 1]
    assert [int(values(problem.model)[n]) for n in counters] == [penalty.evaluations_at(100)] * len(counters)
    different = [n for n, value in values(twin.model).items() if not torch.equal(value, values(problem.model)[n])]
    assert different
    assert not any("constant" in n or "weight" in n for n in different)


def test_the_counter_of_batches_counts_steps() -> None:
    problem = problem_with(LAYERS["batchnorm"])
    regularizer = regularizer_at(0, problem.model, PENALTIES["cgr"])
    for _ in range(4):
        regularizer.backward(problem.closure())
    assert int(problem.model[1].num_batches_tracked) == 4  # type: ignore[index]


@every_layer
@each_finite_trait_unperturbed_first
def test_micro_batches_change_them_once_each(penalty: GradientPenalty, layer) -> None:
    problem, twin = problem_with(layer), problem_with(layer)
    halves = [slice(0, 4), slice(4, 8)]
    regularizer_at(DURING_WARMUP, problem.model, penalty).backward([problem.closure(rows) for rows in halves])
    for rows in halves:
        twin.loss(rows)
    assert_same_bits(values(problem.model), values(twin.model))


@pytest.mark.parametrize("name", ["sam", "exact"])
def test_buffers_keep_their_identity(name: str) -> None:
    """Layers and checkpoints that hold a buffer's tensor keep holding the right one."""
    problem = problem_with(LAYERS["batchnorm"])
    before = {n: (id(b), b.data_ptr()) for n, b in problem.model.named_buffers()}
    regularizer_at(0, problem.model, PENALTIES[name]).backward(problem.closure())
    assert {n: (id(b), b.data_ptr()) for n, b in problem.model.named_buffers()} == before


def test_evaluation_mode_leaves_them_alone() -> None:
    problem = problem_with(LAYERS["batchnorm"])
    problem.loss()
    problem.model.eval()
    before = values(problem.model)
    regularizer_at(0, problem.model, PENALTIES["sam"]).backward(problem.closure())
    assert_same_bits(values(problem.model), before)
    assert gradients(problem.model)
