"""Which coordinates are moved: the parameters of normalization layers, or a share of all coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradreg.masks import Sparse
from gradreg.torch.draws import chosen
from gradreg.torch.memory import Memory
from gradreg.torch.parallel import local_shards, reducing_groups

KIND = "mask"
"""What a Fisher mask is called in the memory."""


def in_norm_layers(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of modules whose class is named a norm: BatchNorm2d, LayerNorm, GroupNorm, LlamaRMSNorm."""
    return {p for module in model.modules() if "norm" in type(module).__name__.lower() for p in module.parameters(recurse=False)}


class SparseMask:
    """The choice of a ``Sparse`` mask, refreshed every n steps.

    Args:
        mask: the specification.
        memory: holds a Fisher mask, so that it outlives an interruption.
        places: the place of each parameter in the model, for the random choice.
    """

    def __init__(self, mask: Sparse, memory: Memory, places: Mapping[nn.Parameter, int]) -> None:
        self._mask = mask
        self._memory = memory
        self._places = places
        self._chosen: dict[nn.Parameter, Tensor] = {}
        self._drawn_in: int | None = None

    def looks_at_gradients(self, step: int) -> bool:
        """Whether gradients decide what is moved at ``step``."""
        return self._mask.choice == "fisher" and self._memory.period != self._period(step)

    @torch.no_grad()
    def at(self, step: int, parameters: Sequence[nn.Parameter], gradients: Mapping[nn.Parameter, Tensor]) -> list[Tensor]:
        """Whether each coordinate of ``parameters`` is moved at ``step``; ``gradients``, this rank's shards, decide where they must."""
        if self._mask.choice == "random":
            self._draw(self._period(step), parameters)
        elif self.looks_at_gradients(step):
            among, shards = list(gradients), list(gradients.values())
            masks = largest(1.0 - self._mask.sparsity, shards, among)
            self._memory.propose(KIND, among, masks, evidence=shards, period=self._period(step))
            self._chosen = dict(zip(among, masks, strict=True))
        else:
            self._chosen = dict(zip(parameters, self._memory.shards(KIND, parameters), strict=True))
        return self.again(parameters)

    def again(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The same choice, for another move of the same step; of a parameter that had no gradient when it was made, nothing."""
        here = local_shards(parameters)
        return [
            self._chosen[p] if p in self._chosen else torch.zeros_like(shard, dtype=torch.bool)
            for p, shard in zip(parameters, here, strict=True)
        ]

    def _period(self, step: int) -> int:
        return step // self._mask.every

    def _draw(self, period: int, parameters: Sequence[nn.Parameter]) -> None:
        if period != self._drawn_in:
            self._chosen, self._drawn_in = {}, period
        missing = [p for p in parameters if p not in self._chosen]
        fresh = chosen(1.0 - self._mask.sparsity, self._mask.seed, period, [(self._places[p], p) for p in missing])
        self._chosen.update(zip(missing, fresh, strict=True))


def largest(share: float, gradients: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Whether each element is among the ``share`` of largest magnitude of all together; ties with the smallest of these are too.

    The bound is found bit by bit: non-negative floats are ordered as the integers with the same bits. 31 or 63 counts, whatever the size.
    """
    wide = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
    integer, highest = (torch.int64, 62) if wide == torch.float64 else (torch.int32, 30)
    device = gradients[0].device if gradients else torch.device("cpu")
    wanted = max(1, round(share * sum(p.numel() for p in like)))
    groups: list[tuple[tuple[Any, ...], Tensor]] = [
        (over, torch.cat([gradients[i].to(device, wide).abs().reshape(-1) for i in places]).view(integer))
        for over, places in reducing_groups(like)
    ]
    bound = torch.zeros((), dtype=integer, device=device)
    for bit in range(highest, -1, -1):
        candidate = bound | (1 << bit)
        count = torch.zeros((), dtype=torch.int64, device=device)
        for over, magnitudes in groups:
            own = (magnitudes >= candidate).sum()
            if over:
                from torch.distributed import all_reduce

                for group in over:
                    all_reduce(own, group=group)
            count = count + own
        bound = torch.where(count >= wanted, candidate, bound)
    smallest = bound.view(wide)
    return [g.to(wide).abs() >= smallest.to(g.device) for g in gradients]
