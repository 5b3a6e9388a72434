"""TRL's SFT and GRPO trainers with a gradient penalty: F-GR in place of the KL penalty against reward hacking.

Source: arXiv 2602.18037. Its setting, for a model of any size::

    trainer = RegularizedGRPOTrainer(
        model, reward, args=GRPOConfig(..., beta=0.0), penalty=against_reward_hacking(), perturbed=without_embeddings(model)
    )

Both passes see the same completions, rewards, advantages and old log-probabilities, and one perturbation is made at the end of an accumulation.
"""

from __future__ import annotations

from trl import GRPOTrainer, SFTTrainer

from gradreg.integrations.transformers import RegularizedTrainerMixin, without_embeddings
from gradreg.penalties import GradientPenalty, fgr

__all__ = ["RegularizedGRPOTrainer", "RegularizedSFTTrainer", "against_reward_hacking", "without_embeddings"]


def against_reward_hacking(*, gamma: float = 1e-2, epsilon: float = 1e-3) -> GradientPenalty:
    """F-GR with the strength and the step of arXiv 2602.18037: ``G = g + γ/ε·(∇L(θ + ε·g) − g)``, here with γ/ε = 10.

    Keep the parameters in float32 (and compute in bf16 by ``bf16=True``): a step of 1e-3 vanishes in the rounding of bf16 weights.

    Differs from the paper: its code clips both gradients at norm 10; here ``max_grad_norm`` clips the regularized one.
    """
    return fgr(gamma=gamma, epsilon=epsilon)


class RegularizedSFTTrainer(RegularizedTrainerMixin, SFTTrainer):
    """``trl.SFTTrainer`` with the arguments of ``RegularizedTrainerMixin``: ``penalty``, ``perturbed`` and ``scope``."""


class RegularizedGRPOTrainer(RegularizedTrainerMixin, GRPOTrainer):
    """``trl.GRPOTrainer`` with the arguments of ``RegularizedTrainerMixin``: ``penalty``, ``perturbed`` and ``scope``."""
