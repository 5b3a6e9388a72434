"""Dropout: all passes of a step see one mask, and the step leaves the generators where one plain forward pass leaves them."""

import random
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gradreg import GradientPenalty
from gradreg.torch import rng

from . import twins
from .cases import (
    DURING_WARMUP,
    PENALTIES,
    Problem,
    assert_close,
    every_finite_difference_unperturbed_first,
    every_penalty,
    every_penalty_that_takes_ascent,
    gradients,
    regularizer_at,
)


class DropoutNet(nn.Module):
    """Two layers with dropout between them; with ``mask`` set, that mask stands in place of a drawn one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)
        self.mask: Tensor | None = None
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        mask = nn.functional.dropout(torch.ones_like(hidden), 0.5) if self.mask is None else self.mask
        self.seen.append(mask)
        return self.second(hidden * mask)


def problem() -> Problem:
    torch.manual_seed(2)
    return Problem(DropoutNet().double(), torch.randn(8, 3, dtype=torch.float64), 2 * torch.randn(8, 2, dtype=torch.float64))


def drawn_masks(seed: int, shapes: list[tuple[int, int]]) -> list[Tensor]:
    torch.manual_seed(seed)
    return [nn.functional.dropout(torch.ones(shape, dtype=torch.float64), 0.5) for shape in shapes]


@every_penalty
def test_twin_with_a_fixed_mask(penalty: GradientPenalty) -> None:
    ours, fixed = problem(), problem()
    (fixed.model.mask,) = drawn_masks(7, [(8, 6)])
    expected = twins.family(penalty, twins.loss_of(fixed.model, fixed.x, fixed.y), twins.parameters_of(fixed.model), step=DURING_WARMUP)
    torch.manual_seed(7)
    regularizer_at(DURING_WARMUP, ours.model, penalty).backward(ours.closure())
    assert_close(gradients(ours.model), expected)


@every_penalty
def test_each_micro_batch_keeps_its_own_mask(penalty: GradientPenalty) -> None:
    ours = problem()
    first, second = drawn_masks(7, [(3, 6), (5, 6)])
    torch.manual_seed(7)
    halves = [ours.closure(slice(0, 3)), ours.closure(slice(3, 8))]
    regularizer_at(100, ours.model, penalty).backward(halves)
    seen = ours.model.seen
    assert len(seen) == 2 * (2 if penalty.difference == "exact" else penalty.evaluations_at(100))
    for i, mask in enumerate(seen):
        assert torch.equal(mask, (first, second)[i % 2])


@every_penalty_that_takes_ascent
def test_with_ascent_the_closure_has_one_mask_in_all_its_passes(penalty: GradientPenalty) -> None:
    ours = problem()
    (part,), (whole,) = drawn_masks(7, [(3, 6)]), drawn_masks(7, [(8, 6)])  # the two functions start alike
    torch.manual_seed(7)
    regularizer_at(100, ours.model, penalty).backward(ours.closure(), ascent=ours.closure(slice(0, 3)))
    of_part, of_whole = ([mask for mask in ours.model.seen if len(mask) == rows] for rows in (3, 8))
    assert len(of_part) == penalty.ascent_steps
    assert all(torch.equal(mask, part) for mask in of_part)
    assert of_whole
    assert all(torch.equal(mask, whole) for mask in of_whole)


@every_penalty
def test_generator_stands_where_one_forward_pass_leaves_it(penalty: GradientPenalty) -> None:
    ours, twin = problem(), problem()
    for step in range(DURING_WARMUP, DURING_WARMUP + 2):
        torch.manual_seed(step)
        twin.loss()
        expected = torch.get_rng_state()
        torch.manual_seed(step)
        regularizer_at(step, ours.model, penalty).backward(ours.closure())
        assert torch.equal(torch.get_rng_state(), expected)


@every_finite_difference_unperturbed_first
def test_afresh_on_request(penalty: GradientPenalty) -> None:
    ours = problem()
    passes = penalty.evaluations_at(100)
    expected = drawn_masks(7, [(8, 6)] * passes)
    torch.manual_seed(7)
    regularizer_at(100, ours.model, penalty, replay_rng=False).backward(ours.closure())
    assert len(ours.model.seen) == passes
    assert all(torch.equal(a, b) for a, b in zip(ours.model.seen, expected, strict=True))
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize("module", [lambda: nn.Dropout(0.5), lambda: nn.AlphaDropout(0.5), nn.RReLU], ids=["dropout", "alpha", "rrelu"])
def test_layers_that_draw(module: Callable[[], nn.Module]) -> None:
    """With strength = radius the result is the plain gradient at the moved parameters under the same draw."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 6), module(), nn.Linear(6, 2)).double()
    ours = Problem(model, torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64))

    def plain(seed: int) -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(seed)
        ours.loss().backward()
        return gradients(model)

    g = plain(9)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.add_(g[n], alpha=0.3 / float(twins.norm(g)))
    expected = plain(9)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(start[n])
    model.zero_grad()
    torch.manual_seed(9)
    regularizer_at(100, model, PENALTIES["sam"]).backward(ours.closure())
    assert_close(gradients(model), expected)


@pytest.mark.parametrize(
    ("words", "locked"), [(624, True), (600, True), (624, False)], ids=["where CPython holds them", "elsewhere", "beside other threads"]
)
@pytest.mark.parametrize(
    "draw",
    [random.random, lambda: random.gauss(0.0, 1.0), lambda: random.shuffle(list(range(1000))), lambda: random.seed(random.random())],
    ids=["number", "one of a pair", "many", "seed"],
)
def test_pythons_numbers_come_again(draw: Callable[[], object], words: int, locked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng._Python, "_WORDS", words)
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: locked, raising=False)
    sources = rng.RandomSources([])
    if sys.implementation.name == "cpython":
        assert (sources._python._memory is not None) == (words == 624 and locked)
    for _ in range(2):  # the second of a pair of normal numbers is held back, and drawn the second time
        before, captured = random.getstate(), sources.capture()
        draw()
        after = random.getstate()
        assert after != before
        sources.restore(captured)
        assert random.getstate() == before
        draw()
        assert random.getstate() == after


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_penalty
def test_generator_of_the_gpu(penalty: GradientPenalty) -> None:
    ours = problem()
    ours.model.cuda()
    ours.x, ours.y = ours.x.cuda(), ours.y.cuda()
    torch.cuda.manual_seed(7)
    ours.loss()
    expected = torch.cuda.get_rng_state()
    ours.model.seen.clear()
    torch.cuda.manual_seed(7)
    regularizer_at(100, ours.model, penalty).backward(ours.closure())
    assert torch.equal(torch.cuda.get_rng_state(), expected)
    assert all(torch.equal(mask, ours.model.seen[0]) for mask in ours.model.seen)
