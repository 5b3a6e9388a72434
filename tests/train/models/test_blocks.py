"""The blocks against what their papers draw: what a shortcut passes on when its branch is silenced."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, batch_norm, conv2d, relu

from gradreg.train.models import pyramidnet, shake_shake, wide_resnet


def silence(*layers: nn.Module) -> None:
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def picture(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_wide_resnet_projects_what_is_normalized_and_passes_the_rest_as_it_is():
    x = picture(4)
    block = wide_resnet.Block(4, 6, stride=2).double()
    silence(block.conv2)
    assert block.projection is not None
    activated = relu(batch_norm(x, None, None, training=True))
    torch.testing.assert_close(block(x), conv2d(activated, block.projection.weight, stride=2))
    block = wide_resnet.Block(4, 4, stride=1).double()
    silence(block.conv2)
    assert torch.equal(block(x), x)


def test_pyramidnet_pools_and_pads_with_zero_channels():
    x = picture(4)
    for bottleneck, outgoing in ((False, 5), (True, 20)):
        block = pyramidnet.Block(4, 5, stride=2, bottleneck=bottleneck, keep=None).double()
        silence(block.branch[-1])
        y = block(x)
        assert y.shape == (2, outgoing, 3, 3)
        assert torch.equal(y[:, :4], avg_pool2d(x, 2))
        assert not y[:, 4:].any()


def test_pyramidnet_ends_its_branch_without_relu_and_starts_without_one():
    kinds = [type(layer) for layer in pyramidnet.Block(4, 5, stride=1, bottleneck=True, keep=0.5).branch]
    norm, conv = nn.BatchNorm2d, nn.Conv2d
    assert kinds == [norm, conv, norm, nn.ReLU, conv, norm, nn.ReLU, conv, norm, pyramidnet.ShakeDrop]
    kinds = [type(layer) for layer in pyramidnet.Block(4, 5, stride=1, bottleneck=False, keep=None).branch]
    assert kinds == [norm, conv, norm, nn.ReLU, conv, norm]


def test_shake_shake_halves_on_two_ways_that_see_different_pixels():
    x = picture(1).abs()
    shortcut = shake_shake.Shortcut(1, 2, stride=2).double().eval()
    nn.init.ones_(shortcut.straight.weight)
    nn.init.ones_(shortcut.shifted.weight)
    shortcut.norm = nn.Identity()  # type: ignore[assignment]
    straight, shifted = shortcut(x).unbind(1)
    assert torch.equal(straight, x[:, 0, ::2, ::2])
    assert torch.equal(shifted[:, 1:, 1:], x[:, 0, 1:-1:2, 1:-1:2])  # one pixel down and to the right: zeros come in from above and left
    assert not shifted[:, 0].any()
    assert not shifted[:, :, 0].any()


def test_shake_shake_passes_its_input_as_it_is_where_shapes_agree():
    x = picture(4)
    block = shake_shake.Block(4, 4, stride=1).double()
    silence(block.first[-1], block.second[-1])
    assert torch.equal(block(x), x)
    assert isinstance(shake_shake.Block(4, 8, stride=1).shortcut, shake_shake.Shortcut)
