"""Sharpness, measured: curvature of any model's loss and how far it rises, as a diagnostic. Flatter is not better as such.

PyTorch's part needs ``gradreg[sharpness]`` and is imported when one of its names is first used; ``gradreg.sharpness.jax`` is JAX's.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradreg.extras import needing

if TYPE_CHECKING:
    from gradreg.sharpness.operators import CurvatureOperator, gauss_newton, hessian
    from gradreg.sharpness.penalized import PenalizedCurvature, penalized_curvature
    from gradreg.sharpness.results import (
        CriticalSharpness,
        Eigenvalues,
        Passes,
        Rise,
        Slice,
        Spectrum,
        Trace,
        by_layer,
    )
    from gradreg.sharpness.rises import critical_sharpness, directional_sharpness, random_sharpness, sam_sharpness, slice_1d
    from gradreg.sharpness.spectra import eigenvalues, largest_eigenvalues, spectrum, trace
    from gradreg.sharpness.summaries import Summary, summary

_HOMES = {
    "operators": ("CurvatureOperator", "gauss_newton", "hessian"),
    "penalized": ("PenalizedCurvature", "penalized_curvature"),
    "results": ("CriticalSharpness", "Eigenvalues", "Passes", "Rise", "Slice", "Spectrum", "Trace", "by_layer"),
    "rises": ("critical_sharpness", "directional_sharpness", "random_sharpness", "sam_sharpness", "slice_1d"),
    "spectra": ("eigenvalues", "largest_eigenvalues", "spectrum", "trace"),
    "summaries": ("Summary", "summary"),
}

__all__ = [
    "CriticalSharpness",
    "CurvatureOperator",
    "Eigenvalues",
    "Passes",
    "PenalizedCurvature",
    "Rise",
    "Slice",
    "Spectrum",
    "Summary",
    "Trace",
    "by_layer",
    "critical_sharpness",
    "directional_sharpness",
    "eigenvalues",
    "gauss_newton",
    "hessian",
    "largest_eigenvalues",
    "penalized_curvature",
    "random_sharpness",
    "sam_sharpness",
    "slice_1d",
    "spectrum",
    "summary",
    "trace",
]


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needing(__name__, "sharpness"):
        return getattr(import_module(f"{__name__}.{home}"), name)
