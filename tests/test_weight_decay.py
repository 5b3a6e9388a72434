"""AutoL2 against a twin transcribed from its description, and the prediction of λ."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gradreg
from gradreg import AutoL2, predict_l2

Trace = list[tuple[float, float]]


def twin(trace: Trace, *, every: int = 10) -> list[tuple[int, float]]:
    """The authors' schedule in their own lists: (step, λ after it) for each decay."""
    l2, last_decay, lowest, highest = 0.1, 0, math.inf, -math.inf
    losses: list[float] = []
    accuracies: list[float] = []
    decays = []
    for k, (loss, accuracy) in enumerate(trace):
        i = k * every
        losses.append(loss)
        accuracies.append(accuracy)
        worse = losses[-1] >= lowest and losses[-2:][0] >= lowest
        lower = accuracies[-1] <= highest and accuracies[-2:][0] <= highest
        if i > 0.1 / l2 + last_decay and len(losses) > 2 and (worse or lower):
            l2 = l2 / 10
            last_decay = i
            decays.append((i, l2))
        elif len(losses) >= 2:
            lowest = min(lowest, losses[-2])
            highest = max(highest, accuracies[-2])
    return decays


def decays(auto: AutoL2, trace: Trace, *, every: int = 10) -> list[tuple[int, float]]:
    """The same of ``auto``, called at every step."""
    found, before = [], auto.l2
    for step in range(len(trace) * every):
        loss, accuracy = trace[step // every] if step % every == 0 else (math.nan, math.nan)
        now = auto.update(step, loss, accuracy)
        if now != before:
            found.append((step, now))
        before = now
    return found


# Few different values, so that ties (where >= and > differ) are frequent; and free ones.
EXAMPLES = settings.default.max_examples
_coarse = st.tuples(st.integers(0, 4).map(float), st.integers(0, 4).map(lambda n: n / 4))
_free = st.tuples(st.floats(0, 10), st.floats(0, 1))


@settings(max_examples=2 * EXAMPLES)
@given(st.lists(_coarse, min_size=1, max_size=160) | st.lists(_free, min_size=1, max_size=160))
def test_decays_where_the_description_does(trace: Trace) -> None:
    assert decays(AutoL2(), trace) == twin(trace)


@settings(max_examples=3 * EXAMPLES // 5)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 0.4))
def test_decays_where_the_description_does_on_learning_curves(seed: int, scatter: float) -> None:
    import random

    draw = random.Random(seed)
    trace = [(2.3 * math.exp(-k / 40) + draw.gauss(0, scatter), 1 - math.exp(-k / 30) + draw.gauss(0, scatter)) for k in range(300)]
    assert decays(AutoL2(), trace) == twin(trace)
    assert twin(trace)  # a trace on which nothing happens would prove nothing


@settings(max_examples=3 * EXAMPLES // 5)
@given(st.lists(_coarse, min_size=2, max_size=60), st.data())
def test_goes_on_from_its_state_as_if_never_stopped(trace: Trace, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(trace) - 1))
    options = {
        "trigger": data.draw(st.sampled_from(["loss", "accuracy", "either", "both"])),
        "smoothing": data.draw(st.sampled_from([0.0, 0.5])),
    }
    straight, first, second = AutoL2(measure_every=1, **options), AutoL2(measure_every=1, **options), AutoL2(measure_every=1, **options)
    expected = [straight.update(i, *m) for i, m in enumerate(trace)]
    got = [first.update(i, *m) for i, m in enumerate(trace[:at])]
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    got += [second.update(i, *m) for i, m in enumerate(trace) if i >= at]
    assert got == expected
    assert second.state_dict() == straight.state_dict()


def falling(n: int) -> Trace:
    return [(1.0 / (k + 1), k / n) for k in range(n)]


def test_improving_measurements_never_decay_it() -> None:
    assert decays(AutoL2(), falling(200)) == []


@pytest.mark.parametrize(
    ("trigger", "stalls", "decayed"),
    [
        ("loss", "loss", True),
        ("loss", "accuracy", False),
        ("accuracy", "accuracy", True),
        ("accuracy", "loss", False),
        ("either", "loss", True),
        ("either", "accuracy", True),
        ("both", "loss", False),
        ("both", "accuracy", False),
        ("both", "loss accuracy", True),
    ],
)
def test_each_trigger_listens_to_its_quantities(trigger: str, stalls: str, decayed: bool) -> None:
    trace = [(1.0 if "loss" in stalls else loss, 0.5 if "accuracy" in stalls else accuracy) for loss, accuracy in falling(40)]
    assert bool(decays(AutoL2(trigger=trigger), trace)) is decayed  # type: ignore[arg-type]


def test_a_trigger_needs_only_its_own_measurement() -> None:
    assert AutoL2(trigger="loss").update(0, loss=1.0) == 0.1
    assert AutoL2(trigger="accuracy").update(0, accuracy=1.0) == 0.1


def test_refractory_time_is_refractory_over_l2() -> None:
    stalled = [(1.0, 0.5)] * 400
    # Step 20 is the first with three measurements; then 10 steps at 0.01, 100 at 0.001, 1000 at 1e-4, each to be exceeded.
    assert [step for step, _ in decays(AutoL2(), stalled)] == [20, 40, 150, 1160]


def test_refractory_time_on_the_clock_divides_by_the_learning_rate() -> None:
    stalled = [(1.0, 0.5)] * 400
    steps = [step for step, _ in decays(AutoL2(learning_rate=0.1), stalled)]
    assert steps == [20, 130, 1140]  # 10 steps, then 100 and 1000 exceeded


def test_minimum_is_a_floor() -> None:
    stalled = [(1.0, 0.5)] * 400
    assert [l2 for _, l2 in decays(AutoL2(minimum=0.004), stalled)] == [0.01, 0.004]


def test_smoothing_outvotes_single_measurements() -> None:
    noisy = [
        (loss + (0.05 if k % 3 == 0 else 0.0), accuracy) for k, (loss, accuracy) in enumerate((2.0 - 0.01 * k, k / 99) for k in range(99))
    ]
    slow = [(loss if k % 7 else loss + 0.1, accuracy) for k, (loss, accuracy) in enumerate(noisy)]
    assert len(decays(AutoL2(smoothing=0.9), slow)) < len(decays(AutoL2(), slow))


def test_a_refused_measurement_changes_nothing() -> None:
    auto = AutoL2()
    auto.update(0, 1.0, 0.5)
    before = auto.state_dict()
    with pytest.raises(ValueError, match=r"loss must be a number and finite; got nan"):
        auto.update(10, math.nan, 0.5)
    with pytest.raises(TypeError, match=r"accuracy must be a number; got None"):
        auto.update(10, 1.0)
    with pytest.raises(ValueError, match=r"step must rise from call to call; got 0 after 0"):
        auto.update(0, 1.0, 0.5)
    assert auto.state_dict() == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"initial": -0.1}, ValueError, r"initial must be finite and > 0; got -0.1\. 0\.1 is the authors' start"),
        ({"initial": "0.1"}, TypeError, r"initial must be a number > 0; got '0.1' \(str\)\. Remove the quotes"),
        ({"refractory": 0}, ValueError, r"refractory must be finite and > 0; got 0\."),
        ({"refractory": -1.0}, ValueError, r"refractory must be finite and > 0; got -1.0\."),
        ({"factor": 1.0}, ValueError, r"factor must be < 1, so that the coefficient falls; got 1.0\."),
        ({"measure_every": 0}, ValueError, r"measure_every must be >= 1; got 0\."),
        ({"trigger": "acuracy"}, ValueError, r"unknown trigger 'acuracy'\. Did you mean 'accuracy'\?"),
        ({"minimum": 0.2}, ValueError, r"minimum must be <= initial, which is 0.1; got 0.2\."),
        ({"minimum": -1e-6}, ValueError, r"minimum must be finite and >= 0; got -1e-06\."),
        ({"smoothing": 1.0}, ValueError, r"smoothing must be < 1; got 1.0\."),
        ({"learning_rate": 0.0}, ValueError, r"learning_rate must be finite and > 0; got 0.0\. Use None"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AutoL2(**options)  # type: ignore[arg-type]


def test_a_state_of_other_settings_is_refused() -> None:
    with pytest.raises(ValueError, match=r"same settings; got factor 0.5 where this one has 0.1"):
        AutoL2().load_state_dict(AutoL2(factor=0.5).state_dict())
    with pytest.raises(ValueError, match=r"got one without l2"):
        AutoL2().load_state_dict({k: v for k, v in AutoL2().state_dict().items() if k != "l2"})


def test_predicted_l2_puts_the_best_step_at_the_end_of_the_budget() -> None:
    # c = 0.5 · 0.2 · 30 = 3, and 3 / (0.5 · 6000) = 1e-3.
    assert predict_l2(0.5, probe_l2=0.2, best_step=30, budget_steps=6000) == pytest.approx(1e-3, rel=1e-12)
    assert predict_l2(0.5, probe_l2=0.2, best_step=30, budget_steps=6000, momentum=0.9) == pytest.approx(1e-3, rel=1e-12)
    # A budget at half the learning rate needs twice the coefficient.
    assert predict_l2(0.5, 0.2, 30, 6000, budget_learning_rate=0.25) == pytest.approx(2e-3, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probe_l2": -0.1}, r"probe_l2 must be finite and > 0; got -0.1\. The probe needs a large coefficient"),
        ({"learning_rate": 0.0}, r"learning_rate must be finite and > 0; got 0.0"),
        ({"best_step": 0}, r"best_step must be >= 1; got 0\. A best accuracy at step 0"),
        ({"budget_steps": 50}, r"budget_steps must not be shorter than the probe, 100 steps; got 50\."),
        ({"budget_steps": 150, "probe_steps": 200}, r"budget_steps must not be shorter than the probe, 200 steps; got 150\."),
        ({"probe_steps": 100}, r"best_step must be < probe_steps, 100; got 100\. The accuracy still rose when the probe ended"),
        ({"momentum": 1.0}, r"momentum must be < 1; got 1.0"),
    ],
)
def test_predictions_from_bad_probes_are_refused(changes: dict[str, float], message: str) -> None:
    arguments = {"learning_rate": 0.1, "probe_l2": 0.1, "best_step": 100, "budget_steps": 1000}
    with pytest.raises(ValueError, match=message):
        predict_l2(**{**arguments, **changes})  # type: ignore[arg-type]


def test_importing_the_names_loads_no_framework() -> None:
    code = "import sys, gradreg; gradreg.AutoL2(); print([m for m in ('torch', 'jax', 'numpy', 'optax') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    assert {"AutoL2", "predict_l2", "DecayClock", "l2_from_authors", "l2_to_authors"} <= set(gradreg.__all__)
