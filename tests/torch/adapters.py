"""A small network of linear layers under low-rank adapters, with the attributes of PEFT's layers, and its loss written as a formula."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

SCALING = 0.5
X, Y = torch.linspace(-2, 2, 40, dtype=torch.float64).view(8, 5), torch.linspace(0, 1, 24, dtype=torch.float64).view(8, 3)


class Adapted(nn.Module):
    """``W·x + b + s·B·A·x``."""

    merged = False
    disable_adapters = False

    def __init__(self, base: nn.Module, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        inputs, outputs = base.weight.shape[1], base.weight.shape[0]  # type: ignore[union-attr]
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, rank, bias=False)})  # type: ignore[arg-type]
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, outputs, bias=False)})  # type: ignore[arg-type]
        self.active_adapters = ["default"]

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def get_delta_weight(self, name: str) -> Tensor:
        return SCALING * self.lora_B[name].weight @ self.lora_A[name].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + SCALING * self.lora_B["default"](self.lora_A["default"](x))


def network() -> nn.Sequential:
    """Two adapted layers and a trained bias-free head between which there is a frozen layer without an adapter."""
    torch.manual_seed(0)
    layers = (
        Adapted(nn.Linear(5, 7)),
        nn.Tanh(),
        nn.Linear(7, 6).requires_grad_(False),
        nn.Tanh(),
        Adapted(nn.Linear(6, 4)),
        nn.Linear(4, 3),
    )
    return nn.Sequential(*layers).double()


BASES = ("0.base_layer.weight", "4.base_layer.weight")


def formula(theta: Mapping[str, Tensor], noise: Mapping[str, Tensor], rows: slice = slice(None)) -> Tensor:
    """The loss of ``network()`` where ``noise`` is added to the merged weights."""
    h = X[rows]
    for i, act in ((0, torch.tanh), (4, lambda h: h)):
        merged = theta[f"{i}.base_layer.weight"] + SCALING * theta[f"{i}.lora_B.default.weight"] @ theta[f"{i}.lora_A.default.weight"]
        h = act(h @ (merged + noise.get(f"{i}.base_layer.weight", 0)).T + theta[f"{i}.base_layer.bias"])
        if i == 0:
            h = torch.tanh(h @ theta["2.weight"].T + theta["2.bias"])
    return (h @ theta["5.weight"].T + theta["5.bias"] - Y[rows]).square().mean()
