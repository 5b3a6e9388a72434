"""Shake regularization: noise on residual branches that differs between the forward and the backward pass.

All random numbers, those of the backward pass included, are drawn in the forward pass from the default generator of the input's device, one
of each per image. So replaying that generator, as ``gradreg.torch.GradientRegularizer`` does, gives every pass over a batch the same
noise, and ``torch.manual_seed`` fixes it.

By design the result is not the gradient of any loss. A penalty on its norm uses this noisy gradient in every pass. ``gradreg.exact``
(double backprop) would add noise again where it differentiates, and is not exact here, so prefer the finite differences. Differs from the
GNP reference (arXiv 2202.03599, its code), whose first pass, and only that, uses the forward numbers in its backward pass too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradreg import checks


class _Scale(torch.autograd.Function):
    """``x * forward_scale``, whose gradient is multiplied by ``backward_scale``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, forward_scale: Tensor, backward_scale: Tensor) -> Tensor:
        return x * forward_scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        return gradients[0] * scale, None, None


def shake_shake(first: Tensor, second: Tensor, training: bool) -> Tensor:
    """``α first + (1 − α) second`` in training, with β in place of α backwards; the mean of the two in evaluation.

    α and β are uniform in [0, 1], independent, for each image: "Shake-Shake-Image" in the paper.

    Args:
        first: output of one residual branch, (n, c, h, w).
        second: output of the other.
        training: whether to draw.

    Source: Gastaldi 2017, arXiv 1705.07485, equations 2 and 3.
    """
    if not training:
        return (first + second) / 2
    alpha, beta = _uniform(first), _uniform(first)
    return _apply(first, alpha, beta) + _apply(second, 1 - alpha, 1 - beta)


class ShakeDrop(nn.Module):
    """Scales a residual branch by b + α − bα in training, its gradient by b + β − bβ, and by the expectation p in evaluation.

    b is 1 with probability p (then the branch is unchanged), else 0; α is uniform in [−1, 1], β in [0, 1]. Each image has its own b, α
    and β; the paper's other levels (batch, channel, pixel) are not implemented.

    Args:
        keep: p, in (0, 1].

    Source: Yamada et al. 2019, arXiv 1802.02375, equation 6.
    """

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.keep: float = checks.positive("keep", keep)
        if self.keep > 1:
            raise ValueError(f"keep must be a probability, <= 1; got {checks.describe(keep)}.")

    def forward(self, branch: Tensor) -> Tensor:
        """The branch (n, c, h, w), scaled."""
        if not self.training:
            return branch * self.keep
        kept = _uniform(branch) < self.keep
        alpha, beta = 2 * _uniform(branch) - 1, _uniform(branch)
        return _apply(branch, torch.where(kept, 1, alpha), torch.where(kept, 1, beta))

    def extra_repr(self) -> str:
        """The keep probability, for ``print(model)``."""
        return f"keep={self.keep:.4g}"


def linear_decay(block: int, blocks: int, last: float) -> float:
    """The keep probability of ``block`` (1 to ``blocks``): 1 − (block / blocks)(1 − last).

    >>> linear_decay(1, 4, 0.5), linear_decay(4, 4, 0.5)
    (0.875, 0.5)
    """
    return 1 - block / blocks * (1 - last)


def _uniform(like: Tensor) -> Tensor:
    """A number for each image, in at least single precision, because bfloat16 would round a probability to multiples of 1/256."""
    return torch.rand(len(like), 1, 1, 1, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _apply(x: Tensor, forward_scale: Tensor, backward_scale: Tensor) -> Tensor:
    scaled: Any = _Scale.apply(x, forward_scale.to(x.dtype), backward_scale.to(x.dtype))
    return scaled
