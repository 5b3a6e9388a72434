"""The calibration error and the likelihood against a loop over samples and bins, and by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradreg.evaluation import calibration


def by_hand(logits: list[list[float]], labels: list[int], bins: int) -> tuple[float, float]:
    """Error and likelihood, one sample after the other, in Python's floats."""
    members: dict[int, list[tuple[float, bool]]] = {}
    likelihood = 0.0
    for row, label in zip(logits, labels, strict=True):
        top = max(row)
        powers = [math.exp(value - top) for value in row]
        p = [power / math.fsum(powers) for power in powers]
        likelihood -= math.log(p[label])
        predicted = row.index(top)
        (number,) = [b for b in range(bins) if b / bins < p[predicted] <= (b + 1) / bins]
        members.setdefault(number, []).append((p[predicted], predicted == label))
    error = 0.0
    for found in members.values():
        confidence = sum(p for p, _ in found) / len(found)
        accuracy = sum(right for _, right in found) / len(found)
        error += len(found) / len(labels) * abs(accuracy - confidence)
    return error, likelihood / len(labels)


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 6), st.integers(1, 20), st.floats(0.1, 8.0))
def test_it_is_the_loop_over_samples(seed, samples, classes, bins, spread):
    draws = random.Random(seed)
    logits = [[draws.gauss(0, spread) for _ in range(classes)] for _ in range(samples)]
    labels = [draws.randrange(classes) for _ in range(samples)]
    found = calibration(logits, labels, bins=bins)
    error, likelihood = by_hand(logits, labels, bins)
    assert found.error == pytest.approx(error, abs=1e-12)
    assert found.nll == pytest.approx(likelihood, rel=1e-12)
    assert found.nll == pytest.approx(
        float(torch.nn.functional.cross_entropy(torch.tensor(logits).double(), torch.tensor(labels))), rel=1e-6
    )
    assert sum(b.samples for b in found.bins) == samples
    assert len(found.bins) == bins


def test_a_confident_classifier_that_guesses_and_one_that_knows():
    sure = [[50.0, 0.0], [50.0, 0.0], [0.0, 50.0], [0.0, 50.0]]
    assert calibration(sure, [0, 0, 1, 1]).error == pytest.approx(0.0, abs=1e-12)
    guessed = calibration(sure, [0, 1, 0, 1])
    assert (guessed.error, guessed.accuracy, guessed.confidence) == pytest.approx((0.5, 0.5, 1.0))
    assert guessed.nll == pytest.approx(25.0)


def test_errors_of_opposite_sign_cancel_within_a_bin_and_not_between_bins():
    logits = np.log([[0.7, 0.3], [0.9, 0.1]])
    assert calibration(logits, [0, 1], bins=1).error == pytest.approx(abs(0.5 - 0.8))
    assert calibration(logits, [0, 1], bins=10).error == pytest.approx((0.3 + 0.9) / 2)


def test_an_edge_belongs_to_the_bin_below_it():
    found = calibration([[0.0, 0.0], [0.0, 0.0]], [0, 1], bins=2)
    assert [b.samples for b in found.bins] == [2, 0]
    assert found.error == 0.0


def test_a_probability_of_zero_and_tensors_of_few_bits():
    logits = torch.tensor([[0.0, -math.inf], [1.0, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    found = calibration(logits, torch.tensor([0, 1]))
    assert found.nll == pytest.approx(math.log(2) / 2)
    assert calibration(logits, torch.tensor([1, 1])).nll == math.inf


@pytest.mark.parametrize(
    ("logits", "labels", "options", "error", "words"),
    [
        ([[0.0, 1.0]], [0, 1], {}, ValueError, r"logits must have the shape \[samples, classes\].*got \[1, 2\] and \[2\]"),
        ([0.0, 1.0], [0, 1], {}, ValueError, r"got \[2\] and \[2\]"),
        (np.zeros((0, 2)), np.zeros(0, int), {}, ValueError, r"with at least one; got \[0, 2\]"),
        ([[0.0, 1.0]], [0.0], {}, TypeError, r"labels must be whole numbers; got float64"),
        ([[0.0, 1.0]], [2], {}, ValueError, r"labels must lie between 0 and 1; got 2 to 2"),
        ([[0.0, 1.0]], [-100], {}, ValueError, r"got -100 to -100. Leave samples without a label"),
        ([[math.nan, 1.0]], [0], {}, ValueError, r"logits must be finite, or -inf"),
        ([[-math.inf, -math.inf]], [0], {}, ValueError, r"logits must be finite, or -inf"),
        ([[0.0, 1.0]], [0], {"bins": 0}, ValueError, r"bins must be >= 1; got 0"),
    ],
)
def test_bad_input(logits, labels, options, error, words):
    with pytest.raises(error, match=words):
        calibration(logits, labels, **options)
