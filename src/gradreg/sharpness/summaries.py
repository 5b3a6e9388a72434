"""Several measures of one loss at once, as numbers by name: what runs record, studies tabulate and ``gradreg sharpness`` prints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

from torch import nn

from gradreg import checks
from gradreg.sharpness.function import LossFunction
from gradreg.sharpness.measures import DEFAULT, MEASURES, PREFIX
from gradreg.sharpness.results import Measurement
from gradreg.sharpness.rises import critical_sharpness, sam_sharpness
from gradreg.sharpness.spectra import LossOptions, eigenvalues, trace
from gradreg.torch.closures import Closure


@dataclass(frozen=True)
class Summary:
    """What was measured.

    Attributes:
        results: by name, what the function of that measure returned.
        failures: by name, why a measure could not be taken, in words.
        numbers: ``NAME`` and, where there is one, ``NAME_error``: the standard error of a mean, or the estimated error of an eigenvalue.
    """

    results: Mapping[str, Any] = field(repr=False)
    failures: Mapping[str, ValueError]
    numbers: Mapping[str, float]

    @property
    def gradients(self) -> float:
        """What all of it cost, in gradients of these samples."""
        found: Sequence[Measurement] = list(self.results.values())
        return sum(one.passes.gradients for one in found)

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers must know, one sentence each."""
        return list(dict.fromkeys(note for one in self.results.values() for note in one.notes))

    def record(self) -> dict[str, float]:
        """The numbers as a run records them, ``sharpness_NAME``; NaN for a measure that could not be taken."""
        missing = dict.fromkeys(self.failures, math.nan)
        return {f"{PREFIX}{name}": value for name, value in {**self.numbers, **missing}.items()}


def summary(
    model: nn.Module,
    closure: Closure | Sequence[Closure],
    *,
    measures: Sequence[str] = DEFAULT,
    rho: float = 0.05,
    vectors: int = 10,
    tolerance: float = 1e-3,
    **options: Unpack[LossOptions],
) -> Summary:
    """Take several measures; one that cannot be taken, such as the critical sharpness at a gradient of zero, is named and left out.

    Args:
        model: the module; it is left bit for bit as it was, whatever is raised.
        closure: one or several, as for ``eigenvalues``.
        measures: names out of ``MEASURES``; all but the smallest eigenvalue by default.
        rho: the radius of the two rises, > 0.
        vectors: random vectors of the trace, ≥ 1.
        tolerance: of the eigenvalues, relative, > 0.
        options: see ``LossOptions``. The batches of ``m_sharpness`` are the closures.

    Cost: the sum of the measures'; about 60 to 150 gradients for the default ones.

    Raises:
        TypeError, ValueError: arguments that are wrong, not a loss that cannot be measured: that is in ``failures``.
    """
    names = checked_measures("measures", measures)
    checks.positive("rho", rho)
    checks.whole("vectors", vectors, minimum=1)
    checks.positive("tolerance", tolerance)
    LossFunction(model, closure, **options)  # which raises for arguments that are wrong
    ways: dict[str, Callable[[], Any]] = {
        "largest_eigenvalue": lambda: eigenvalues(model, closure, tolerance=tolerance, **options),
        "smallest_eigenvalue": lambda: eigenvalues(model, closure, which="smallest", tolerance=tolerance, **options),
        "trace": lambda: trace(model, closure, samples=vectors, **options),
        "sam_sharpness": lambda: sam_sharpness(model, closure, rho=rho, **options),
        "m_sharpness": lambda: sam_sharpness(model, closure, rho=rho, perturb="each", **options),
        "critical_sharpness": lambda: critical_sharpness(model, closure, **options),
    }
    results: dict[str, Any] = {}
    failures: dict[str, ValueError] = {}
    numbers: dict[str, float] = {}
    for name in names:
        try:
            found = results[name] = ways[name]()
        except ValueError as error:
            failures[name] = error
            continue
        value, error = _value_and_error(found)
        numbers[name] = value
        if error is not None and math.isfinite(error):
            numbers[f"{name}_error"] = error
    return Summary(results, failures, numbers)


def checked_measures(name: str, measures: Any) -> list[str]:
    """``measures`` as a list of known names, each once.

    Raises:
        TypeError, ValueError: no list, an empty one, or a name of none.
    """
    if not isinstance(measures, (list, tuple)) or not measures:
        raise TypeError(f"{name} must be a list of measures; got {checks.describe(measures)}. Some of {', '.join(MEASURES)}.")
    return list(dict.fromkeys(checks.choice(name, one, tuple(MEASURES)) for one in measures))


def _value_and_error(found: Any) -> tuple[float, float | None]:
    values = getattr(found, "values", None)
    if values is not None:
        return float(values[0]), float(found.errors[0])
    return found.value, getattr(found, "standard_error", None)
