"""Parameters that only one pass of a step reaches, as a router that sends the moved parameters elsewhere leaves them."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gradreg import GradientPenalty
from gradreg.torch import GradientRegularizer

from . import twins
from .cases import PENALTIES, assert_close, values


class Routed(nn.Module):
    """One of two experts is used, by the sign of a gate that every penalty's first move turns over."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor([-1e-6], dtype=torch.float64))
        self.before = nn.Parameter(torch.tensor([1.5, -0.5], dtype=torch.float64))
        self.after = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))


def routed_loss(theta: Mapping[str, Tensor]) -> Tensor:
    used = theta["before"] if theta["gate"] < 0 else theta["after"]
    return (theta["gate"] + 1.0).square().sum() + used.pow(4).sum()


ROUTED = {name: PENALTIES[name] for name in ("sam", "gnp", "gnp-unit", "gsam", "gap-central", "wsam-decoupled", "looksam")}
ROUTED["wsam-decoupled, c 1"] = replace(PENALTIES["sam"], decoupled=True)


@pytest.mark.parametrize("penalty", ROUTED.values(), ids=ROUTED)
def test_what_a_pass_does_not_reach_has_a_gradient_of_zero_there(penalty: GradientPenalty) -> None:
    """Against the twin, whose gradients are whole; so are LookSAM's part to be reused and what a decoupled step leaves."""
    model, memory, gates = Routed(), twins.Remembered(), []
    theta = twins.parameters_of(model)
    regularizer, optimizer = GradientRegularizer(model, penalty), torch.optim.SGD(model.parameters(), lr=1.0)

    def closure() -> Tensor:
        gates.append(float(model.gate.detach()))
        return routed_loss(dict(model.named_parameters()))

    regularizer.backward(closure)
    assert min(gates) < 0 < max(gates)
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert_close(found, twins.family(penalty, routed_loss, theta, memory=memory))
    if penalty.reuse is not None:
        assert_close(regularizer.state_dict()["memory"]["reused"], memory.reused)
    if penalty.decoupled:
        regularizer.decoupled_step(optimizer)
        coupled = twins.family(replace(penalty, decoupled=False), routed_loss, theta)
        assert_close(values(model), twins.plus(twins.plus(theta, 1.0, found), -1.0, coupled))
