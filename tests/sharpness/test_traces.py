"""Trace and density against whole Hessians: within their own stated errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gradreg import sharpness

from .cases import both_ways, every_case, known, mlp


@every_case
@both_ways
def test_the_trace_lies_within_its_standard_error(name: str, products: str) -> None:
    truth = known(name)
    found = sharpness.trace(truth.case.model, truth.case.closure(), samples=30, products=products)
    trace = float(truth.matrix.trace())
    assert abs(found.value - trace) < 3 * found.standard_error
    # And the error is what Hutchinson's estimator has: twice the squared off-diagonal entries, for vectors of signs.
    off = truth.matrix - torch.diag(torch.diag(truth.matrix))
    assert found.standard_error == pytest.approx(math.sqrt(2 * float(off.square().sum()) / 30), rel=0.5)
    assert sum(found.by_parameter.values()) == pytest.approx(found.value)
    assert list(found.by_parameter) == [n for n, _ in truth.case.model.named_parameters()]


def test_the_parts_of_the_trace_are_those_of_diagonal_blocks() -> None:
    truth = known("mlp")
    found = sharpness.trace(truth.case.model, truth.case.closure(), samples=200)
    first = 0
    for name, p in truth.case.model.named_parameters():
        block = float(torch.diag(truth.matrix)[first : first + p.numel()].sum())
        assert abs(found.by_parameter[name] - block) < 4 * found.by_parameter_errors[name]
        first += p.numel()


def test_a_single_sample_knows_no_error() -> None:
    case = mlp()
    assert math.isnan(sharpness.trace(case.model, case.closure(), samples=1).standard_error)
    assert math.isnan(sharpness.spectrum(case.model, case.closure(), samples=1, steps=4).moment(1)[1])


@every_case
def test_the_density_lies_within_its_standard_error(name: str) -> None:
    truth = known(name)
    found = sharpness.spectrum(truth.case.model, truth.case.closure(), samples=12, steps=25)
    values = truth.values.numpy()
    assert found.weights.sum(axis=1) == pytest.approx(np.ones(12))
    assert found.largest == pytest.approx(values[-1], rel=1e-3)
    for power in (1, 2, 3):
        mean, error = found.moment(power)
        assert abs(mean - np.mean(values**power)) < 3.5 * error
    width = (values[-1] - values[0]) / 25
    at = np.linspace(values[0], values[-1], 40)
    density, errors = found.density(at, width=width)
    z = (at[:, None] - values) / width
    smoothed = np.exp(-0.5 * z * z).mean(axis=1) / (width * np.sqrt(2 * np.pi))
    # Where the density is far below its peak the samples' errors are too small to be estimated from 12.
    assert (np.abs(density - smoothed) < 4 * errors + 2e-3 * smoothed.max()).all()
    assert np.trapezoid(found.density(found.grid(2000))[0], found.grid(2000)) == pytest.approx(1, abs=1e-3)


def test_the_share_of_negative_curvature() -> None:
    truth = known("mlp")
    found = sharpness.spectrum(truth.case.model, truth.case.closure(), samples=8, steps=100)
    scale = float(truth.values.abs().max())
    share, error = found.share_below(-0.05 * scale)
    assert abs(share - float((truth.values < -0.05 * scale).double().mean())) < 4 * error + 0.005


def test_gauss_newton_traces() -> None:
    case = mlp()
    trace = float(case.gauss_newton().trace())
    found = sharpness.trace(case.model, case.with_outputs(), samples=30, curvature="gauss-newton")
    assert abs(found.value - trace) < 3 * found.standard_error
    density = sharpness.spectrum(case.model, case.with_outputs(), samples=3, steps=20, curvature="gauss-newton")
    assert density.smallest > -1e-9
