"""gradreg: the gradient of a regularized loss in place of the plain one, for any PyTorch or JAX training loop.

This module is free of frameworks; the engines are ``gradreg.torch`` and ``gradreg.jax``.
"""

from typing import Any

from gradreg.auto_radius import AutoRadius
from gradreg.constructors import (
    asam,
    auto,
    bgr,
    cgr,
    exact,
    fgr,
    flat_lora,
    friendly_sam,
    gnp,
    gsam,
    layerwise_sam,
    le_sam,
    looksam,
    msam,
    mup2_sam,
    random_sam,
    remembered,
    sam,
    unified_sam,
    wsam,
)
from gradreg.deprecations import deprecated
from gradreg.directions import (
    Adaptive,
    Clipped,
    Direction,
    EmaDirection,
    FanScaled,
    Friendly,
    Gradient,
    LossEquated,
    MergedNoise,
    Random,
    Unified,
)
from gradreg.flooding import Flooding, IndividualFlooding, flooding_from_dict
from gradreg.gates import Chance, Delay, Every, Tail
from gradreg.held_out import HeldOut
from gradreg.lets import LETS
from gradreg.masks import Mask, OnlyNorms, Sparse
from gradreg.mixing import ClipEach, GradientMixing, Plain, Reuse, SurrogateGap, Unit
from gradreg.penalties import GradientPenalty
from gradreg.schedules import Anneal, Constant, Cosine, LogTime, Product, Ramp, Schedule
from gradreg.weight_decay import AutoL2, predict_l2
from gradreg.weight_decay_clock import DecayClock, effective_learning_rate, l2_from_authors, l2_to_authors

__version__ = "0.1.0"

__all__ = [
    "LETS",
    "Adaptive",
    "Anneal",
    "AutoL2",
    "AutoRadius",
    "Chance",
    "ClipEach",
    "Clipped",
    "Constant",
    "Cosine",
    "DecayClock",
    "Delay",
    "Direction",
    "EmaDirection",
    "Every",
    "FanScaled",
    "Flooding",
    "Friendly",
    "Gradient",
    "GradientMixing",
    "GradientPenalty",
    "HeldOut",
    "IndividualFlooding",
    "LogTime",
    "LossEquated",
    "Mask",
    "MergedNoise",
    "OnlyNorms",
    "Plain",
    "Product",
    "Ramp",
    "Random",
    "Reuse",
    "Schedule",
    "Sparse",
    "SurrogateGap",
    "Tail",
    "Unified",
    "Unit",
    "asam",
    "auto",
    "bgr",
    "cgr",
    "effective_learning_rate",
    "exact",
    "fgr",
    "flat_lora",
    "flooding_from_dict",
    "friendly_sam",
    "gnp",
    "gsam",
    "l2_from_authors",
    "l2_to_authors",
    "layerwise_sam",
    "le_sam",
    "looksam",
    "msam",
    "mup2_sam",
    "predict_l2",
    "random_sam",
    "remembered",
    "sam",
    "unified_sam",
    "wsam",
]


def __getattr__(name: str) -> Any:
    return deprecated(__name__, name, {"Remembered": EmaDirection})
