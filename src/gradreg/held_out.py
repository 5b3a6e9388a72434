"""Whether a penalty helps: a switch that follows what its correction does to the loss of data that are held out of training.

A step with gradient G in place of g changes a held-out loss, to first order, by −lr·⟨G − g, h⟩ more than the plain step, with h the
gradient of that loss; and ⟨g, h⟩ against ‖g‖² tells whether the training set has been used up, so that there is overfitting to prevent.
``HeldOut`` holds the rule by which these measurements switch the strength off and on. It is written once: its arithmetic is that of
``torch`` or of ``jax.numpy``, on scalars that stay on the accelerator, or of Python.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from gradreg import checks

_FEWEST = 4.0
"""Independent measurements' worth from which a standard error is believed."""
_FASTER = 4.0
"""How much shorter the memory of the products' size is than that of their average."""
_LARGEST = 5.0
"""Of a product, in units of the average size of those before it."""


class HelpState(NamedTuple):
    """What is carried from one measurement to the next of one kind, as scalars: exponentially weighted sums, and the switch.

    Args:
        mean: of the measured numbers, each in units of the scale before it.
        square: of their squares, in the same units.
        weight: of 1: what ``mean`` must be divided by while there are few measurements.
        weight_squares: of the squared weights: weight² / weight_squares measurements of equal weight would be as good.
        scale: the average size of the last ones, 0 before the first.
        helps: 1 while they are for the penalty, 0 while they are against it.
    """

    mean: Any
    square: Any
    weight: Any
    weight_squares: Any
    scale: Any
    helps: Any


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The rule by which held-out gradients switch a penalty off and on: ``GradientRegularizer(model, penalty, held_out=HeldOut(every=5))``.

    At every ``every``-th penalized step ``s = ⟨G − g, h⟩`` is measured, with G the regularized and g the plain gradient of the step's
    batch, and h that of the held-out loss at the same parameters: positive where regularizing lowers the held-out loss more than the
    plain step does. (Not their cosine: dividing by the length of each correction can turn the sign of the mean, where few batches
    make most of it.) One such product is mostly noise, of the two batches, so what counts is the average of the last ``memory`` ones
    and its standard error. The size of the products can fall by a hundred in the course of a training, as gradients and their noise do,
    so each counts in units of the average size of those before it (over a quarter of ``memory``); else those of the first epochs would hide
    for hundreds of steps what the later ones say. With m and e of the products in these units::

        off where   m < −off · e          on again where   m > on · e

    and nothing between them changes the switch. It judges from five measurements on. A decision holds from the next
    measurement on, so that nothing is waited for on an accelerator. While the penalty is off, steps are plain, and those that measure
    compute what it would do and give the plain gradient; so it comes back where it begins to help.

    Its horizon is one step: what costs held-out loss now and pays later (a strong penalty at the start of training) counts as harm, and
    what lowers it now and costs later (every step of a penalty on a network that underfits) as help. So there is a second condition,
    with ``steps_per_epoch`` n: the penalty waits until there is something to prevent. A batch's gradient is the mean gradient ḡ and
    noise, E‖g‖² = ‖ḡ‖² + tr(C)/B and E⟨g, h⟩ = ‖ḡ‖², so that::

        r = (‖g‖² − ⟨g, h⟩) / (n·⟨g, h⟩)        estimates        tr(C)/N / ‖ḡ‖²

    with N = nB training samples: what the accident of which were drawn adds to the squared length of the gradient over all of them, in
    units of what is left without it. While r is small, following that gradient generalizes; where it is not, the samples themselves are
    being learned. The penalty begins off, and is on where ‖g‖² − (1 + noise·n)·⟨g, h⟩ is positive on average, by the same rule, judged
    once half of ``memory`` has been measured: at initialization ḡ can be short because nothing has been found yet. Where nothing is
    seen twice n has no bound, and it stays off. Both gradients should be those of one loss: what only the training loss has
    (augmentation, mixup, flooding) counts as noise.

    A learning rate that falls to 0 lets every network converge: ḡ becomes short and r large without any overfitting, and little of the
    learning is left that a penalty could change. So with ``latest`` a penalty that has not begun by then does not begin any more.

    Args:
        every: penalized steps from one measurement to the next, ≥ 1.
        memory: how many measurements the averages reach back, ≥ 4: their decay is 1 − 1 / memory.
        off: standard errors below 0 at which it switches off, > 0.
        on: standard errors above 0 at which it switches on again, ≥ 0.
        steps_per_epoch: optimizer steps in which every training sample is seen once, ≥ 1; None for the first condition alone.
        noise: what r must exceed, > 0. Chosen on other seeds than those reported (``docs/choosing.md``).
        latest: penalized steps after which the second condition switches nothing on any more, > ``earliest``; needs ``steps_per_epoch``.
            Recipes set two thirds of their steps. None: it can always begin.

    Cost: 1 / ``every`` of an evaluation of the held-out loss a step, and while the penalty is off that share of its own passes. Memory, at
    steps that measure: four copies of the gradients.
    Source: ours; Wang et al. 2024 (LETS, arXiv 2408.08222; ``gradreg.LETS``) adapt the radius by a hypergradient of the squared gap
    between two losses, and Mahsereci et al. 2017 (arXiv 1703.09580) stop training where the gradient is no longer than its sampling
    noise, which they measure by the variance over a batch.

    Five products of −0.2 and −0.4 have the mean −0.28 and the standard error 0.05, here in units of 0.2:

    >>> from gradreg.auto_radius import NUMBERS
    >>> rule = HeldOut(memory=1000)
    >>> state = rule.initial
    >>> for product in (-0.2, -0.4, -0.2, -0.4, -0.2):
    ...     state = rule.update(state, product, NUMBERS)
    >>> state.helps, round(state.scale, 1), round(state.mean / state.weight, 1)
    (0.0, 0.2, -1.4)
    """

    every: int = 10
    memory: int = 20
    off: float = 2.0
    on: float = 1.0
    steps_per_epoch: int | None = None
    noise: float = 0.07
    latest: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "every", checks.whole("every", self.every, minimum=1))
        object.__setattr__(self, "memory", checks.whole("memory", self.memory, minimum=4))
        object.__setattr__(self, "off", checks.positive("off", self.off, remedy="Leave held_out out to never switch off."))
        object.__setattr__(self, "on", checks.non_negative("on", self.on))
        if self.steps_per_epoch is not None:
            object.__setattr__(self, "steps_per_epoch", checks.whole("steps_per_epoch", self.steps_per_epoch, minimum=1))
        object.__setattr__(self, "noise", checks.positive("noise", self.noise, remedy="Leave steps_per_epoch out to wait for nothing."))
        if self.latest is not None:
            object.__setattr__(self, "latest", checks.whole("latest", self.latest, minimum=0))
            if self.steps_per_epoch is None:
                raise ValueError(
                    f"latest must be None without steps_per_epoch, because nothing is waited for; got {self.latest}. Pass the batches of "
                    "an epoch as steps_per_epoch."
                )
            if self.latest <= self.earliest:
                raise ValueError(
                    f"latest must be > {self.earliest}, the penalized steps before which nothing is judged; got {self.latest}. Pass a "
                    f"later one, measure more often than every {self.every} steps, or pass a shorter memory than {self.memory}."
                )

    @property
    def earliest(self) -> int:
        """The penalized steps before the measurement at which the second condition is judged for the first time."""
        # Of k measurements the weights (1 − 1/m)^age are worth (1 − x)/(1 + x)·(2m − 1) of equal weight, with x = (1 − 1/m)^k.
        worth, decay = 2 * self.memory - 1, 1.0 - 1.0 / self.memory
        needed = math.log((worth - self._fewest) / (worth + self._fewest)) / math.log(decay)
        return self.every * math.floor(needed)

    @property
    def _fewest(self) -> float:
        """Independent measurements' worth from which the second condition is judged."""
        return max(_FEWEST, self.memory / 2)

    @property
    def initial(self) -> HelpState:
        """The state before the first measurement, as Python numbers."""
        return HelpState(0.0, 0.0, 0.0, 0.0, 0.0, 1.0)

    @property
    def waiting(self) -> HelpState | None:
        """The same for the second condition, which is not met before it has been measured; None without ``steps_per_epoch``."""
        return None if self.steps_per_epoch is None else self.initial._replace(helps=0.0)

    def excess(self, square: Any, product: Any) -> Any:
        """What the second condition averages, from ‖g‖² and ⟨g, h⟩: positive where r exceeds ``noise``.

        Raises:
            ValueError: without ``steps_per_epoch``.
        """
        if self.steps_per_epoch is None:
            raise ValueError("steps_per_epoch must be given for the second condition; got None. Pass the batches of an epoch.")
        return square - (1.0 + self.noise * self.steps_per_epoch) * product

    def wait(self, state: HelpState, excess: Any, penalized: Any, ops: Any) -> HelpState:
        """The state of the second condition after a measurement, which ``penalized`` steps came before; see ``update``."""
        after = self.update(state, excess, ops, fewest=self._fewest)
        if self.latest is None:
            return after
        early = (penalized < self.latest) * 1.0  # by arithmetic, because under JAX the number is traced
        return after._replace(helps=after.helps * (early + (1.0 - early) * state.helps))

    def update(self, state: HelpState, product: Any, ops: Any, *, fewest: float = _FEWEST) -> HelpState:
        """The state of one condition after a measurement; one that is not finite (a zero correction, an overflow) changes nothing.

        Args:
            state: the state before it.
            product: what it measured: ⟨G − g, h⟩, or ``excess``.
            ops: ``torch``, ``jax.numpy`` or ``gradreg.auto_radius.NUMBERS``; the numbers are its scalars.
            fewest: more than so many independent measurements' worth are needed to judge.
        """
        known = ops.isfinite(product)
        product = ops.where(known, product, 0.0)
        fresh = 1.0 / self.memory
        kept = 1.0 - fresh
        size = ops.where(product < 0.0, -product, product)
        before = ops.where(state.scale > 0.0, state.scale, size)
        # In units of what was known before it, so that its own size does not weigh it: the sign of the mean stays. Where it is far out of
        # these units (after a warm-up, say), they grow, and what was measured before is told in the new ones.
        unit = ops.where(size > _LARGEST * before, size / _LARGEST, before)
        unit = ops.where(unit > 0.0, unit, 1.0)
        shrunk, s = before / unit, product / unit
        mean, square = kept * shrunk * state.mean + fresh * s, kept * shrunk * shrunk * state.square + fresh * s * s
        scale = unit + min(1.0, _FASTER * fresh) * (size - unit)
        weight, weight_squares = kept * state.weight + fresh, kept * kept * state.weight_squares + fresh * fresh
        number = weight * weight / weight_squares
        average = mean / weight
        spread = square / weight - average * average
        variance = ops.where(spread > 0.0, spread, 0.0) / ops.where(number > 1.0, number - 1.0, 1.0)  # of the mean: spread·n/(n−1)/n
        error = ops.sqrt(variance)
        judges = number > fewest
        helps = ops.where(judges & (average < -self.off * error), 0.0, state.helps)
        helps = ops.where(judges & (average > self.on * error), 1.0, helps)
        after = HelpState(mean, square, weight, weight_squares, scale, helps)
        return HelpState(*(ops.where(known, new, old) for new, old in zip(after, state, strict=True)))
