"""gradreg: the gradient of a regularized loss in place of the plain one, for any PyTorch or JAX training loop.

This module is free of frameworks; the engines are ``gradreg.torch`` and ``gradreg.jax``.
"""

from gradreg.penalties import GradientPenalty, bgr, cgr, exact, fgr, gnp, sam
from gradreg.schedules import Constant, Cosine, Delay, LogTime, Product, Ramp, Schedule
from gradreg.weight_decay import AutoL2, predict_l2
from gradreg.weight_decay_clock import DecayClock, effective_learning_rate, l2_from_authors, l2_to_authors

__version__ = "0.1.0.dev0"

__all__ = [
    "AutoL2",
    "Constant",
    "Cosine",
    "DecayClock",
    "Delay",
    "GradientPenalty",
    "LogTime",
    "Product",
    "Ramp",
    "Schedule",
    "bgr",
    "cgr",
    "effective_learning_rate",
    "exact",
    "fgr",
    "gnp",
    "l2_from_authors",
    "l2_to_authors",
    "predict_l2",
    "sam",
]
