"""Which parts of a specification have a meaning together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradreg.directions import Gradient, Random
from gradreg.masks import Sparse
from gradreg.mixing import Reuse

if TYPE_CHECKING:
    from gradreg.penalties import GradientPenalty


def check_composition(penalty: GradientPenalty) -> None:
    """Fail in words where parts of ``penalty`` have no meaning together."""
    plain_direction = penalty.direction == Gradient()
    if penalty.mixing == "unit" and not (plain_direction and (penalty.power, penalty.difference) == (1, "forward")):
        raise ValueError(
            "mixing='unit' must go with power 1, the forward difference and the gradient itself as direction; got "
            f"power {penalty.power}, difference {penalty.difference!r}, direction {penalty.direction}. "
            "Use gnp(..., mixing='unit'), or mixing='plain'."
        )
    if penalty.difference == "exact" and not (plain_direction and penalty.mixing == "plain" and not isinstance(penalty.mask, Sparse)):
        raise ValueError(
            "difference='exact' must go with the gradient itself as direction, mixing='plain' and no Sparse mask; got "
            f"direction {penalty.direction}, mixing {str(penalty.mixing)!r}, mask {penalty.mask}. Use difference='central'."
        )
    if penalty.ascent_steps > 1 and not (plain_direction and penalty.difference == "forward"):
        raise ValueError(
            f"ascent_steps must be 1 unless the difference is forward and the direction the gradient; got {penalty.ascent_steps} with "
            f"difference {penalty.difference!r}, direction {penalty.direction}. Use sam(rho=..., steps=...) or fgr(..., steps=...)."
        )
    if isinstance(penalty.direction, Random) and penalty.power != 1:
        raise ValueError(
            f"direction={penalty.direction} must go with power 1, for it has no length of its own; got power {penalty.power}. "
            "Use random_sam(rho=...)."
        )
    if not penalty.direction.needs_gradient and isinstance(penalty.mixing, Reuse):
        raise ValueError(
            f"mixing={penalty.mixing} must go with a direction that needs a gradient, for it saves passes of that; got direction "
            f"{penalty.direction}. Use looksam(rho=..., k=..., a=...)."
        )
    if not penalty.direction.needs_gradient and isinstance(penalty.mask, Sparse) and penalty.mask.choice == "fisher":
        raise ValueError(
            f"mask={penalty.mask} must go with a direction that needs a gradient, from which it is chosen; got direction "
            f"{penalty.direction}. Use Sparse(..., choice='random')."
        )
