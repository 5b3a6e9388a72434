"""Flooding against the engine, and a run's account of itself against a naive one."""

import numpy as np
import pytest
import torch

from gradreg.theory.flooding import _Regression, simulate, two_steps


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rate", [0.1, 0.01])
def test_two_steps_of_flooding_are_one_of_fgr_or_bgr(seed, rate):
    found = two_steps(learning_rate=rate, seed=seed)
    assert found.forward_error <= 1e-12
    assert found.backward_error <= 1e-12
    assert found.moved > 1e-4  # what is compared is no zero


def test_the_identity_from_autograd_alone():
    """θ − η²ΔR_F by hand, on the network's own loss, so that the engine has an oracle here too."""
    network, rate = _Regression(16, 0), 0.1
    parameters = list(network.model.parameters())

    def gradient(at):
        network.set_weights(at)
        loss = torch.nn.functional.mse_loss(network.model(network.X), network.y)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    start = network.weights()
    g = gradient(start)
    by_hand = start - rate * (gradient(start + rate * g) - g)
    network.set_weights(start)
    up = start + rate * network.gradient()[1]
    network.set_weights(up)
    flooded = up - rate * network.gradient()[1]
    assert (flooded - by_hand).abs().max() <= 1e-12


def test_a_run_alternates_agrees_to_rounding_until_it_slips_and_lowers_the_gradient():
    run = simulate(level=0.2, learning_rate=0.1, pairs=300, seed=0)
    first = int(np.argmax(run.slips))
    assert 10 < first < 300
    assert run.distance[: first + 1].max() <= 1e-12
    assert run.moved[first] > 1e-2
    assert run.distance[first + 1] == pytest.approx(2 * 0.1 * run.gradient_norm[first], rel=0.02)  # two plain steps up
    assert run.distance_held[-1] < 0.1 * run.distance[-1]
    assert run.gradient_norm_explicit[-1] < run.gradient_norm_explicit[0]
    assert run.gradient_norm[-1] < run.gradient_norm[0]
    assert abs(run.loss - 0.2).max() < 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: two_steps(learning_rate=0.3), r"learning_rate must be small enough for a step up to raise the loss"),
        (lambda: two_steps(learning_rate=0.0), r"learning_rate must be finite and > 0"),
        (lambda: simulate(level=1e-3, approach=5), r"level must be reached by plain descent within approach=5 steps"),
        (lambda: simulate(level=-1.0), r"level must be finite and > 0"),
        (lambda: simulate(level=0.1, learning_rate=0.2, pairs=400), r"learning_rate must keep both paths finite.*take learning_rate=0.1"),
    ],
)
def test_bad_settings_are_refused_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()
