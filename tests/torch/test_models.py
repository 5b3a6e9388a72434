"""Kinds of models: recomputed activations, channels last, shared weights, mostly frozen ones and adapters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradreg
from gradreg.torch import GradientRegularizer

from .cases import (
    DURING_WARMUP,
    PENALTIES,
    Problem,
    assert_close,
    assert_same_bits,
    each_trait,
    every_penalty,
    gradients,
    regularizer_at,
    values,
)


class Checkpointed(nn.Module):
    """A block with dropout, recomputed in the backward pass or not."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.recompute = recompute
        self.block = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)
        return self.head(hidden)


@every_penalty
def test_gradient_checkpointing(penalty: gradreg.GradientPenalty) -> None:
    found = []
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    for recompute in (False, True):
        model = Checkpointed(recompute).double()
        torch.manual_seed(4)
        regularizer_at(DURING_WARMUP, model, penalty).backward(Problem(model, x, y).closure())
        found.append(gradients(model))
    assert_close(found[1], found[0], tolerance=1e-12)


@every_penalty
def test_channels_last(penalty: gradreg.GradientPenalty) -> None:
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 2)).double()
        x, y = torch.randn(4, 3, 6, 6, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
        model, x = model.to(memory_format=memory_format), x.to(memory_format=memory_format)
        before = values(model)
        regularizer_at(DURING_WARMUP, model, penalty).backward(Problem(model, x, y).closure())
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert model[0].weight.is_contiguous(memory_format=memory_format)
        found.append({n: g.contiguous() for n, g in gradients(model).items()})
    assert_close(found[1], found[0], tolerance=1e-11)


class Tied(nn.Module):
    """Two uses of one matrix, under one name or, as functions of a copy, under two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4, bias=False).double()
        self.second = nn.Linear(4, 4, bias=False).double()
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@every_penalty
def test_shared_weights_are_moved_and_counted_once(penalty: gradreg.GradientPenalty) -> None:
    model, x = Tied(), torch.randn(6, 4, dtype=torch.float64)
    functional = nn.ParameterDict({"w": nn.Parameter(model.first.weight.detach().clone())})
    regularizer = regularizer_at(DURING_WARMUP, model, penalty)
    regularizer.backward(lambda: model(x).square().mean())
    twin = regularizer_at(DURING_WARMUP, functional, penalty)
    twin.backward(lambda: (torch.tanh(x @ functional["w"].T) @ functional["w"].T).square().mean())
    assert model.first.weight.grad is not None
    assert functional["w"].grad is not None
    torch.testing.assert_close(model.first.weight.grad, functional["w"].grad, rtol=1e-12, atol=1e-14)
    assert regularizer.metrics.gradient_norm == pytest.approx(twin.metrics.gradient_norm, rel=1e-12, nan_ok=True)


class LowRank(nn.Module):
    """A frozen layer and a trainable correction of rank 2, as in LoRA."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.base = nn.Linear(size, size).requires_grad_(False)
        self.down, self.up = nn.Linear(size, 2, bias=False), nn.Linear(2, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", [n for n, p in PENALTIES.items() if p.difference != "exact"])
def test_a_mostly_frozen_model_costs_memory_for_its_trainable_parameters_only(name: str) -> None:
    torch.manual_seed(0)
    model = LowRank(64)
    regularizer = regularizer_at(100, model, PENALTIES[name])
    x = torch.randn(4, 64)
    regularizer.backward(lambda: model(x).square().mean())
    copies = regularizer._perturbation._buffers
    assert sum(c.numel() for c in copies.values()) == 2 * 2 * 64
    assert all(p.requires_grad for p in copies)
    assert model.base.weight.grad is None


def test_peft_s_adapters_are_found_moved_and_put_back() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0", "2"], r=2))
    for n, p in model.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p)
    x = torch.randn(4, 8)
    before = values(model)
    plain = GradientRegularizer(model, None)
    plain.backward(lambda: model(x).square().mean())
    unregularized = gradients(model)
    model.zero_grad()
    GradientRegularizer(model, gradreg.sam(rho=0.5)).backward(lambda: model(x).square().mean())
    found = gradients(model)
    assert set(found) == {n for n in before if "lora_" in n}
    assert any(not torch.allclose(found[n], unregularized[n], rtol=0.01) for n in found)
    assert_same_bits(values(model), before)


@pytest.mark.parametrize("present", [False, True], ids=["no-gradient", "gradient-present"])
@each_trait
def test_sparse_gradients_of_an_embedding_are_those_of_a_dense_one(penalty: gradreg.GradientPenalty, present: bool) -> None:
    """With a row that is drawn twice and rows that are not drawn; over two steps, for what is remembered."""
    ends, cosines = [], []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Tanh(), nn.Linear(3, 2)).double()
        regularizer = regularizer_at(4, model, penalty, measure_cosine=True)
        still = torch.optim.SGD(model.parameters(), lr=0.0)
        for rows in ([0, 2, 2, 3], [1, 2, 4, 4]):
            model.zero_grad()
            for _ in range(2 if present else 1):
                regularizer.backward(lambda model=model, rows=rows: model(torch.tensor(rows)).square().sum())
                regularizer.decoupled_step(still)
        ends.append({n: g.to_dense() if g.is_sparse else g for n, g in gradients(model).items()})
        cosines.append(regularizer.metrics.cosine)
    assert_close(ends[1], ends[0])
    assert cosines[1] == pytest.approx(cosines[0], nan_ok=True)
