"""The loss that is left when the weights are stored in 4 bits: each group of them rounded to the nearest of 16 values, and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gradreg import checks
from gradreg.evaluation.losses import loss
from gradreg.torch.closures import Closure
from gradreg.torch.norms import is_sharded
from gradreg.torch.parallel import Parallelism

Selection: TypeAlias = Callable[[str, nn.Parameter], bool]
BITS, GROUP = 4, 64


@torch.no_grad()
def round_to_nearest(weight: Tensor, *, bits: int = BITS, group: int = GROUP) -> Tensor:
    """A weight as ``bits`` bits would store it: each group of neighbors in a row is rounded to the nearest of 2^bits evenly spaced values.

    With low = min(w, 0) and high = max(w, 0) of a group, levels = 2^bits − 1, scale s = (high − low)/levels, zero point z = round(−low/s)::

        q = clamp(round(w/s) + z, 0, levels)        w' = s·(q − z)

    so that 0 stays 0. A tie is rounded to the even number. The numbers are those of weights that are dequantized again: the scale is kept
    in float32 (float64 for weights in float64) and is not itself rounded. A row is what belongs to one output: all dimensions behind the
    first are one. A row's last group is smaller if ``group`` does not divide its length.

    Args:
        weight: [outputs, ...] of at least two dimensions, real numbers.
        bits: 2 to 8.
        group: neighbors that share a scale, ≥ 1.

    Returns:
        A new tensor of the shape and dtype of ``weight``.

    Source: round-to-nearest in asymmetric groups, with which GPTQ (Frantar 2023, arXiv 2210.17323) and AWQ (Lin 2024, arXiv 2306.00978)
    compare.

    >>> round_to_nearest(torch.tensor([[0.0, 1.0, 6.9, 15.0]]))
    tensor([[ 0.,  1.,  7., 15.]])
    """
    _check(bits, group)
    if weight.dim() < 2 or not weight.is_floating_point():
        raise TypeError(
            f"weight must be a real tensor of two or more dimensions; got {weight.dtype} of shape {tuple(weight.shape)}. Vectors (biases, "
            "norms) are not stored in few bits."
        )
    rows = weight.detach().flatten(1)
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    whole = wide.shape[1] // group * group
    parts = [wide[:, :whole].unflatten(1, (-1, group)), wide[:, whole:].unsqueeze(1)]
    done = [_rounded(part, 2**bits - 1).flatten(1) for part in parts if part.numel()]
    return torch.cat(done, dim=1).to(weight.dtype).reshape(weight.shape) if done else weight.detach().clone()


def _rounded(groups: Tensor, levels: int) -> Tensor:
    low = groups.amin(-1, keepdim=True).clamp(max=0.0)
    high = groups.amax(-1, keepdim=True).clamp(min=0.0)
    scale = (high - low) / levels
    scale = torch.where(scale > 0, scale, 1.0)  # a group of zeros stays one
    zero = torch.round(-low / scale)
    return (torch.clamp(torch.round(groups / scale) + zero, 0, levels) - zero) * scale


@contextmanager
def rounded(model: nn.Module, *, bits: int = BITS, group: int = GROUP, parameters: Selection | None = None) -> Iterator[list[str]]:
    """A context in which the model's weights are rounded by ``round_to_nearest``; at its end they are bit for bit what they were.

    ::

        with rounded(model) as names:
            ...  # evaluate it; do not train it

    Args:
        model: the module. Merge LoRA adapters into it first (``merge_and_unload``), because the merged weight is what is stored.
        bits: 2 to 8.
        group: neighbors that share a scale, ≥ 1.
        parameters: ``(name, parameter) -> bool``: what is rounded, of the parameters with two or more dimensions: by default those that
            no ``nn.Embedding`` has, nor shares with the output head. ``without_embeddings(model)`` leaves out a head of its own too.

    Yields:
        The names of the rounded parameters.

    Raises:
        ValueError: nothing to round, or a sharded parameter.

    Cost: one copy of the weights that are rounded.
    """
    _check(bits, group)
    chosen = _chosen(model, parameters)
    kept: list[tuple[nn.Parameter, Tensor]] = []
    drop_copies = Parallelism(model).drop_copies

    @torch.no_grad()
    def restore() -> None:
        for p, original in kept:
            p.copy_(original)
        drop_copies()

    try:
        try:
            with torch.no_grad():
                for p in chosen.values():
                    kept.append((p, p.detach().clone()))
                    p.copy_(round_to_nearest(p, bits=bits, group=group))
            drop_copies()
            yield list(chosen)
        finally:
            restore()
    except BaseException:
        restore()  # again, because an interrupt may have come during the first time
        raise


def rounded_loss(
    model: nn.Module,
    closure: Closure | Sequence[Closure],
    *,
    bits: int = BITS,
    group: int = GROUP,
    parameters: Selection | None = None,
    sizes: Sequence[int] | None = None,
    mode: str = "eval",
) -> float:
    """The loss of ``closure`` with the weights rounded: ``gradreg.evaluation.loss`` inside of ``gradreg.evaluation.rounded``.

    ::

        run.log(loss_in_4_bits=rounded_loss(model, closures))

    Args:
        model: as for ``rounded``; it is left bit for bit as it was.
        closure: as for ``loss``.
        bits: as for ``rounded``.
        group: as for ``rounded``.
        parameters: as for ``rounded``.
        sizes: as for ``loss``.
        mode: as for ``loss``.

    Cost: a forward pass of each closure, and a sweep over the weights.
    """
    with rounded(model, bits=bits, group=group, parameters=parameters):
        return loss(model, closure, sizes=sizes, mode=mode)


def _check(bits: Any, group: Any) -> None:
    if checks.whole("bits", bits, minimum=2, remedy="Leave it out for 4.") > 8:
        raise ValueError(f"bits must be a whole number from 2 to 8; got {bits}. More change the loss by less than its own rounding.")
    checks.whole("group", group, minimum=1, remedy="Leave it out for 64.")


def _chosen(model: nn.Module, parameters: Selection | None) -> dict[str, nn.Parameter]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {checks.describe(model)}. Pass the module that the closure evaluates.")
    embedded = {id(p) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for p in m.parameters(recurse=False)}
    matrices = {name: p for name, p in model.named_parameters() if p.dim() >= 2 and p.is_floating_point()}
    chosen = {name: p for name, p in matrices.items() if (parameters(name, p) if parameters is not None else id(p) not in embedded)}
    if not chosen:
        raise ValueError(
            f"parameters must select at least one of the {len(matrices)} real parameters with two or more dimensions; got none. Weights "
            "that are stored in few bits already are not rounded again."
        )
    sharded = next((name for name, p in chosen.items() if is_sharded(p)), None)
    if sharded is not None:
        raise ValueError(
            f"parameters must be whole on this process, because groups of neighbors are rounded; got the sharded {sharded!r}. Gather the "
            "model first: load its full state dict into one that is not sharded."
        )
    return chosen
