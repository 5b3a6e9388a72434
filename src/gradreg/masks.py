"""Which parameters or coordinates are perturbed, for any direction. All of them are updated.

A mask of level "parameters" chooses whole parameters; only those are counted in the norm. A mask of level "coordinates" removes
coordinates from the perturbation after the norm is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from gradreg import checks
from gradreg.serialization import Part

Choice = Literal["random", "fisher"]


class Mask(Part, tag="mask"):
    """A choice of parameters or coordinates; immutable, compared by value."""

    level: ClassVar[Literal["parameters", "coordinates"]] = "coordinates"
    """What it chooses."""

    @property
    def needs_gradient(self) -> bool:
        """Whether it is chosen from gradients and kept until the next refresh, so it depends on earlier steps. Real parameters only."""
        return False

    @property
    def refresh_every(self) -> int:
        """For a mask chosen from gradients: optimizer steps between two choices, ≥ 1."""
        return 1

    @property
    def depends_on_step(self) -> bool:
        """Whether the number of the step enters, so that the JAX engine must be given it: where coordinates are chosen again."""
        return self.level == "coordinates"

    @property
    def has_memory(self) -> bool:
        """Whether the choice depends on earlier steps."""
        return self.needs_gradient


@dataclass(frozen=True, kw_only=True)
class OnlyNorms(Mask, name="norms"):
    """Only the parameters of normalization layers are perturbed and counted in the norm (SAM-ON).

    In PyTorch these are the parameters of modules whose class name contains "Norm" (BatchNorm2d, LayerNorm, LlamaRMSNorm); in JAX, leaves
    of modules whose class name does (equinox.nn.LayerNorm), or whose own or layer's name contains "norm" or begins with "bn", in any case,
    and is not that of another layer ("prenorm_proj").

    Source: Müller et al. 2023, arXiv 2306.04226, section 3.
    Differs from the paper: the authors' code looks for "norm" or "bn" in the parameter's name.
    """

    level: ClassVar[Literal["parameters", "coordinates"]] = "parameters"

    def __str__(self) -> str:
        return "only norms"


@dataclass(frozen=True, kw_only=True)
class Sparse(Mask, name="sparse"):
    """Only a share ``1 − sparsity`` of the coordinates is perturbed.

    The norm is taken before the others are removed, so the perturbation is shorter than the radius, as in the paper.

    Args:
        sparsity: the share that is not perturbed, in [0, 1).
        choice: "random" draws each coordinate again at each refresh (``gradreg.hashing``); "fisher" takes those with the largest squared
            gradient, over all perturbed parameters together, at the step of the refresh.
        every: optimizer steps between refreshes, ≥ 1: at steps that are multiples of it, or the first after them at which there is a
            direction.
        seed: of the random choice, from 0 to 2³² − 1.

    Source: Mi et al. 2022, arXiv 2210.05177, algorithm 1 ("fisher": SSAM-F).
    Differs from the paper: SSAM-F sums squared gradients of single samples drawn for that purpose; this squares the gradient of the
    current batch and needs no extra pass. "random" is their mask at initialization, each coordinate independently with probability
    ``1 − sparsity``, without their later exchange of coordinates.
    """

    sparsity: float
    choice: Choice = "fisher"
    every: int = 100
    seed: int = 0

    level: ClassVar[Literal["parameters", "coordinates"]] = "coordinates"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", checks.fraction("sparsity", self.sparsity))
        checks.choice("choice", self.choice, get_args(Choice))
        object.__setattr__(self, "every", checks.whole("every", self.every, minimum=1))
        object.__setattr__(self, "seed", checks.seed(self.seed))

    @property
    def needs_gradient(self) -> bool:
        return self.choice == "fisher"

    @property
    def refresh_every(self) -> int:
        return self.every

    def __str__(self) -> str:
        return f"{self.sparsity:.0%} sparse, by {self.choice}, every {self.every} steps"
