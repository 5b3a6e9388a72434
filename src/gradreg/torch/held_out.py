"""The held-out gradient of a step, and the switch between steps by which it tells whether a penalty helps.

The rules are those of ``gradreg.held_out``, and of ``gradreg.lets`` for a radius that is learned from held-out data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradreg import checks
from gradreg.auto_radius import NUMBERS
from gradreg.held_out import HeldOut, HelpState
from gradreg.lets import LETS
from gradreg.torch import norms
from gradreg.torch.closures import Evaluator
from gradreg.torch.gradients import ByParameter, Gradients
from gradreg.torch.norms import norm_of_shards
from gradreg.torch.parallel import Parallelism

_COUNT, _HELPS, _NOISE = "count", "helps_now", "noise"


class Measured(NamedTuple):
    """What one step measured."""

    product: float | Tensor
    """⟨G − g, h⟩, without the loss scale; NaN if one of them is 0 or not finite."""
    excess: float | Tensor | None
    """``HeldOut.excess``; None without a second condition."""


class HelpControl:
    """The switch of a ``HeldOut`` from step to step; nothing here waits for the device.

    On an accelerator the averages are there, as scalar tensors, and what they decide is copied to the host while training goes on. It is
    read at the next measurement, on a CPU too, so that runs do not depend on the device.

    Args:
        rule: the specification.
        parameters: the averages are on the device of the first, in float64 if one of them is.
    """

    def __init__(self, rule: HeldOut, parameters: Sequence[nn.Parameter]) -> None:
        self.rule = rule
        self.helps = rule.waiting is None
        """Whether the penalty is on in the next step."""
        self._first = parameters[0]
        self._dtype = torch.float64 if any(p.dtype in (torch.float64, torch.complex128) for p in parameters) else torch.float32
        self._state = rule.initial
        self._waiting = rule.waiting
        self._decided: _Decision | None = None
        self._count = 0

    @property
    def was_used(self) -> bool:
        """Whether anything has been measured, so that there is a state to save."""
        return self._count > 0

    @property
    def is_due(self) -> bool:
        """Whether the next penalized step measures."""
        return self._count % self.rule.every == 0

    def begin_measurement(self) -> None:
        """Let the last measurement's decision hold from now on."""
        if self._decided is not None:
            self.helps, self._decided = self._decided.read(), None

    def commit(self, measured: Measured | None) -> None:
        """After a penalized step that succeeded: count it, with what it measured, if it did."""
        before = self._count
        self._count += 1
        if measured is None:
            return
        self._state = self.rule.update(*self._together(self._state, measured.product))
        if self._waiting is not None and measured.excess is not None:
            state, excess, ops = self._together(self._waiting, measured.excess)
            self._waiting = self.rule.wait(state, excess, before, ops)
        self._decide()

    def _together(self, state: HelpState, measured: float | Tensor) -> tuple[HelpState, float | Tensor, Any]:
        """A state and what was measured, as scalars of one kind, and the operations on them."""
        if isinstance(measured, Tensor):
            return HelpState(*(self._here(number) for number in state)), self._here(measured), torch
        return state, measured, NUMBERS

    def _decide(self) -> None:
        self._decided = _Decision(self._state.helps if self._waiting is None else self._state.helps * self._waiting.helps)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers."""
        waiting = {} if self._waiting is None else {_NOISE: _plain(self._waiting)}
        return {**_plain(self._state), **waiting, _COUNT: self._count, _HELPS: self.helps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError, TypeError: other keys or values.
        """
        averages = _checked("held_out", state, [_COUNT, _HELPS] if self._waiting is None else [_NOISE, _COUNT, _HELPS])
        waiting = None if self._waiting is None else _checked(f"held_out.{_NOISE}", state[_NOISE], [])
        count, helps = checks.whole(_COUNT, state[_COUNT], minimum=0), checks.flag(_HELPS, state[_HELPS])
        self._state, self._waiting, self._count, self.helps = averages, waiting, count, helps
        self._decide()

    def _here(self, number: Any) -> Tensor:
        return torch.as_tensor(number, dtype=self._dtype, device=self._first.device)


