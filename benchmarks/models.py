"""The three models that step costs are compared on: where matrix products, attention, and convolutions with BatchNorm dominate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """A model and the batch that it is trained on."""

    description: str
    build: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    classes: int = 10

    def batch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.inputs, device=device)
        return x, torch.randint(self.classes, self.inputs[:1], device=device)


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def _vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=6, num_classes=10)


def _resnet() -> nn.Module:
    return timm.create_model("resnet10t", num_classes=10)


WORKLOADS = {
    "mlp": Workload("MLP 3072-512-512-512-10, batch 128", _mlp, (128, 3072)),
    "vit": Workload("ViT-Ti/4, 6 blocks, 32 px, batch 32", _vit, (32, 3, 32, 32)),
    "resnet": Workload("ResNet-10t, 32 px, batch 64", _resnet, (64, 3, 32, 32)),
}
