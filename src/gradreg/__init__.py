"""gradreg: the gradient of a regularized loss in place of the plain one, for any PyTorch or JAX training loop.

This module is free of frameworks; the engines are ``gradreg.torch`` and ``gradreg.jax``.
"""

from gradreg.penalties import GradientPenalty, bgr, cgr, exact, fgr, gnp, sam
from gradreg.schedules import Constant, Cosine, Delay, LogTime, Product, Ramp, Schedule

__version__ = "0.1.0.dev0"

__all__ = [
    "Constant",
    "Cosine",
    "Delay",
    "GradientPenalty",
    "LogTime",
    "Product",
    "Ramp",
    "Schedule",
    "bgr",
    "cgr",
    "exact",
    "fgr",
    "gnp",
    "sam",
]
