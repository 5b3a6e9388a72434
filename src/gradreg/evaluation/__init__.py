"""What a metric on test data does not tell of a trained model: what it forgot, its loss in 4 bits, and whether its probabilities are right.

A task logs the numbers beside its metric, and the study tabulates them (docs/language-models.md). ``calibration`` needs NumPy alone; the
others are PyTorch's and are imported when one of their names is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradreg.extras import needing

if TYPE_CHECKING:
    from gradreg.evaluation.calibrations import Calibration, calibration
    from gradreg.evaluation.losses import Forgetting, loss
    from gradreg.evaluation.rounding import round_to_nearest, rounded, rounded_loss

_HOMES = {
    "calibrations": ("Calibration", "calibration"),
    "losses": ("Forgetting", "loss"),
    "rounding": ("round_to_nearest", "rounded", "rounded_loss"),
}

__all__ = ["Calibration", "Forgetting", "calibration", "loss", "round_to_nearest", "rounded", "rounded_loss"]


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needing(__name__, "study" if home == "calibrations" else "torch"):
        return getattr(import_module(f"{__name__}.{home}"), name)
