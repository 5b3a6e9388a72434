"""The network's flow against autograd's kernel and the theorem, and the theorem's numbers."""

import numpy as np
import pytest
import torch

from gradreg.theory.kernel_decay import _Network, simulate


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_outputs_kernel_and_gradient_are_autograds(depth):
    random = np.random.default_rng(0)
    X, y = random.standard_normal((5, 4)), random.standard_normal(5)
    network = _Network(X, 7, depth, random)
    weights = [torch.tensor(w, requires_grad=True) for w in network.weights]
    h = torch.tensor(X)
    for i, w in enumerate(weights):
        gain = 1.0 if i == 0 else 2.0
        h = (h if i == 0 else torch.relu(h)) @ w * (gain / w.shape[0]) ** 0.5
    f = h[:, 0]
    jacobian = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(o, weights, retain_graph=True)]) for o in f])
    outputs, kernel = network.outputs_and_kernel()
    np.testing.assert_allclose(outputs, f.detach(), rtol=1e-12)
    np.testing.assert_allclose(kernel, (jacobian @ jacobian.T).detach(), rtol=1e-12)
    loss = ((f - torch.tensor(y)) ** 2).sum() / 2 + 0.3 / 2 * sum((w**2).sum() for w in weights)
    for mine, theirs in zip(network.gradient(network.weights, y, 0.3), torch.autograd.grad(loss, weights), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-12)


def test_the_theorem_holds_within_one_percent_at_width_4096():
    for seed in range(2):
        run = simulate(2, 4096, 0.1, end_time=7.5, points=3, seed=seed)
        assert run.predicted[-1] == pytest.approx(np.exp(-1.5))
        assert run.deviation[-1] < 0.01
        assert run.loss[-1] == pytest.approx(run.loss_predicted[-1], rel=0.03)
        assert run.rotation[0].max() < 1e-5
        assert run.rotation[-1].mean() < 2.0


def test_the_deviation_and_the_rotation_shrink_with_width_and_the_loss_is_the_equations():
    means = []
    for width in (64, 512, 4096):
        runs = [simulate(2, width, 0.1, end_time=7.5, points=2, seed=s) for s in range(4)]
        loss = [abs(r.loss[-1] / r.loss_predicted[-1] - 1) for r in runs]
        means.append((np.mean([r.deviation[-1] for r in runs]), np.mean([r.rotation[-1] for r in runs]), np.mean(loss)))
    assert (np.diff(means, axis=0)[:, :2] < 0).all()
    assert means[0][2] > 0.1 > 0.02 > means[2][2]


def test_three_layers_decay_twice_as_fast():
    run = simulate(3, 512, 0.1, end_time=3.96, points=2, seed=0)
    assert run.predicted[-1] == pytest.approx(np.exp(-4 * 0.1 * 3.96))
    assert run.deviation[-1] < 0.06


def test_without_l2_the_wide_kernel_stays():
    run = simulate(2, 2048, 0.0, end_time=3.0, points=2, seed=0)
    assert run.predicted[-1] == 1.0
    assert run.deviation[-1] < 0.05


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"depth": 1}, r"depth must be >= 2; got 1"),
        ({"width": 0}, r"width must be >= 1"),
        ({"l2": -0.1}, r"l2 must be finite and >= 0"),
        ({"points": 1}, r"points must be >= 2"),
        ({"step": 5.0, "end_time": 200.0}, r"step must be small enough for the flow to stay finite; got 5\. Take step=1.25"),
    ],
)
def test_bad_settings_are_refused_in_words(changed, message):
    with pytest.raises(ValueError, match=message):
        simulate(**{**{"depth": 2, "width": 16, "l2": 0.1}, **changed})
