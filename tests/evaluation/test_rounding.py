"""Rounding to nearest against a loop over groups, and weights that are bit for bit what they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradreg.evaluation import loss, round_to_nearest, rounded, rounded_loss


def by_hand(weight: np.ndarray, bits: int, group: int) -> np.ndarray:
    """One weight after the other, in the precision of ``weight``: the nearest of the values s·(q − z), q = 0 … 2^bits − 1."""
    kind, levels = weight.dtype.type, 2**bits - 1
    found = np.empty_like(weight)
    for i, row in enumerate(weight.reshape(len(weight), -1)):
        for start in range(0, len(row), group):
            members = row[start : start + group]
            low, high = min(members.min(), kind(0)), max(members.max(), kind(0))
            scale = kind(high - low) / kind(levels) or kind(1)
            zero = np.round(-low / scale)
            values = [kind(q - zero) * scale for q in range(levels + 1)]
            found.reshape(len(weight), -1)[i, start : start + group] = [min(values, key=lambda v: abs(v - w)) for w in members]
    return found


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 150), st.integers(2, 8), st.integers(1, 70), st.floats(-2, 2))
def test_it_is_the_nearest_value_of_each_group(seed, rows, columns, bits, group, middle):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + middle
    found = round_to_nearest(weight, bits=bits, group=group)
    assert torch.allclose(found, torch.from_numpy(by_hand(weight.numpy(), bits, group)), rtol=1e-12, atol=1e-12)
    again = round_to_nearest(found, bits=bits, group=group)
    assert torch.allclose(again, found, rtol=1e-9, atol=1e-12), "the grid's own values stay"
    for part, values in zip(weight.split(group, dim=1), found.split(group, dim=1), strict=True):
        span = part.clamp(min=0).amax(1) - part.clamp(max=0).amin(1)
        assert ((part - values).abs().amax(1) <= span / (2**bits - 1) * (0.5 + 1e-9)).all()
        assert all(len(row.unique()) <= 2**bits for row in values)


def test_zeros_dimensions_behind_the_first_and_16_bits():
    weight = torch.randn(4, 3, 2, 2)
    weight[1] = 0
    found = round_to_nearest(weight)
    assert torch.equal(found[1], torch.zeros(3, 2, 2))
    assert torch.equal(found, round_to_nearest(weight.flatten(1)).reshape(4, 3, 2, 2))
    half = round_to_nearest(weight.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, round_to_nearest(weight.bfloat16().float()).bfloat16())
    assert round_to_nearest(torch.zeros(3, 0)).shape == (3, 0)


class Language(nn.Module):
    """An embedding that is the output head too, a matrix, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.mix(self.embedding(ids))))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_the_weights_are_bit_for_bit_what_they_were(kind):
    torch.manual_seed(0)
    model = Language().to(kind)
    with torch.no_grad():
        model.mix.weight[0, :3] = torch.tensor([float("nan"), -0.0, 1e-40], dtype=kind)
    bits = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}[kind]
    before = {name: p.detach().clone().view(bits) for name, p in model.named_parameters()}
    with rounded(model) as names:
        assert names == ["mix.weight"]
        assert not torch.equal(model.mix.weight.detach().view(bits), before["mix.weight"])
    with rounded(model, parameters=lambda name, p: True) as names:
        assert names == ["embedding.weight", "mix.weight"], "vectors never"
    with pytest.raises(ZeroDivisionError, match="division"), rounded(model, parameters=lambda name, p: True):
        1 / 0  # noqa: B018
    assert all(torch.equal(p.detach().view(bits), before[name]) for name, p in model.named_parameters())


def test_the_loss_is_that_of_a_model_with_rounded_weights():
    torch.manual_seed(0)
    model, ids = Language(), torch.arange(7)

    def closure(model: nn.Module = model) -> torch.Tensor:
        return nn.functional.cross_entropy(model(ids), ids.flip(0))

    by_itself = Language()
    by_itself.load_state_dict({**model.state_dict(), "mix.weight": round_to_nearest(model.mix.weight, bits=3, group=4)})
    found = rounded_loss(model, closure, bits=3, group=4)
    assert found == loss(by_itself, lambda: closure(by_itself))
    assert found != loss(model, closure)
    assert rounded_loss(model, closure, bits=8) == pytest.approx(loss(model, closure), abs=0.01)


def test_casts_of_autocast_are_made_again():
    torch.manual_seed(0)
    model, x = nn.Linear(64, 1, bias=False), torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x)  # which leaves a cast of the weight behind
        with rounded(model, bits=2):
            within = model(x)
        after = model(x)
    assert torch.equal(plain, after)
    assert not torch.equal(plain, within)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"bits": 1}, ValueError, "bits must be >= 2; got 1"),
        ({"bits": 9}, ValueError, "bits must be a whole number from 2 to 8; got 9"),
        ({"group": 0}, ValueError, "group must be >= 1; got 0"),
        ({"parameters": lambda name, p: False}, ValueError, "must select at least one of the 2 real parameters"),
    ],
)
def test_bad_input(options, error, words):
    model = Language()
    with pytest.raises(error, match=words), rounded(model, **options):
        pass


def test_vectors_and_whole_numbers_are_not_rounded():
    with pytest.raises(TypeError, match=r"two or more dimensions; got torch.float32 of shape \(3,\)"):
        round_to_nearest(torch.zeros(3))
    with pytest.raises(TypeError, match=r"real tensor .*got torch.int8"):
        round_to_nearest(torch.zeros(3, 3, dtype=torch.int8))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"), rounded(nn.Linear(1, 1).weight):
        pass
