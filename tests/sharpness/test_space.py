"""Vectors over the parameters: inner products of many elements in float32 on a CPU."""

import pytest
import torch
from torch import nn

from gradreg.sharpness.space import Space


def test_inner_products_of_many_elements_are_accurate() -> None:
    """One sum after another in float32, as a matrix product with one row makes it, is off by 2e-4."""
    space = Space({"a": nn.Parameter(torch.zeros(2048, 2047)), "b": nn.Parameter(torch.zeros(77))})
    vector = torch.randn(space.size, generator=torch.Generator().manual_seed(0))
    squares = vector.double().square()
    whole, first = float(squares.sum()), float(squares[: 2048 * 2047].sum())
    assert space.norm(vector) == pytest.approx(whole**0.5, rel=4e-6)
    assert space.dots(torch.stack([vector, -2 * vector]), vector).tolist() == pytest.approx([whole, -2 * whole], rel=4e-6)
    assert space.by_parameter(vector, vector) == pytest.approx({"a": first, "b": whole - first}, rel=4e-6)
    assert space.dots(vector.unsqueeze(0), vector).dtype == torch.float32
