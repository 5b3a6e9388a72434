"""Signs and choices are those of the hash, one coordinate after the other, whatever the shape, dtype and size."""

import pytest
import torch
from torch import Tensor

from gradreg.hashing import hashed
from gradreg.torch.draws import chosen, signs

from . import twins

SHAPES = [(), (0, 4), (32,), (7, 5, 3), (11, 13)]
SEEDS = [0, 2**32 - 1]


def tensors() -> list[tuple[int, Tensor]]:
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    return [(3 * i, torch.zeros(shape, dtype=dtypes[i % 3])) for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("seed", SEEDS)
def test_signs(seed: int) -> None:
    for (place, p), drawn in zip(tensors(), signs(seed, 5, tensors()), strict=True):
        assert drawn.dtype == p.dtype
        assert torch.equal(drawn.double(), twins.draw_signs(seed, 5, place, p.numel()).view_as(p))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("share", [1e-12, 0.3, 0.5, 0.9, 1.0])
def test_choices(seed: int, share: float) -> None:
    for (place, p), drawn in zip(tensors(), chosen(share, seed, 5, tensors()), strict=True):
        assert torch.equal(drawn, twins.draw(seed, 5, place, p.numel()).view_as(p) < share * 2**32)


def test_choices_among_more_than_are_hashed_at_a_time() -> None:
    size = 300_001
    (drawn,) = chosen(0.25, 4, 5, [(6, torch.zeros(size))])
    assert torch.equal(drawn, hashed(hashed(hashed(4, 5), 6), torch.arange(size)) < 2**30)
    assert float(drawn.double().mean()) == pytest.approx(0.25, abs=0.003)


def test_signs_of_neighbours_parameters_and_steps_are_independent() -> None:
    size = 100_000
    parameters = [(place, torch.zeros(size, dtype=torch.float64)) for place in range(2)]
    drawn = [s for step in range(2) for s in signs(0, step, parameters)]
    others = [*drawn[1:], *(drawn[0].roll(shift) for shift in (1, 2, 31, 32))]
    assert abs(float(drawn[0].mean())) < 4 / size**0.5  # standard deviations
    assert all(abs(float(drawn[0] @ other)) / size < 4 / size**0.5 for other in others)
