"""Shake-Shake and ShakeDrop: the published rules, the same noise in every pass of a regularized step, float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gradreg
from gradreg.torch import GradientRegularizer
from gradreg.train.models.pyramidnet import PyramidNet
from gradreg.train.models.shake import ShakeDrop, linear_decay, shake_shake
from gradreg.train.models.shake_shake import ShakeShake

NETWORKS = {
    "shakedrop, basic": lambda: PyramidNet(depth=8, alpha=6, shake_drop=0.5),
    "shakedrop, bottleneck": lambda: PyramidNet(depth=11, alpha=6, bottleneck=True, shake_drop=0.5),
    "shake-shake": lambda: ShakeShake(depth=8, channels=4),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=generator), torch.randint(0, 10, (6,), generator=generator)


def branch(count: int) -> torch.Tensor:
    return torch.ones(count, 1, 1, 1, dtype=torch.float64, requires_grad=True)


def test_shake_shake_mixes_by_alpha_forwards_and_by_beta_backwards_for_each_image():
    torch.manual_seed(3)
    first, second = branch(20_000), branch(20_000)
    mixed = shake_shake(first, 3 * second, training=True)
    mixed.sum().backward()
    alpha, beta = (3 - mixed.detach().flatten()) / 2, first.grad.flatten()
    torch.testing.assert_close(second.grad.flatten(), 3 * (1 - beta))
    for drawn in (alpha, beta):  # uniform in [0, 1]
        assert 0 <= drawn.min() < 0.001 < 0.999 < drawn.max() <= 1
        assert drawn.mean().item() == pytest.approx(0.5, abs=0.01)
        assert drawn.var().item() == pytest.approx(1 / 12, abs=0.002)
    assert abs(torch.corrcoef(torch.stack([alpha, beta]))[0, 1].item()) < 0.03


def test_shake_shake_takes_the_mean_in_evaluation():
    first, second = branch(2), branch(2)
    mixed = shake_shake(first, 3 * second, training=False)
    mixed.sum().backward()
    assert mixed.flatten().tolist() == [2, 2]
    assert first.grad.flatten().tolist() == [0.5, 0.5]


def test_shakedrop_follows_its_rule_for_each_image():
    torch.manual_seed(3)
    x = branch(40_000)
    y = ShakeDrop(0.7).train()(x)
    y.sum().backward()
    forwards, backwards = y.detach().flatten(), x.grad.flatten()
    kept = forwards == 1
    assert kept.double().mean().item() == pytest.approx(0.7, abs=0.01)
    assert torch.equal(backwards[kept], torch.ones_like(backwards[kept]))
    alpha, beta = forwards[~kept], backwards[~kept]
    assert -1 <= alpha.min() < -0.99 < 0.99 < alpha.max() <= 1
    assert 0 <= beta.min() < 0.01 < 0.99 < beta.max() <= 1
    assert alpha.mean().item() == pytest.approx(0, abs=0.02)
    assert beta.mean().item() == pytest.approx(0.5, abs=0.01)
    assert abs(torch.corrcoef(torch.stack([alpha, beta]))[0, 1].item()) < 0.03
    assert forwards.mean().item() == pytest.approx(0.7, abs=0.01)  # E[b + α − bα] = p, the factor of evaluation


def test_shakedrop_scales_by_the_expectation_in_evaluation():
    x = branch(2)
    y = ShakeDrop(0.7).eval()(x)
    y.sum().backward()
    assert y.flatten().tolist() == x.grad.flatten().tolist() == [0.7, 0.7]


def test_the_keep_probability_falls_linearly_to_a_half():
    model = PyramidNet(depth=26, alpha=12, shake_drop=0.5)
    keeps = [module.keep for module in model.modules() if isinstance(module, ShakeDrop)]
    assert keeps == pytest.approx([1 - k / 24 for k in range(1, 13)])
    assert keeps[-1] == linear_decay(12, 12, 0.5) == 0.5
    assert "keep=0.9583" in repr(model)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_seed_fixes_the_noise_and_the_dtype_is_kept(name):
    model, (images, labels) = network(name), batch()
    seen = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        logits = model(images)
        model.zero_grad()
        cross_entropy(logits, labels).backward()
        seen.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(tensor.dtype is torch.float64 for tensor in seen[0])
    assert all(map(torch.equal, seen[0], seen[1]))
    assert not torch.equal(seen[0][0], seen[2][0])


@pytest.mark.parametrize("name", NETWORKS)
def test_all_passes_of_a_regularized_step_see_the_same_noise(name):
    """Against the rule (1 − c) g + c ∇L(θ + ε g), written out with one seed before each pass."""
    model, (images, labels) = network(name), batch()
    twin = copy.deepcopy(model)
    gamma, epsilon = 0.3, 0.2

    torch.manual_seed(9)
    GradientRegularizer(model, gradreg.fgr(gamma=gamma, epsilon=epsilon)).backward(lambda: cross_entropy(model(images), labels))

    parameters = list(twin.parameters())
    torch.manual_seed(9)
    first = torch.autograd.grad(cross_entropy(twin(images), labels), parameters)
    with torch.no_grad():
        torch._foreach_add_(parameters, first, alpha=epsilon)
    torch.manual_seed(9)
    second = torch.autograd.grad(cross_entropy(twin(images), labels), parameters)
    torch.manual_seed(10)
    other = torch.autograd.grad(cross_entropy(twin(images), labels), parameters)
    c = gamma / epsilon
    for parameter, g, h in zip(model.parameters(), first, second, strict=True):
        torch.testing.assert_close(parameter.grad, (1 - c) * g + c * h)
    assert any(not torch.allclose(h, o, rtol=0.1) for h, o in zip(second, other, strict=True))  # other noise would have shown


@pytest.mark.parametrize("name", NETWORKS)
def test_double_backprop_goes_through_with_the_same_noise(name):
    model, (images, labels) = network(name), batch()
    gradients = []
    for _ in range(2):
        torch.manual_seed(9)
        model.zero_grad()
        GradientRegularizer(model, gradreg.exact(gamma=0.1)).backward(lambda: cross_entropy(model(images), labels))
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *gradients))
    assert all(bool(g.isfinite().all()) for g in gradients[0])


def test_bfloat16_keeps_the_probability():
    torch.manual_seed(0)
    x = torch.ones(40_000, 1, 1, 1, dtype=torch.bfloat16)
    y = ShakeDrop(0.999).train()(x)
    assert y.dtype is torch.bfloat16
    assert 0 < (y != 1).double().mean().item() < 0.003


@pytest.mark.parametrize("keep", [0, -0.5, 1.5])
def test_keep_is_a_probability(keep):
    with pytest.raises(ValueError, match=r"keep must be"):
        ShakeDrop(keep)
