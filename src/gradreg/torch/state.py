"""The state of a penalty between steps: tensors by kind and parameter, changed only when a step has succeeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradreg import checks
from gradreg.penalties import GradientPenalty
from gradreg.torch.norms import LOW_PRECISION, is_sharded, local_shards, norm_of_shards

AVERAGE = "average"
"""The average of gradients or of results that a direction needs."""
REUSED = "reused"
"""The part of the penalised gradient orthogonal to the plain one (``Reuse``)."""
MASK = "mask"
"""The coordinates that a mask chose from gradients."""
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""Where wrappers hold the module that they wrap."""


def remembered_kinds(penalty: GradientPenalty | None) -> dict[str, torch.dtype | None]:
    """The state of ``penalty`` for each parameter, and its dtype: None for that of the parameter, or float32 if that has 16 bits."""
    kinds: dict[str, torch.dtype | None] = {}
    if penalty is not None and penalty.direction.averages is not None:
        kinds[AVERAGE] = None
    if penalty is not None and penalty.reuse is not None:
        kinds[REUSED] = None
    if penalty is not None and penalty.mask is not None and penalty.mask.needs_gradient:
        kinds[MASK] = torch.bool
    return kinds


def own_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """The parameters of ``model`` and their names in it, without those of wrappers: ``torch.compile``, data parallelism, checkpointing."""
    found: dict[nn.Parameter, str] = {}
    for name, p in model.named_parameters():
        parts: list[str] = []
        module: nn.Module | None = model
        for part in name.split("."):
            parallel = isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)) and part == "module"
            if not parallel and part not in _WRAPPED:
                parts.append(part)
            module = None if module is None else dict(module._modules.items()).get(part)
        found[p] = ".".join(parts)
    return found if len(set(found.values())) == len(found) else {p: name for name, p in model.named_parameters()}


@dataclass(frozen=True)
class _Staged:
    kind: str
    parameters: Sequence[nn.Parameter]
    shards: Sequence[Tensor]
    evidence: Sequence[Tensor]
    period: int | None


