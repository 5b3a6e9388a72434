"""Which parameters and coordinates are perturbed: those that are selected, and one function per mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from gradreg.masks import Mask, OnlyNorms, Sparse
from gradreg.penalties import GradientPenalty
from gradreg.registry import check_known
from gradreg.torch.draws import chosen
from gradreg.torch.norms import is_sharded, local_shards, reducing_groups
from gradreg.torch.state import MASK, State


def perturbed_parameters(
    model: nn.Module, penalty: GradientPenalty | None, parameters: Callable[[str, nn.Parameter], bool] | None
) -> dict[nn.Parameter, str]:
    """The parameters that are perturbed and counted in the norm, with their names: those that ``parameters`` and the mask select.

    Raises:
        ValueError: there are none, or two of them share memory.
        TypeError: a part of the penalty is not defined for one of them.
    """
    named = list(model.named_parameters())
    selected = {p: name for name, p in named if parameters is None or parameters(name, p)}
    if not selected:
        raise ValueError(
            f"parameters must select at least one of the model's {len(named)} parameters; got none. Their names look like {named[0][0]!r}."
        )
    mask = None if penalty is None else penalty.mask
    if mask is not None and mask.level == "parameters":
        kept = selected_parameters(mask, model, selected)
        selected = {p: name for p, name in selected.items() if p in kept}
    _check_real(penalty, selected)
    check_memory(selected)
    return selected


def _check_real(penalty: GradientPenalty | None, selected: dict[nn.Parameter, str]) -> None:
    """Raise for complex parameters where a part of the penalty is not defined for them."""
    names = [name for p, name in selected.items() if p.is_complex()]
    if penalty is None or not names:
        return
    for what, real in (
        (f"direction {penalty.direction}", penalty.direction.needs_real),
        (f"mask {penalty.mask}", penalty.mask is not None and penalty.mask.needs_gradient),
        ("difference='exact'", penalty.difference == "exact"),
    ):
        if real:
            raise TypeError(
                f"{what} cannot be used with complex parameters, of which it has no definition; got {names[0]!r}. Leave them out: "
                "parameters=lambda name, p: not p.is_complex(), or use gradreg.sam(rho=...)."
            )


def check_memory(selected: dict[nn.Parameter, str]) -> None:
    """Raise if two perturbed parameters lie in the same memory, which would be perturbed twice."""
    whole = [
        p
        for p in selected
        if p.requires_grad and p.layout is torch.strided and p.device.type != "meta" and not is_sharded(p) and p.is_contiguous()
    ]
    ordered = sorted(((p.data_ptr(), p) for p in whole if p.numel() > 0), key=itemgetter(0)) if len(whole) > 1 else []
    for (start, p), (following, q) in pairwise(ordered):
        if following < start + p.numel() * p.element_size():
            raise ValueError(
                f"parameters must each have memory of their own; got {selected[p]!r} and {selected[q]!r}, which share theirs. Tie layers "
                "by giving them the same torch.nn.Parameter object."
            )


@singledispatch
def selected_parameters(mask: Mask, model: nn.Module, among: Mapping[nn.Parameter, str]) -> set[nn.Parameter]:
    """The parameters that a mask of level "parameters" chooses from those ``among`` which it may, with their names.

    Raises:
        ValueError: it finds none.
    """
    raise TypeError(f"no function for {mask!r}")  # the regularizer has checked that there is one


@selected_parameters.register
def _(mask: OnlyNorms, model: nn.Module, among: Mapping[nn.Parameter, str]) -> set[nn.Parameter]:
    # BatchNorm2d, LayerNorm, GroupNorm, LlamaRMSNorm
    norms = {p for module in model.modules() if "norm" in type(module).__name__.lower() for p in module.parameters(recurse=False)}
    if not norms & among.keys():
        raise ValueError(
            "mask OnlyNorms must find parameters of normalization layers (modules whose class name contains 'Norm') among those "
            "selected; got none. Leave the mask out, or select parameters by name: parameters=lambda name, p: 'norm' in name."
        )
    return norms & among.keys()


@dataclass
class MaskInputs:
    """What coordinates are chosen from.

    Args:
        parameters: those to choose from; the masks are of this rank's shards.
        indices: the index of each in the model.
        refresh: how often the mask has been chosen before: the step divided by ``Mask.refresh_every``.
        gradients: of each, up to a common factor > 0, the same on all ranks; empty if the mask needs none.
    """

    parameters: Sequence[nn.Parameter]
    indices: Sequence[int]
    refresh: int
    gradients: list[Tensor]


@singledispatch
def coordinates(mask: Mask, inputs: MaskInputs) -> list[Tensor]:
    """Whether each coordinate is perturbed, for a mask of level "coordinates"."""
    raise TypeError(f"no function for {mask!r}")  # the regularizer has checked that there is one


@coordinates.register
def _(mask: Sparse, inputs: MaskInputs) -> list[Tensor]:
    share = 1.0 - mask.sparsity
    if mask.needs_gradient:
        return largest(share, inputs.gradients, inputs.parameters)
    return chosen(share, mask.seed, inputs.refresh, list(zip(inputs.indices, inputs.parameters, strict=True)))


def check_mask(mask: Any) -> None:
    """Raise a ``TypeError`` for a mask without a function here."""
    if mask is not None:
        check_known(mask, selected_parameters if mask.level == "parameters" else coordinates, engine="PyTorch")


class CoordinateMask:
    """The choice of a mask of level "coordinates", refreshed every n steps.

    Args:
        mask: the specification.
        state: holds a choice made from gradients, so that checkpoints contain it.
        indices: the index of each parameter in the model.
    """

    def __init__(self, mask: Mask, state: State, indices: Mapping[nn.Parameter, int]) -> None:
        self._mask = mask
        self._state = state
        self._indices = indices
        self._chosen: dict[nn.Parameter, Tensor] = {}
        self._drawn_at: int | None = None

    def needs_gradients(self, step: int) -> bool:
        """Whether ``step`` chooses the coordinates from gradients."""
        return self._mask.needs_gradient and self._state.period != self._refresh(step)

    @torch.no_grad()
    def at(self, step: int, parameters: Sequence[nn.Parameter], gradients: Mapping[nn.Parameter, Tensor]) -> list[Tensor]:
        """Whether each coordinate of ``parameters`` is perturbed at ``step``; chosen from ``gradients`` (shards) if the step needs them."""
        refresh = self._refresh(step)
        if self.needs_gradients(step):
            among, shards = list(gradients), list(gradients.values())
            masks = self._coordinates(among, refresh, shards)
            self._state.stage(MASK, among, masks, evidence=shards, period=refresh)
            self._chosen = dict(zip(among, masks, strict=True))
        elif self._mask.needs_gradient:
            self._chosen = dict(zip(parameters, self._state.shards(MASK, parameters), strict=True))
        else:
            if refresh != self._drawn_at:
                self._chosen, self._drawn_at = {}, refresh
            missing = [p for p in parameters if p not in self._chosen]
            if missing:
                self._chosen.update(zip(missing, self._coordinates(missing, refresh, []), strict=True))
        return self.again(parameters)

    def again(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The same choice, for another ascent step; all False for a parameter that had no gradient when it was made."""
        here = local_shards(parameters)
        return [
            self._chosen[p] if p in self._chosen else torch.zeros_like(shard, dtype=torch.bool)
            for p, shard in zip(parameters, here, strict=True)
        ]

    def _refresh(self, step: int) -> int:
        return step // self._mask.refresh_every

    def _coordinates(self, parameters: Sequence[nn.Parameter], refresh: int, gradients: list[Tensor]) -> list[Tensor]:
        return coordinates(self._mask, MaskInputs(parameters, [self._indices[p] for p in parameters], refresh, gradients))


def largest(share: float, gradients: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Whether each element is among the ``share`` of largest magnitude of all ``gradients`` together, ties included.

    ``like`` are the whole parameters: the share is of their elements, and ranks that hold shards count together.
    """
    # The smallest kept magnitude is found by bisection over its bits: non-negative floats have the same order as the integers with the
    # same bits, so setting one bit after the other from the highest needs 31 or 63 counts. Counts add up over ranks with one small
    # all-reduce each, where ``topk`` or a sort would need all gradients in one place; and no device sync is needed.
    wide = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
    integer, highest = (torch.int64, 62) if wide == torch.float64 else (torch.int32, 30)
    device = gradients[0].device if gradients else torch.device("cpu")
    wanted = max(1, round(share * sum(p.numel() for p in like)))
    groups: list[tuple[tuple[Any, ...], Tensor]] = [
        (over, torch.cat([gradients[i].to(device, wide).abs().reshape(-1) for i in indices]).view(integer))
        for over, indices in reducing_groups(like)
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
        bound = torch.where(count >= wanted, candidate, bound)  # keep the bit if enough elements remain at or above the bound with it
    smallest = bound.view(wide)
    return [g.to(wide).abs() >= smallest.to(g.device) for g in gradients]
