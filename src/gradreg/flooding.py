"""Flooding: keep the training loss from falling below a level by changing only the loss; for PyTorch tensors and JAX arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradreg import checks
from gradreg.serialization import from_plain, to_plain


@dataclass(frozen=True, kw_only=True)
class Flooding:
    """``|L − b| + b`` of a batch's loss L, whose gradient is ``sign(L − b)·g``.

    ::

        flooding = gradreg.Flooding(level=0.1)
        loss = flooding(criterion(model(x), y))

    Near its level it is gradient regularization: of two plain gradient steps of size η on one batch, one on each side of the level, the net
    effect is η² times the penalty's part of ``fgr`` (below first) or ``bgr`` (above first) with ε = η.

    Args:
        level: the flood level b ≥ 0; 0 changes nothing for a loss that is never negative.

    Source: Ishida et al. 2020, arXiv 2002.08709, equation 3; the relation: Karakida et al. 2023, arXiv 2210.02720.

    >>> Flooding(level=0.5)(0.25), Flooding(level=0.5)(0.75)
    (0.75, 0.75)
    """

    level: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "level", checks.non_negative("level", self.level))

    def __call__(self, loss: Any) -> Any:
        """The flooded loss of ``loss``, the scalar loss of a batch."""
        return abs(loss - self.level) + self.level

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary from which ``flooding_from_dict`` builds an equal object."""
        return to_plain(self, "flooding", _NAMED)

    def __str__(self) -> str:
        return f"flooding(level {self.level:g})"


@dataclass(frozen=True, kw_only=True)
class IndividualFlooding:
    """``mean_i |l_i − b| + b`` of the losses of single samples (iFlood): each is kept from falling below the level, not their mean.

    ::

        flooding = gradreg.IndividualFlooding(level=0.1)
        loss = flooding(torch.nn.functional.cross_entropy(model(x), y, reduction="none"))

    Args:
        level: the flood level b ≥ 0.

    Source: Xie et al. 2022, "iFlood: A Stable and Effective Regularizer", ICLR 2022 (not on arXiv; openreview.net/forum?id=MsHnJPaBUZE).
    """

    level: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "level", checks.non_negative("level", self.level))

    def __call__(self, losses: Any) -> Any:
        """The flooded loss of ``losses``, one for each sample.

        Raises:
            ValueError: ``losses`` is a scalar, or not an array.
        """
        if getattr(losses, "ndim", 0) == 0:
            raise ValueError(
                f"losses must be an array of one loss for each sample; got {checks.describe(losses)}. Leave the reduction out "
                f"(reduction='none'), or use Flooding(level={self.level:g})."
            )
        return Flooding(level=self.level)(losses).mean()

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary from which ``flooding_from_dict`` builds an equal object."""
        return to_plain(self, "flooding", _NAMED)

    def __str__(self) -> str:
        return f"individual flooding(level {self.level:g})"


_NAMED: dict[str, type[Flooding] | type[IndividualFlooding]] = {"batch": Flooding, "individual": IndividualFlooding}


def flooding_from_dict(data: Mapping[str, Any]) -> Flooding | IndividualFlooding:
    """The object that ``to_dict`` described: ``{"flooding": "batch", "level": 0.1}`` or ``{"flooding": "individual", ...}``.

    Raises:
        ValueError, TypeError: as ``gradreg.serialization.from_plain``.
    """
    return from_plain(data, "flooding", _NAMED)
