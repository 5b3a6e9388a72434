"""Adapters for training frameworks: one file each, which imports its framework and no other.

``closure`` (anything that calls ``optimizer.step(closure)``), ``transformers`` (``Trainer``), ``trl`` (SFT, DPO, KTO, Reward, RLOO,
GRPO), ``lightning``, ``timm``, ``peft`` (Bi-LoRA). Accelerate needs none: ``docs/integrations.md`` has its loop.
"""
