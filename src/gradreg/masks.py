"""Which coordinates are moved, whatever the direction; all are updated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from gradreg import checks
from gradreg.plain import from_plain, to_plain

Choice = Literal["random", "fisher"]


class Mask:
    """A choice of coordinates; immutable, compared by value."""

    has_memory: ClassVar[bool] = False
    """Whether the choice depends on earlier steps."""

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary (for YAML and JSON) from which ``mask_from_dict`` builds an equal mask."""
        return to_plain(self, "mask", _NAMED)


@dataclass(frozen=True, kw_only=True)
class OnlyNorms(Mask):
    """Only the parameters of normalization layers are moved and counted in the norm (SAM-ON).

    In PyTorch these are the parameters of modules whose class name contains "Norm" (BatchNorm2d, LayerNorm, LlamaRMSNorm); in JAX, leaves
    with a part of their path that contains "norm" or begins with "bn", in any case.

    Source: Müller et al. 2023, arXiv 2306.04226, section 3.
    Differs from the paper: its authors' code asks for "norm" or "bn" in the parameter's name.
    """

    def __str__(self) -> str:
        return "only norms"


@dataclass(frozen=True, kw_only=True)
class Sparse(Mask):
    """Only a share ``1 − sparsity`` of the coordinates is moved; the norm is taken before the others are left out.

    So the perturbation is shorter than the radius, as in the paper.

    Args:
        sparsity: the share that is not moved, in [0, 1).
        choice: "random" draws each coordinate anew at each refresh (``gradreg.hashing``); "fisher" takes those with the largest squared
            gradient, over all moved parameters together, at the step of the refresh.
        every: optimizer steps between refreshes, ≥ 1: at steps that are multiples of it, or the first after them at which there is a
            direction.
        seed: of the random choice, from 0 to 2³² − 1.

    Source: Mi et al. 2022, arXiv 2210.05177, algorithm 1 ("fisher": SSAM-F).
    Differs from the paper: SSAM-F adds up squared gradients of single samples drawn for the purpose, where this squares the gradient of the
    batch at hand and needs no pass of its own; "random" is their mask at initialization without their later exchange of coordinates, each
    coordinate for itself with probability ``1 − sparsity``.
    """

    sparsity: float
    choice: Choice = "fisher"
    every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", checks.fraction("sparsity", self.sparsity))
        checks.choice("choice", self.choice, get_args(Choice))
        object.__setattr__(self, "every", checks.whole("every", self.every, minimum=1))
        object.__setattr__(self, "seed", checks.seed(self.seed))

    @property
    def has_memory(self) -> bool:  # type: ignore[override]  # of this class it depends on the choice
        return self.choice == "fisher"

    def __str__(self) -> str:
        return f"{self.sparsity:.0%} sparse, by {self.choice}, every {self.every} steps"


_NAMED: dict[str, type[Mask]] = {"norms": OnlyNorms, "sparse": Sparse}


def mask_from_dict(data: Mapping[str, Any]) -> Mask:
    """The mask that ``Mask.to_dict`` described: ``{"mask": "sparse", "sparsity": 0.5, "choice": "random"}``.

    Raises:
        ValueError, TypeError: as ``gradreg.plain.from_plain``.
    """
    return from_plain(data, "mask", _NAMED)
