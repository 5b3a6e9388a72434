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
    friendly_sam,
    gnp,
    gsam,
    layerwise_sam,
    looksam,
    msam,
    random_sam,
    remembered,
    sam,
    wsam,
)
from gradreg.deprecations import deprecated
from gradreg.directions import Adaptive, Direction, EmaDirection, Friendly, Gradient, Random
from gradreg.flooding import Flooding, IndividualFlooding, flooding_from_dict
from gradreg.held_out import HeldOut
from gradreg.masks import Mask, OnlyNorms, Sparse
from gradreg.mixing import GradientMixing, Plain, Reuse, SurrogateGap, Unit
from gradreg.penalties import GradientPenalty
from gradreg.schedules import Chance, Constant, Cosine, Delay, Every, LogTime, Product, Ramp, Schedule, Tail
from gradreg.weight_decay import AutoL2, predict_l2
from gradreg.weight_decay_clock import DecayClock, effective_learning_rate, l2_from_authors, l2_to_authors

__version__ = "0.1.0.dev0"

__all__ = [
    "Adaptive",
    "AutoL2",
    "AutoRadius",
    "Chance",
    "Constant",
    "Cosine",
    "DecayClock",
    "Delay",
    "Direction",
    "EmaDirection",
    "Every",
    "Flooding",
    "Friendly",
    "Gradient",
    "GradientMixing",
    "GradientPenalty",
    "HeldOut",
    "IndividualFlooding",
    "LogTime",
    "Mask",
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
    "Unit",
    "asam",
    "auto",
    "bgr",
    "cgr",
    "effective_learning_rate",
    "exact",
    "fgr",
    "flooding_from_dict",
    "friendly_sam",
    "gnp",
    "gsam",
    "l2_from_authors",
    "l2_to_authors",
    "layerwise_sam",
    "looksam",
    "msam",
    "predict_l2",
    "random_sam",
    "remembered",
    "sam",
    "wsam",
]


def __getattr__(name: str) -> Any:
    return deprecated(__name__, name, {"Remembered": EmaDirection})
