"""Vectors over the parameters: flat tensors that hold this rank's shards, with inner products over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradreg import hashing
from gradreg.torch import draws
from gradreg.torch.norms import LOW_PRECISION, SUMMED, dtensor_class, is_sharded, local_shards, reducing_groups

Vector = Tensor
"""A flat tensor of ``Space.size`` elements: what this rank holds of a vector with one element for each element of the parameters."""


class Space:
    """The vectors over ``parameters``.

    Parameters that are sharded alike lie side by side, so that an inner product takes one all-reduce for each kind of sharding.

    Args:
        parameters: by name; real, and each with memory of its own.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        named = list(parameters.items())
        groups = reducing_groups([p for _, p in named])
        order = [i for _, indices in groups for i in indices]
        self.names: list[str] = [named[i][0] for i in order]
        self.parameters: list[nn.Parameter] = [named[i][1] for i in order]
        self._places = order
        self._shards = local_shards(self.parameters)
        self._sizes = [s.numel() for s in self._shards]
        self.size: int = sum(self._sizes)
        self.dimension: int = sum(p.numel() for p in self.parameters)
        self.dtype: torch.dtype = torch.float64 if any(p.dtype == torch.float64 for p in self.parameters) else torch.float32
        self.device: torch.device = self._shards[0].device
        self.is_sharded: bool = any(is_sharded(p) for p in self.parameters)
        self._groups: list[tuple[tuple[Any, ...], slice]] = []
        first = 0
        for over, indices in groups:
            count = sum(local_shards([named[i][1]])[0].numel() for i in indices)
            self._groups.append((over, slice(first, first + count)))
            first += count

    @property
    def precision(self) -> float:
        """The spacing of the numbers that the model computes with, relative to 1: the coarsest of the parameters' dtypes."""
        return max(torch.finfo(p.dtype).eps for p in self.parameters)

    def zeros(self) -> Vector:
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)

    def flatten(self, shards: Sequence[Tensor | None]) -> Vector:
        """The vector of one shard for each parameter, None for zeros."""
        flat = self.zeros()
        for part, shard in zip(flat.split(self._sizes), shards, strict=True):
            if shard is not None:
                part.copy_(shard.detach().reshape(-1))
        return flat

    def split(self, vector: Vector) -> list[Tensor]:
        """This rank's shard of each parameter, in its dtype (half precision in float32, from which a perturbation is rounded once)."""
        parts = zip(vector.split(self._sizes), self._shards, strict=True)
        return [v.view(s.shape).to(device=s.device, dtype=self.dtype if s.dtype in LOW_PRECISION else s.dtype) for v, s in parts]

    def values(self) -> Vector:
        """The parameters themselves."""
        return self.flatten(self._shards)

    def dots(self, rows: Tensor, vector: Vector) -> Tensor:
        """The inner products of ``vector`` with each of ``rows``."""
        found = torch.zeros(len(rows), dtype=self.dtype, device=self.device)
        for over, part in self._groups:
            here = _products(rows[:, part], vector[part])
            for group in over:
                torch.distributed.all_reduce(here, group=group)
            found += here
        return found

    def dot(self, first: Vector, second: Vector) -> float:
        return float(self.dots(first.unsqueeze(0), second))

    def norm(self, vector: Vector) -> float:
        """The L2 norm; a vector so small that squares underflow is scaled first."""
        largest = self.largest(vector)
        if not 0 < largest < float("inf"):
            return largest
        scaled = vector / largest
        return largest * self.dot(scaled, scaled) ** 0.5

    def largest(self, vector: Vector) -> float:
        """The largest absolute value over all ranks; NaN if there is one, 0 for an empty vector."""
        here = vector.abs().amax() if vector.numel() else torch.zeros((), dtype=self.dtype, device=self.device)
        here = here.nan_to_num(nan=float("inf"), posinf=float("inf")) if not bool(torch.isfinite(here)) else here
        for group in {id(g): g for over, _ in self._groups for g in over}.values():
            torch.distributed.all_reduce(here, op=torch.distributed.ReduceOp.MAX, group=group)
        return float(here)

    def by_parameter(self, first: Vector, second: Vector) -> dict[str, float]:
        """The part of each parameter in the inner product of two vectors."""
        found: dict[str, float] = {}
        pairs = zip(self.names, self.parameters, first.split(self._sizes), second.split(self._sizes), strict=True)
        for name, p, a, b in pairs:
            here = _products(a.unsqueeze(0), b)[0]
            for group in reducing_groups([p])[0][0]:
                torch.distributed.all_reduce(here, group=group)
            found[name] = float(here)
        return {self.names[i]: found[self.names[i]] for i in np.argsort(self._places)}

    def signs(self, seed: int, counter: int) -> Vector:
        """+1 or −1 in each coordinate, the same however the parameters are sharded."""
        return self.flatten(draws.signs(seed, counter, zip(self._places, self.parameters, strict=True)))

    def normal(self, seed: int, counter: int) -> Vector:
        """Standard normal numbers, the same however the parameters are sharded."""
        shards: list[Tensor | None] = []
        for place, p in zip(self._places, self.parameters, strict=True):
            generator = torch.Generator().manual_seed(hashing.hashed(hashing.hashed(seed, counter), place))
            rows = draws.held_rows(p)
            whole = torch.randn(p.numel(), generator=generator, dtype=self.dtype)
            shards.append(rows.held(whole[rows.first : rows.first + prod(rows.shape)]))
        return self.flatten(shards)

    def given(self, name: str, value: object) -> Vector:
        """A user's vector: tensors by parameter name, or one for each parameter in the model's order.

        Raises:
            TypeError, ValueError: something else, or shapes that are not the parameters'.
        """
        named = [self.names[i] for i in np.argsort(self._places)]
        if isinstance(value, (list, tuple)) and len(value) == len(named):
            value = dict(zip(named, value, strict=True))
        if not isinstance(value, dict) or set(value) - set(named):
            unknown = sorted(map(str, set(value) - set(named))) if isinstance(value, dict) else []
            received = f"{unknown[0]!r}, which is none of them" if unknown else f"a {type(value).__name__}"
            raise ValueError(
                f"{name} must be a dictionary of tensors by parameter name, or a list with a tensor for each of the {len(named)} measured "
                f"parameters; got {received}. The names are those of model.named_parameters()."
            )
        shards: list[Tensor | None] = []
        for key, p in zip(self.names, self.parameters, strict=True):
            tensor = value.get(key)
            if tensor is not None and (not isinstance(tensor, Tensor) or tensor.shape != p.shape):
                got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"{name} must hold for {key!r} a tensor of shape {tuple(p.shape)}; got {got}.")
            shards.append(None if tensor is None else self._shard_of(tensor, p))
        return self.flatten(shards)

    def _shard_of(self, tensor: Tensor, p: nn.Parameter) -> Tensor:
        if is_sharded(tensor):
            return local_shards([tensor])[0]
        rows = draws.held_rows(p)
        return rows.held(tensor.detach().reshape(-1)[rows.first : rows.first + prod(rows.shape)])

    def whole(self, vector: Vector) -> dict[str, Tensor]:
        """The vector as whole tensors by parameter name, in the model's order; under sharding every rank gets all of them."""
        dtensor = dtensor_class()
        found: dict[str, Tensor] = {}
        for name, p, v in zip(self.names, self.parameters, vector.split(self._sizes), strict=True):
            shard = v.view(local_shards([p])[0].shape)
            if is_sharded(p):
                sharded: Any = p
                placed = dtensor.from_local(
                    shard, sharded.device_mesh, sharded.placements, run_check=False, shape=p.shape, stride=p.stride()
                )
                shard = placed.full_tensor()
            found[name] = shard
        return {self.names[i]: found[self.names[i]] for i in np.argsort(self._places)}

    def to_numpy(self, vector: Vector) -> np.ndarray:
        """The whole vector in the order of ``model.parameters()``, as NumPy sees it."""
        return np.concatenate([t.detach().cpu().numpy().reshape(-1) for t in self.whole(vector).values()])

    def from_numpy(self, array: np.ndarray) -> Vector:
        """The inverse of ``to_numpy``."""
        flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1)).to(self.dtype)
        inverse = np.argsort(self._places)
        pieces = flat.split([self.parameters[i].numel() for i in inverse])
        whole: list[Tensor] = [flat] * len(pieces)
        for i, piece in zip(inverse, pieces, strict=True):
            whole[i] = self._shard_of(piece.view(self.parameters[i].shape), self.parameters[i])
        return self.flatten(whole)


def _products(rows: Tensor, vector: Vector) -> Tensor:
    """``rows @ vector``; on a CPU in parts that are added in float64, because one sum in float32 is inaccurate there."""
    if vector.device.type != "cpu" or vector.numel() <= SUMMED:
        return rows @ vector
    parts = zip(rows.split(SUMMED, dim=1), vector.split(SUMMED), strict=True)
    return torch.stack([a @ b for a, b in parts]).sum(0, dtype=torch.float64).to(vector.dtype)
