"""TRL's SFT, DPO, KTO, Reward, RLOO and GRPO trainers with a gradient penalty: F-GR in place of the KL penalty against reward hacking.

Source: arXiv 2602.18037. Its setting, for a model of any size::

    trainer = RegularizedGRPOTrainer(
        model, reward, args=GRPOConfig(..., beta=0.0), penalty=against_reward_hacking(), parameters=without_embeddings(model)
    )

Both passes see the same completions, rewards, advantages and old log-probabilities, and one perturbation is made at the end of an
accumulation.
"""

from __future__ import annotations

from typing import Any

from gradreg.constructors import fgr
from gradreg.extras import needing
from gradreg.penalties import GradientPenalty

with needing("gradreg.integrations.trl", "trl"):
    from torch import Tensor
    from torch.utils.weak import WeakTensorKeyDictionary
    from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer

    from gradreg.integrations.transformers import RegularizedTrainerMixin, without_embeddings

__all__ = [
    "RegularizedDPOTrainer",
    "RegularizedGRPOTrainer",
    "RegularizedKTOTrainer",
    "RegularizedRLOOTrainer",
    "RegularizedRewardTrainer",
    "RegularizedSFTTrainer",
    "against_reward_hacking",
    "without_embeddings",
]


def against_reward_hacking(*, gamma: float = 1e-2, epsilon: float = 1e-3, clip: float | None = 10.0) -> GradientPenalty:
    """F-GR with the setting of arXiv 2602.18037: ``G = g + γ/ε·(∇L(θ + ε·g) − g)`` with both gradients clipped at norm 10; γ/ε = 10.

    Keep the parameters in float32 (and compute in bf16 by ``bf16=True``): a step of 1e-3 vanishes in the rounding of bf16 weights.

    Args:
        gamma: strength γ: 1e-2 for RLHF with a reward model, 1e-3 with a language model as judge.
        epsilon: step ε.
        clip: the norm at which both gradients are clipped; None for no limit, which saves the memory of one gradient.

    Source: Ackermann et al. 2026, arXiv 2602.18037, and its code (``grad_reg_strength``, ``grad_reg_eps``, ``grad_reg_g1_clip``,
    ``grad_reg_g2_clip``). With it go ``beta=0.0``, ``loss_type="grpo"``, ``scale_rewards="none"``, 8 generations, a learning rate of 5e-6,
    constant, no steps of generated text used twice, and embeddings and output head left out of the perturbation (``without_embeddings``).
    Differs from their code: see ``gradreg.Clipped`` and ``gradreg.ClipEach``; and ``max_grad_norm`` clips the result after them, in both.
    """
    return fgr(gamma=gamma, epsilon=epsilon, clip=clip)


class RegularizedSFTTrainer(RegularizedTrainerMixin, SFTTrainer):
    """``trl.SFTTrainer`` with the arguments of ``RegularizedTrainerMixin``: ``penalty``, ``parameters`` and ``scope``."""


class RegularizedDPOTrainer(RegularizedTrainerMixin, DPOTrainer):
    """``trl.DPOTrainer`` with the arguments of ``RegularizedTrainerMixin``: ``penalty``, ``parameters`` and ``scope``."""


class RegularizedKTOTrainer(RegularizedTrainerMixin, KTOTrainer):
    """``trl.KTOTrainer`` with the arguments of ``RegularizedTrainerMixin``: ``penalty``, ``parameters`` and ``scope``."""


class RegularizedRewardTrainer(RegularizedTrainerMixin, RewardTrainer):
    """``trl.RewardTrainer`` with the arguments of ``RegularizedTrainerMixin``: ``penalty``, ``parameters`` and ``scope``."""


class RegularizedRLOOTrainer(RegularizedTrainerMixin, RLOOTrainer):
    """``trl.RLOOTrainer`` with the arguments of ``RegularizedTrainerMixin``: ``penalty``, ``parameters`` and ``scope``.

    All passes share the completions, the rewards and the old policy, that of the time of generation.
    """


class RegularizedGRPOTrainer(RegularizedTrainerMixin, GRPOTrainer):
    """``trl.GRPOTrainer`` with the arguments of ``RegularizedTrainerMixin``: ``penalty``, ``parameters`` and ``scope``.

    On-policy, TRL uses the policy of each pass as the old one. Here the old policy is the first pass's in all passes, so that they
    evaluate the same loss.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._newest: Any = None
        self._old = WeakTensorKeyDictionary()
        super().__init__(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._newest = found[0]
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        completions = inputs["completion_ids"]
        if self.repeats_pass and inputs.get("old_per_token_logps") is None:
            inputs = {**inputs, "old_per_token_logps": self._old[completions]}
        loss = super()._compute_loss(model, inputs)
        if not self.repeats_pass:
            self._old[completions] = self._newest.detach()
        self._newest = None
        return loss