class State:
    """Tensors like the parameters (sharded as they are), zero at first.

    Args:
        names: the parameters that may have state, and their names in a checkpoint.
        kinds: the kinds of state and their dtypes: None for the parameter's own, or float32 if that has 16 bits.
    """

    def __init__(self, names: Mapping[nn.Parameter, str], kinds: Mapping[str, torch.dtype | None]) -> None:
        self._names = dict(names)
        self._kinds = dict(kinds)
        self._tensors: dict[str, dict[nn.Parameter, Tensor]] = {kind: {} for kind in kinds}
        self._staged: list[_Staged] = []
        self.period: int | None = None
        """The number of the last refresh of a mask chosen from gradients; None before the first."""

    def shards(self, kind: str, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The state of ``parameters``: this rank's shards, read-only."""
        return local_shards([self._tensor(kind, p) for p in parameters])

    def stage(
        self,
        kind: str,
        parameters: Sequence[nn.Parameter],
        shards: Sequence[Tensor],
        *,
        evidence: Sequence[Tensor] | None = None,
        period: int | None = None,
    ) -> None:
        """Stage ``shards`` of ``parameters``, and ``period``, for ``commit``, if ``evidence`` (``shards`` by default) is finite.

        ``shards`` are not copied and must not be changed afterwards.
        """
        self._staged.append(_Staged(kind, parameters, shards, shards if evidence is None else evidence, period))

    def discard_staged(self) -> None:
        """Discard what a failed step staged."""
        self._staged = []

    @torch.no_grad()
    def commit(self, *, finite_only: bool) -> None:
        """Store what was staged; with ``finite_only``, which takes a device sync, only if it is finite."""
        for new in self._staged:
            if new.parameters and (not finite_only or _finite(new.evidence, new.parameters)):
                self._keep(new)
                self.period = self.period if new.period is None else new.period
        self._staged = []

    @torch.no_grad()
    def next_ema(
        self, kind: str, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], decay: float, factor: float | Tensor
    ) -> list[Tensor]:
        """``decay·m + (1 − decay)·factor·gradients``: new tensors, to be staged."""
        remembered = self.shards(kind, parameters)
        return list(torch._foreach_lerp(remembered, _comparable(gradients, remembered, factor), 1.0 - decay))

    @torch.no_grad()
    def update_ema(
        self,
        kind: str,
        parameters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor],
        decay: float,
        factor: float | Tensor,
        *,
        finite_only: bool,
    ) -> None:
        """``m ← decay·m + (1 − decay)·factor·gradients`` in place, once a step can no longer fail. ``finite_only``: see ``commit``."""
        if not parameters or (finite_only and not _finite(gradients, parameters)):
            return
        remembered = self.shards(kind, parameters)
        torch._foreach_lerp_(remembered, _comparable(gradients, remembered, factor), 1.0 - decay)

    def state_dict(self) -> dict[str, Any]:
        """The tensors by kind and parameter name, and ``period``; frozen parameters keep the state that they had."""
        tensors = {
            kind: {name: self._tensor(kind, p) for p, name in self._names.items() if p.requires_grad or p in held}
            for kind, held in self._tensors.items()
        }
        return {**tensors, "period": -1 if self.period is None else self.period}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned, zero for parameters that it lacks.

        Raises:
            ValueError: unknown kinds or names, or another shape; nothing is changed then.
        """
        kinds = [*self._kinds, "period"]
        if not isinstance(state, Mapping) or set(state) != set(kinds):  # type: ignore[unnecessary-isinstance]  # a checkpoint's
            got = sorted(state) if isinstance(state, Mapping) else checks.describe(state)  # type: ignore[unnecessary-isinstance]
            raise ValueError(f"memory must hold {' and '.join(kinds)}; got {got}. Pass what state_dict() returned.")
        period = checks.whole("period", state["period"], minimum=-1)
        named = {name: p for p, name in self._names.items()}
        state = {kind: _without_wrappers(value, named) if kind in self._kinds else value for kind, value in state.items()}
        for kind in self._kinds:
            for name, tensor in state[kind].items():
                if name not in named:
                    raise ValueError(checks.unknown(f"parameter in memory {kind!r}:", name, named))
                if tensor.shape != named[name].shape:
                    raise ValueError(
                        f"memory {kind!r} of {name!r} must have the shape {tuple(named[name].shape)}; got {tuple(tensor.shape)}. "
                        "Load the state of a regularizer for the same model."
                    )
        self.period = None if period < 0 else period
        for kind in self._kinds:
            for p, mine in self._tensors[kind].items():
                if self._names[p] not in state[kind]:
                    mine.zero_()
            for name, theirs in state[kind].items():
                mine = self._tensor(kind, named[name])
                if theirs is not mine:
                    mine.copy_(theirs)

    def _keep(self, new: _Staged) -> None:
        """Replace the old tensors by the staged ones, or copy into them where they are shards or have another dtype."""
        copied: list[tuple[Tensor, Tensor]] = []
        for p, shard in zip(new.parameters, new.shards, strict=True):
            mine = self._tensor(new.kind, p)
            if is_sharded(mine) or mine.dtype != shard.dtype or mine.device != shard.device:
                copied.append((mine, shard))
            else:
                self._tensors[new.kind][p] = shard
        if copied:
            torch._foreach_copy_(local_shards([mine for mine, _ in copied]), [shard for _, shard in copied])

    def _tensor(self, kind: str, p: nn.Parameter) -> Tensor:
        tensors = self._tensors[kind]
        if p not in tensors:
            wide = torch.float32 if p.dtype in LOW_PRECISION else p.dtype  # in 16 bits small updates of an EMA would be rounded away
            tensors[p] = torch.zeros_like(p, dtype=self._kinds[kind] or wide, requires_grad=False)
        return tensors[p]


def _without_wrappers(tensors: Mapping[str, Tensor], named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """``tensors`` by the names of ``named``, where a state of an earlier version has those of wrappers before them."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        shorter = ".".join(part for part in name.split(".") if part not in _WRAPPED)
        known = (n for n in (name, shorter, shorter.removeprefix("module.")) if n in named)
        found[next(known, name)] = tensor
    return found


def _finite(shards: Sequence[Tensor], like: Sequence[Tensor]) -> bool:
    return bool(torch.isfinite(norm_of_shards(shards, like)))


def _comparable(gradients: Sequence[Tensor], remembered: Sequence[Tensor], factor: float | Tensor) -> list[Tensor]:
    """``factor·gradients`` in the dtypes of ``remembered``."""
    wide = [g if g.dtype == m.dtype else g.to(m.dtype) for g, m in zip(gradients, remembered, strict=True)]
    return wide if isinstance(factor, float) and factor == 1.0 else list(torch._foreach_mul(wide, factor))
