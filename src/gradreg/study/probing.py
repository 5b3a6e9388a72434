"""``gradreg tune --probe``: how far a penalty may step before the two gradients disagree, measured in the first epochs of one run.

The run trains as without a penalty but for ``WEIGHT`` of it, so that the radius can be tried out while it trains: at every step another
one, from small to large until the gradients disagree, and again from the smallest. What the best radii of methods and networks have in
common is the alignment of the two gradients there (docs/choosing.md); the probe finds the radius that has it.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from gradreg import checks, files
from gradreg.auto_radius import AutoRadius, Guards, Measurement, RadiusState
from gradreg.penalties import GradientPenalty
from gradreg.registry import CONSTRUCTORS
from gradreg.schedules import register
from gradreg.study.comparison import resolve_task
from gradreg.study.history import read_history
from gradreg.study.search_space import STRENGTHS
from gradreg.study.tasks import Task
from gradreg.study.variants import parse_penalty

RESULTS = "probe.json"
SCHEMA = 1
WEIGHT = 0.01
"""c = strength / radius in the probe: what the perturbed gradient weighs in the one that trains."""

FLOOR = 0.5
"""The alignment below which a climb ends: steps beyond it have nothing to tell, and a long one could disturb the training."""

_LONGEST = 10.0
"""How many times as long as the plain gradient the perturbed one may be before a climb ends: it is a tenth of the step then."""

_BELOW, _ABOVE = 4.0, 30.0
"""How far the radii of a climb go beyond the range of a search."""

_SPREAD = 16.0
"""The range for a search: where 1 − alignment is this much smaller and larger than at the start, a quarter and four times its radius if
both gradients were those of a quadratic."""

_kept: list[tuple[float, float, float]] = []
"""Radius, alignment and nonlinearity of every measured step of the run in progress."""


@register("swept")
@dataclass(frozen=True, kw_only=True)
class SweptRadius(AutoRadius):
    """In the place of a radius: ``ratio`` times larger at every step until the gradients differ too much; then again ``lower``.

    Args:
        ratio: of a radius and the one before it, > 1.
    """

    ratio: float = 2.0

    def update(self, state: RadiusState, measured: Measurement, guards: Guards, ops: Any, *, scaled: bool = False) -> RadiusState:
        cosine, radius = self.cosine(measured, ops), ops.exp(state.log_radius)
        power = guards.power
        predicted = math.nan if power is None else radius * (measured.plain if power == 2 else ops.sqrt(measured.plain))
        _keep(ops, radius, cosine, measured.rise, predicted)
        climbs = (cosine > FLOOR) & (measured.perturbed < _LONGEST**2 * measured.plain)
        climbs = climbs & ops.isfinite(measured.rise) & (state.log_radius < math.log(self.upper))
        log_radius = ops.where(climbs, state.log_radius + math.log(self.ratio), math.log(self.lower))
        return state._replace(log_radius=log_radius, steps=state.steps + 1)


def _keep(ops: Any, *measured: Any) -> None:
    """Keep what a step measured, also of one that runs inside a program of JAX."""

    def keep(radius: Any, cosine: Any, rise: Any, predicted: Any) -> None:
        predicted = float(predicted)
        _kept.append((float(radius), float(cosine), float(rise) / predicted - 1.0 if predicted > 0.0 else math.nan))

    if getattr(ops, "__name__", "") == "jax.numpy":
        import jax

        jax.debug.callback(keep, *measured, ordered=True)
    else:
        keep(*measured)


class _Enough(BaseException):
    """Ends a run; not an ``Exception``, which a task might catch."""


@dataclass(frozen=True)
class Climb:
    """One way from the smallest radius upwards, as lists of equal length.

    Args:
        radii: rising.
        alignments: cosine of the two gradients at each.
        nonlinearities: rise of the loss over the one that the gradient predicts, − 1; NaN where that is not known.
    """

    radii: Sequence[float]
    alignments: Sequence[float]
    nonlinearities: Sequence[float]

    def radius_at(self, alignment: float) -> float | None:
        """Where the alignment first falls to ``alignment``, between two radii in the logarithm of both ends; None if it does not."""
        for i, here in enumerate(self.alignments):
            if here <= alignment and i > 0:
                before = self.alignments[i - 1]
                part = (before - alignment) / (before - here) if before > here else 0.0
                return math.exp(math.log(self.radii[i - 1]) + part * math.log(self.radii[i] / self.radii[i - 1]))
            if here <= alignment:
                return None
        return None


@dataclass(frozen=True)
class Probe:
    """What a probe found for one penalty.

    Args:
        task: the task's name.
        penalty: as it was given.
        argument: of the penalty, which is its radius.
        alignment: what the start aims at.
        share: of the training that was probed.
        climbs: in the order in which they were measured; those of the second half count for the start.
        losses: (epoch, training loss) of the epochs that were logged.
    """

    task: str
    penalty: str
    argument: str
    alignment: float
    share: float
    climbs: Sequence[Climb]
    losses: Sequence[tuple[int, float]]

    @property
    def late(self) -> Sequence[Climb]:
        """The climbs of the second half, which are nearer to what the rest of the training meets."""
        return self.climbs[len(self.climbs) // 2 :]

    @property
    def start(self) -> float | None:
        """The radius of the wanted alignment, the median over the late climbs; None where most of them do not meet it."""
        return self._at(self.alignment)

    @property
    def range(self) -> tuple[float, float] | None:
        """What a search around ``start`` may cover; None without a start."""
        start = self.start
        if start is None:
            return None
        least = self._at(1.0 - (1.0 - self.alignment) / _SPREAD)
        most = self._at(max(FLOOR, 1.0 - (1.0 - self.alignment) * _SPREAD))
        return min(start / 2.0, start / 4.0 if least is None else least), max(2.0 * start, 4.0 * start if most is None else most)

    def _at(self, alignment: float) -> float | None:
        found = [climb.radius_at(alignment) for climb in self.late]
        met = [radius for radius in found if radius is not None]
        return statistics.median(met) if 2 * len(met) > len(found) else None

    def curve(self, climbs: Sequence[Climb] | None = None) -> list[tuple[float, float, float]]:
        """Radius, median alignment and median nonlinearity over ``climbs``; by default over the late ones."""
        points: dict[float, list[tuple[float, float]]] = {}
        for climb in self.late if climbs is None else climbs:
            for radius, *values in zip(climb.radii, climb.alignments, climb.nonlinearities, strict=True):
                points.setdefault(float(f"{radius:.3g}"), []).append((values[0], values[1]))
        return [(r, statistics.median(a for a, _ in found), statistics.median(n for _, n in found)) for r, found in sorted(points.items())]

    def sentences(self) -> list[str]:
        """The start, the range for a search, and what to write; or why there is none."""
        name, loss = self.penalty.partition(":")[0], ""
        if self.losses:
            (first, one), (last, other) = self.losses[0], self.losses[-1]
            loss = f"; training loss {one:.4g} in epoch {first}" + (f", {other:.4g} in epoch {last}" if last != first else "")
        found = [f"{self.penalty}: {len(self.climbs)} climbs in {100 * self.share:.3g} % of the training{loss}"]
        start, around = self.start, self.range
        if start is not None and around is not None:
            met = [radius for climb in self.late if (radius := climb.radius_at(self.alignment)) is not None]
            found.append(
                f"alignment {self.alignment:g} at {self.argument} = {start:.2g} ({min(met):.2g} to {max(met):.2g} in the second half)"
            )
            found.append(
                f"start with {name}:{self.argument}={start:.2g}; search with --search {self.argument}=log:{around[0]:.2g}:{around[1]:.2g}"
            )
            return found
        highest = max((max(climb.radii) for climb in self.late), default=math.nan)
        lowest = min((climb.alignments[0] for climb in self.late), default=math.nan)
        if lowest <= self.alignment:
            found.append(f"no start: the gradients disagree at the smallest radius already, with alignment {lowest:.2g}")
        else:
            found.append(
                f"no start: the alignment stays above {self.alignment:g} up to {self.argument} = {highest:.2g}, as in networks whose "
                "normalization hides the scale of their weights. It does not tell a radius here: search around the paper's, or use none"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """As in ``probe.json``."""
        around = self.range
        return {
            "penalty": self.penalty,
            "argument": self.argument,
            "alignment": self.alignment,
            "share": self.share,
            "start": self.start,
            "range": None if around is None else list(around),
            "climbs": [
                {
                    "radii": list(climb.radii),
                    "alignments": list(climb.alignments),
                    "nonlinearities": [n if math.isfinite(n) else None for n in climb.nonlinearities],
                }
                for climb in self.climbs
            ],
            "losses": [{"epoch": epoch, "loss": loss} for epoch, loss in self.losses],
        }


def probe(
    task: Task | Callable[..., Any] | str,
    *,
    penalty: str = "fgr",
    share: float = 0.1,
    alignment: float = 0.95,
    options: dict[str, Any] | None = None,
) -> Probe:
    """Measure the alignment of the two gradients over radii in the first epochs of a run, and find the radius where it is ``alignment``.

    Args:
        task: as of ``compare``. Its gradients come from ``run.regularizer`` or ``run.value_and_grad(..., state=True)``.
        penalty: a text such as "fgr" or "asam:eta=0.1"; its radius and strength do not matter.
        share: of the training, in (0, 1]; at least one epoch.
        alignment: cosine in (0.5, 1) at the start that is recommended. The best radii that we know have .88 to .95.
        options: options of the task.

    Raises:
        TypeError, ValueError: bad arguments, a penalty without a radius or without a first gradient, or a task that breaks the rules.

    Cost: twice the gradient evaluations of plain training for that share; one run, in this process.
    Source: none known to us.
    """
    resolved = resolve_task(task).configured(options or {})
    share = checks.probability("share", share)
    if not FLOOR < checks.real("alignment", alignment) < 1.0:
        raise ValueError(f"alignment must be a cosine between {FLOOR:g} and 1; got {alignment:g}. Leave it out for 0.95.")
    argument, swept, changes = _swept(penalty)
    variant = resolved.variant(swept, changes)
    ended = 1.0

    def stop(done: float) -> None:
        nonlocal ended
        if done >= share:
            ended = done
            raise _Enough

    _kept.clear()
    with tempfile.TemporaryDirectory(prefix="gradreg-probe-") as folder:
        run = files.make_directory(Path(folder) / "run", purpose="the probe's run")
        with contextlib.suppress(_Enough):
            variant.run(run, variant.seed, Fraction(1), stop)
        _wait_for_jax()
        losses = [
            (int(record["epoch"]), float(loss))
            for record in read_history(run)
            if record.get("epoch") is not None and (loss := record.get("train_loss", record.get("loss"))) is not None
        ]
    kept = _kept[: math.ceil(len(_kept) * min(1.0, share / ended))] if ended > share else list(_kept)
    climbs = _climbs(kept)
    if not climbs:
        raise ValueError(
            f"the probe must see a climb of radii; got {len(kept)} steps in {100 * share:.3g} % of the training. Probe a larger share."
        )
    return Probe(resolved.name, penalty, argument, alignment, share, climbs, losses)


def _swept(text: str) -> tuple[str, GradientPenalty, dict[str, Any]]:
    """The name of the radius among the penalty's arguments, the penalty with a swept one, and changed options of the task."""
    block, changes = parse_penalty(text)
    if block is None or block["name"] not in CONSTRUCTORS:
        raise ValueError(checks.unknown("penalty", text if block is None else block["name"], CONSTRUCTORS))
    strengths = STRENGTHS.get(block["name"])
    if strengths is None:
        raise ValueError(f"penalty must have a radius to probe; got {text!r}. Use {', '.join(STRENGTHS)}.")
    argument, (low, high) = next(iter(strengths.ranges.items()))
    built = {**strengths.kept, **block, argument: math.sqrt(low * high)}
    built |= {key: built[leader] for key, leader in strengths.follows.items() if key not in block}
    shape = GradientPenalty.from_dict(built)
    if shape.radius is None or not shape.direction.needs_gradient:
        raise ValueError(
            f"penalty must compare a gradient at perturbed parameters with the plain one to be probed; got {text!r}. Use sam, gnp or fgr."
        )
    radius = SweptRadius(start=low / _BELOW, lower=low / _BELOW, upper=high * _ABOVE)
    swept = GradientPenalty(
        power=shape.power,
        strength=WEIGHT * radius,
        radius=radius,
        difference=shape.difference,
        direction=shape.direction,
        mask=shape.mask,
    )
    return argument, swept, changes


def _climbs(kept: Sequence[tuple[float, float, float]]) -> list[Climb]:
    """The measurements divided where the radius falls; a climb that the end of the run cut is left out unless it is the only one."""
    parts: list[list[tuple[float, float, float]]] = []
    for one in kept:
        if not parts or one[0] <= parts[-1][-1][0]:
            parts.append([])
        parts[-1].append(one)
    complete = parts[:-1] if len(parts) > 1 else parts
    steps = [[one for one in part if math.isfinite(one[1])] for part in complete]
    return [Climb(*(list(column) for column in zip(*part, strict=True))) for part in steps if len(part) > 1]


def _wait_for_jax() -> None:
    """Programs of JAX that are still running keep their measurements only when they are done."""
    import sys

    if "jax" in sys.modules:
        sys.modules["jax"].effects_barrier()