def _plain(state: HelpState) -> dict[str, float]:
    return {name: float(value) for name, value in state._asdict().items()}


def _checked(name: str, state: Any, others: Sequence[str]) -> HelpState:
    known = [*HelpState._fields, *others]
    if not isinstance(state, Mapping) or set(state) != set(known):  # pyright: ignore[reportUnknownArgumentType]  # a checkpoint's
        if isinstance(state, Mapping) and set(state) ^ set(known) == {_NOISE}:  # pyright: ignore[reportUnknownArgumentType]
            other = "without" if _NOISE in known else "with"
            raise ValueError(
                f"{name} must be the state of the same rule; got one of a HeldOut {other} steps_per_epoch. Build the regularizer with that."
            )
        got = sorted(state) if isinstance(state, Mapping) else checks.describe(state)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        raise ValueError(f"{name} must hold {' and '.join(known)}; got {got}. Pass what state_dict() returned.")
    return HelpState(*(checks.real(field, state[field]) for field in HelpState._fields))


class _Decision:
    """0 or 1, on its way from the device to the host."""

    def __init__(self, helps: float | Tensor) -> None:
        self._helps, self._event = helps, None
        if isinstance(helps, Tensor) and helps.device.type != "cpu":
            self._helps = helps.to("cpu", non_blocking=True)
            self._event = torch.Event(helps.device)
            self._event.record()

    def read(self) -> bool:
        """The decision, made many steps ago: it has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._helps) > 0.5


class HeldOutMeasurement:
    """What one step measures: begun by the held-out gradient, given the plain gradient by the step, and completed by its result.

    Args:
        evaluator: evaluates the held-out closures.
        gradients: reads and writes ``.grad``, which is empty.
        parallelism: averages gradients over ranks.
    """

    def __init__(self, evaluator: Evaluator, gradients: Gradients, parallelism: Parallelism) -> None:
        self._gradients, self._parallelism = gradients, parallelism
        self._trainable = evaluator.trainable
        with evaluator.leaving_no_trace():
            evaluator.run("loss", 1.0, synchronise=True)
        self._loss, _ = evaluator.first_values()
        gradients.redistribute()
        self._held_out = self._copies(1.0)
        gradients.clear()
        self._plain: ByParameter = {}
        self._scale = evaluator.scale(self._trainable[0])

    @torch.no_grad()
    def add_plain(self, weight: float | Tensor) -> None:
        """Keep what ``.grad`` holds, ``weight`` times the plain gradient of the step or of one of its micro-batches."""
        here = self._copies(1.0 / weight)
        for p, gradient in here.items():
            self._plain[p] = self._plain[p] + gradient if p in self._plain else gradient

    @torch.no_grad()
    def measured(self, rule: HeldOut, correction: ByParameter, *, averaged: bool) -> Measured:
        """What the step measured, with the held-out gradient h.

        Args:
            rule: the specification.
            correction: G − g where the step has kept it apart, else empty: then ``.grad`` holds G.
            averaged: whether the plain gradient is that of all ranks already.
        """
        change = self._change(correction, averaged=averaged)
        held_out_length = _length(self._held_out)
        product = self._with_held_out(change, _length(change), held_out_length) / self._scale_of(correction)
        excess = None
        if rule.waiting is not None:
            length = _length(self._plain)
            excess = rule.excess(length.square(), self._with_held_out(self._plain, length, held_out_length))
        if norms.reading_is_free(self._trainable[0]):
            return Measured(float(product), None if excess is None else float(excess / self._scale**2))
        return Measured(product, None if excess is None else excess / self._scale**2)

    @torch.no_grad()
    def slope(self, rule: LETS, correction: ByParameter, loss: Tensor, *, averaged: bool) -> float | Tensor:
        """What a radius that is learned follows, the same on all ranks: see ``LETS.slope`` and ``Slope``.

        Args:
            rule: the specification.
            correction: as ``measured``'s.
            loss: that of the step's first pass.
            averaged: as ``measured``'s.
        """
        change = self._change(correction, averaged=averaged)
        between = self._held_out  # copies of its own, which are not needed any more
        for p, gradient in self._plain.items():
            between[p] = between[p].sub_(gradient) if p in between else -gradient
        both = [p for p in change if p in between]
        length, changed = _length(between), _length(change)
        product = _inner([between[p] for p in both], [change[p] for p in both], both, (length, changed)) / self._scale_of(correction)
        losses = torch.stack([one.to(product.device, product.dtype) for one in (self._loss, loss)])
        held_out_loss, training_loss = self._parallelism.mean_over_ranks(losses).unbind()
        slope = rule.slope(held_out_loss, training_loss, product)
        slope = torch.where(torch.isfinite(slope), slope, torch.nan)
        slope = torch.where(torch.isfinite(length + training_loss) & ~torch.isfinite(changed), torch.inf, slope)
        return float(slope) if norms.reading_is_free(self._trainable[0]) else slope

    def _scale_of(self, correction: ByParameter) -> float | Tensor:
        """The loss scale in a product of a gradient and the change, which is kept apart without it."""
        return self._scale if correction else self._scale**2

    def _change(self, correction: ByParameter, *, averaged: bool) -> ByParameter:
        """G − g, with g averaged over the ranks."""
        if not averaged and self._parallelism.averages:
            whole = [self._plain.get(p, torch.zeros_like(p, requires_grad=False)) for p in self._trainable]
            self._parallelism.average(whole, self._trainable)
            self._plain = dict(zip(self._trainable, whole, strict=True))
        change = correction
        if not change:
            self._gradients.redistribute()
            change = dict(self._gradients.shards())
            for p, gradient in self._plain.items():
                change[p] = change[p] - gradient if p in change else -gradient
        return change

    def _with_held_out(self, vectors: ByParameter, length: Tensor, held_out_length: Tensor) -> Tensor:
        both = [p for p in vectors if p in self._held_out]
        return _inner([vectors[p] for p in both], [self._held_out[p] for p in both], both, (length, held_out_length))

    @torch.no_grad()
    def put_plain(self) -> None:
        """Let ``.grad`` hold the plain gradient in place of the result."""
        for p, result in self._gradients.of(self._trainable).items():
            (into,) = norms.local_shards([result])
            into.copy_(self._plain[p]) if p in self._plain else into.zero_()
            if result is not p.grad:  # a sparse gradient, of which ``result`` is a dense copy
                p.grad = result

    def _copies(self, factor: float | Tensor) -> ByParameter:
        shards = self._gradients.shards()
        with torch.no_grad():
            return dict(zip(shards, torch._foreach_mul(list(shards.values()), factor), strict=True)) if shards else {}


def _length(vectors: ByParameter) -> Tensor:
    return norm_of_shards(list(vectors.values()), list(vectors))


def _inner(first: list[Tensor], second: list[Tensor], like: Sequence[Tensor], lengths: tuple[Tensor, Tensor]) -> Tensor:
    """⟨a, b⟩, of vectors of one length, so that nothing cancels where one is much longer than the other.

    ``lengths``: about ‖a‖ and ‖b‖. Memory: one more vector; of numbers in 16 bits two, in 32.
    """
    if not first:
        return torch.full((), torch.nan, device=lengths[0].device)
    first, second = ([t.float() if t.dtype in norms.LOW_PRECISION else t for t in vectors] for vectors in (first, second))
    squares = [(norm_of_shards(vectors, like) / length).square() for vectors, length in zip((first, second), lengths, strict=True)]
    difference = list(torch._foreach_mul(second, lengths[0] / lengths[1]))
    torch._foreach_sub_(difference, first)
    apart = (norm_of_shards(difference, like) / lengths[0]).square()
    return (squares[0] + squares[1] - apart) / 2 * lengths[0] * lengths[1]
