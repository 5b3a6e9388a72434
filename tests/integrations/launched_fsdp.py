"""A program for ``accelerate launch`` with two processes: FSDP2 by Accelerate, regularized steps, and the weights written to a file.

accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 ... launched_fsdp.py FILE
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradreg
from gradreg.torch import GradientRegularizer

STEPS = 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 10))


def batch(i: int) -> tuple[Tensor, Tensor]:
    """Drawn, because to import a package that has data takes a process longer than to train."""
    draws = torch.Generator().manual_seed(i)
    return torch.randn(64, 64, generator=draws), torch.randint(10, (64,), generator=draws)


def main(file: str) -> None:
    accelerator = Accelerator(cpu=True)
    # Accelerate takes FSDP up for accelerators only; what follows is its own code for FSDP2, on the CPU and gloo.
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # from what the launcher was told
    assert accelerator.is_fsdp2
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    assert all(type(p).__name__ == "DTensor" for p in model.parameters())
    regularizer = GradientRegularizer(model, gradreg.sam(rho=0.2), scope="global")
    rank = accelerator.process_index
    for step in range(STEPS):
        x, y = batch(2 * step + rank)
        regularizer.backward(lambda x=x, y=y: cross_entropy(model(x), y), backward=accelerator.backward)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    whole = {name: p.full_tensor().detach() for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    if accelerator.is_main_process:
        torch.save({"weights": whole, "evaluations": regularizer.metrics.evaluations}, file)


if __name__ == "__main__":
    main(sys.argv[1])
