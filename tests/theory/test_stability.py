"""The map against simulation and against the engine, and where power 1 settles."""

import numpy as np
import pytest
import torch

import gradreg
from gradreg.theory.advice import MeasuredCurvature, advise
from gradreg.theory.stability import (
    Fate,
    fate,
    largest_gamma,
    sam_edge,
    settle,
    settling_distance,
    sharpest_stable_curvature,
    simulated_fate,
    trapping_curvature,
)
from gradreg.torch import GradientRegularizer


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("rate", [0.05, 0.4])
def test_theory_and_simulation_draw_the_same_map(rate, momentum):
    span = 2.4 * (1 + momentum) / rate
    h, gamma = np.linspace(-span, span, 82), np.linspace(0.0, 7.9 / span, 41)[:, None]
    theory = fate(h, gamma, learning_rate=rate, momentum=momentum)
    assert set(np.unique(theory)) == set(Fate)
    assert (theory == simulated_fate(h, gamma, learning_rate=rate, momentum=momentum)).all()


def engine_path(penalty, curvatures, start, rate, steps, momentum=0.0):
    """Iterates of a quadratic under the PyTorch engine."""
    h = torch.tensor(curvatures, dtype=torch.float64)
    model = torch.nn.Module()
    model.p = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    regularizer, optimizer = GradientRegularizer(model, penalty), torch.optim.SGD([model.p], lr=rate, momentum=momentum)
    for _ in range(steps):
        optimizer.zero_grad()
        regularizer.backward(lambda: (h * model.p**2).sum() / 2)
        optimizer.step()
    return model.p.detach().numpy()


@pytest.mark.parametrize(
    "penalty",
    [
        gradreg.fgr(gamma=0.5, epsilon=0.3),
        gradreg.bgr(gamma=0.5, epsilon=0.3),
        gradreg.cgr(gamma=0.5, epsilon=0.3),
        gradreg.exact(gamma=0.5),
    ],
    ids=str,
)
def test_the_engines_differences_all_meet_the_fate_of_the_map(penalty):
    curvatures = [1.0, 2.0, 4.0, -1.0, -3.0, -5.0]
    end = np.abs(engine_path(penalty, curvatures, [1e-3] * 6, 0.3, 60))
    grown = end > 1e-3
    fates = fate(curvatures, 0.5, learning_rate=0.3)
    assert [Fate(f) in (Fate.DIVERGES, Fate.ESCAPES) for f in fates] == grown.tolist()
    assert {Fate.SETTLES, Fate.DIVERGES, Fate.ESCAPES, Fate.TRAPPED} == {Fate(f) for f in fates}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("curvature", [0.7, 3.0, -0.7, -3.0])
def test_the_largest_gamma_is_where_the_fate_changes(curvature, momentum):
    limit = largest_gamma(curvature, learning_rate=0.3, momentum=momentum)
    below, above = fate(curvature, [limit * 0.999, limit * 1.001], learning_rate=0.3, momentum=momentum)
    assert (below, above) == ((Fate.SETTLES, Fate.DIVERGES) if curvature > 0 else (Fate.ESCAPES, Fate.TRAPPED))


@pytest.mark.parametrize("momentum", [0.0, 0.3])
@pytest.mark.parametrize("penalty", [gradreg.sam(rho=0.2), gradreg.gnp(r=0.4, alpha=0.7), gradreg.exact(gamma=0.3, power=1)], ids=str)
def test_the_engines_sam_and_gnp_settle_where_predicted(penalty, momentum):
    end = engine_path(penalty, [2.0, 1.0, 0.5], [0.3, 0.4, 0.2], 0.3, 600, momentum)
    predicted = settling_distance(2.0, penalty.strength_at(0), learning_rate=0.3, momentum=momentum)
    assert np.linalg.norm(end) == pytest.approx(predicted, rel=1e-9)
    assert np.abs(end[1:]).max() < 1e-9


def test_settle_follows_the_same_path_as_the_formula_and_knows_the_sharpest_direction():
    run = settle([0.5, 2.0, 1.0], 0.2, learning_rate=0.3)
    assert run.distance[-1] == pytest.approx(run.predicted, rel=1e-9)
    assert run.alignment[-1] == pytest.approx(1.0)
    assert settle([1.0], 0.0, learning_rate=0.5).distance[-1] == 0.0


@pytest.mark.parametrize("strength", [0.05, 0.5])
@pytest.mark.parametrize("share", [0.8, 1.25])
def test_sam_is_trapped_at_saddles_sharper_than_the_trapping_curvature(share, strength):
    trap = trapping_curvature(2.0, learning_rate=0.3)
    end = engine_path(gradreg.sam(rho=strength), [2.0, -share * trap], [0.05, 1e-9], 0.3, 200)
    assert (abs(end[1]) < 1e-9) == (share > 1)


def test_advice_names_what_is_too_large_and_the_value_that_would_do():
    def problems(penalty, **changed):
        settings = {"learning_rate": 0.5, "largest_curvature": 1.0, **changed}
        return advise(penalty, **settings).problems

    assert problems(gradreg.fgr(gamma=0.5, epsilon=0.5)) == ()
    assert "a trap; stay below 0.25" in problems(gradreg.fgr(gamma=0.5, epsilon=0.5), smallest_curvature=-4.0)[0]
    assert problems(gradreg.exact(gamma=0.5)) == ()
    assert "settles 0.0333 from the minimum, not 0.01; stay below 0.03" in problems(gradreg.sam(rho=0.1), tolerated_distance=0.01)[0]
    assert problems(gradreg.sam(rho=0.1), smallest_curvature=-0.5) == ()  # a quadratic's trap at any strength is a note: see below
    assert "unstable at curvature 5 without any penalty" in problems(gradreg.sam(rho=0.1), largest_curvature=5.0)[0]
    late = gradreg.fgr(gamma=0.5, epsilon=0.5).warmup("zero", steps=10)
    assert problems(late, step=0, smallest_curvature=-4.0) == ()
    assert problems(late, step=10, smallest_curvature=-4.0) != ()


def test_a_strength_that_leaves_sharp_minima_is_not_too_large():
    """README's example: F-GR at the strength that README recommends. On its digits the curvature falls from about 5 to below 2 with it."""
    found = advise(gradreg.fgr(gamma=0.5, epsilon=0.5), learning_rate=0.1, momentum=0.9, largest_curvature=30.0, smallest_curvature=-1.0)
    assert found.problems == ()
    assert found.stable_curvature == pytest.approx(np.sqrt(77) - 1)  # h + h²/2 = 38
    leaves, rough = found.notes
    assert "leaves minima stable up to curvature 7.77 with learning rate 0.1, so training will leave one of 30" in leaves
    assert "below gamma 0.00889 it could stay" in leaves
    assert "looks 3.89 times as far as the minimum of curvature 7.77" in rough
    assert advise(gradreg.fgr(gamma=0.5, epsilon=0.1), learning_rate=0.1, momentum=0.9, largest_curvature=7.0).notes == ()
    assert advise(gradreg.sam(rho=0.1), learning_rate=0.1, momentum=0.9, largest_curvature=30.0).problems == ()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 20.0])
def test_the_sharpest_stable_curvature_is_where_the_fate_changes(gamma, momentum):
    limit = sharpest_stable_curvature(gamma, learning_rate=0.3, momentum=momentum)
    stable, unstable = fate([limit * 0.999, limit * 1.001], gamma, learning_rate=0.3, momentum=momentum)
    assert (stable, unstable) == (Fate.SETTLES, Fate.DIVERGES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fate(1.0, -0.1, learning_rate=0.1), r"gamma must be finite and >= 0"),
        (lambda: fate(1.0, 0.1, learning_rate=0.0), r"learning_rate must be finite and > 0"),
        (lambda: largest_gamma(1.0, learning_rate=0.1, momentum=1.0), r"momentum must be below 1; got 1"),
        (lambda: settling_distance(5.0, 0.1, learning_rate=0.5), r"diverges even without a penalty. Take learning_rate below 0.4"),
        (lambda: settle([1.0, -1.0], 0.1, learning_rate=0.1), r"curvatures must be a non-empty list of finite numbers > 0"),
    ],
)
def test_bad_settings_are_refused_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("rho", [0.05, 0.5])
def test_sams_edge_is_where_its_step_begins_to_grow(rho, momentum):
    """One eigenvector, and a slope that holds the gradient's norm: the engine's iterates shrink below the edge and grow above it."""
    rate, norm = 0.3, 0.8
    edge = sam_edge(norm, rho, learning_rate=rate, momentum=momentum)
    assert edge < 2 * (1 + momentum) / rate
    if momentum == 0:  # as the paper writes it
        assert edge == pytest.approx(norm / (2 * rho) * (np.sqrt(1 + 8 * rho / (rate * norm)) - 1), rel=1e-12)
    for share, grows in ((0.98, False), (1.02, True)):
        h = torch.tensor([share * edge, 0.0], dtype=torch.float64)
        slope = torch.tensor([0.0, norm], dtype=torch.float64)
        model = torch.nn.Module()
        model.p = torch.nn.Parameter(torch.tensor([1e-6, 0.0], dtype=torch.float64))
        regularizer, optimizer = GradientRegularizer(model, gradreg.sam(rho=rho)), torch.optim.SGD([model.p], lr=rate, momentum=momentum)
        for _ in range(200):
            optimizer.zero_grad()
            regularizer.backward(lambda: (h * model.p**2).sum() / 2 + (slope * model.p).sum())  # noqa: B023
            optimizer.step()
        assert (abs(float(model.p.detach()[0])) > 1e-6) == grows
    assert sam_edge(1e-9, rho, learning_rate=rate) < 1e-2
    assert sam_edge(0.0, rho, learning_rate=rate) == 0.0
    assert sam_edge(0.0, 0.0, learning_rate=rate) == 2 / rate


def test_a_quadratics_trap_at_any_strength_is_no_problem_of_a_network():
    """GNP at the strength that is best on the digits, with what was measured there at step 80 of 480."""
    penalty = gradreg.gnp(r=0.5, alpha=0.8)
    settings = {"learning_rate": 0.05, "momentum": 0.9, "largest_curvature": 2.02, "smallest_curvature": -0.25}
    thought = advise(penalty, **settings)
    assert thought.problems == ()
    assert "On a quadratic curvature -0.25 is a trap" in thought.notes[0]
    found = advise(penalty, **settings, gradient_norm=0.33)
    assert found.problems == ()
    assert found.notes == ()
    assert "only one below -0.825 is" in found.partings[0]  # 0.33 / 0.4
    assert found.stable_curvature == pytest.approx(sam_edge(0.33, 0.4, learning_rate=0.05, momentum=0.9))
    late = advise(penalty, **settings, gradient_norm=0.05)
    assert "strength 0.4 turns curvature -0.25 into a trap at a gradient of length 0.05; stay below 0.2" in late.problems[0]


def test_training_at_the_edge_is_no_problem_once_it_was_measured():
    settings = {"learning_rate": 0.1, "largest_curvature": 21.0}
    thought = advise(gradreg.sam(rho=0.1), **settings)
    assert "unstable at curvature 21 without any penalty; stay below 0.0952" in thought.problems[0]
    assert "hovers around this edge" in thought.notes[0]
    for penalty in (gradreg.sam(rho=0.1), gradreg.fgr(gamma=0.1, epsilon=0.1)):
        found = advise(penalty, **settings, gradient_norm=0.4)
        assert found.problems == ()
        assert "diverges at the measured curvature 21, above 20. Training goes on there" in found.partings[0]
        assert found.largest_strength >= 0
    assert "at or above SAM's edge of stability, 7.17" in advise(gradreg.sam(rho=0.1), **settings, gradient_norm=0.4).notes[0]


def test_what_was_measured_of_the_penalty_goes_before_the_quadratic():
    penalty = gradreg.fgr(gamma=0.5, epsilon=0.5)
    settings = {"learning_rate": 0.1, "largest_curvature": 12.0, "smallest_curvature": -3.0, "gradient_norm": 1.0}
    (problem,) = advise(penalty, **settings).problems
    assert "gamma 0.5 turns curvature -3 into a trap" in problem
    found = advise(penalty, **settings, measured=[MeasuredCurvature(12.0, 15.0, 0.1), MeasuredCurvature(-3.0, -1.0, 0.1)])
    assert found.problems == ()
    assert "curvature 12 becomes 84 on a quadratic, and 15 ± 0.1 as measured" in found.partings[0]
    assert "with the limit at 20: a step of this learning rate is stable there" in found.partings[0]
    assert "-3 becomes 1.5 on a quadratic, and -1 ± 0.1 as measured with the penalty's own gradient: it is no trap" in found.partings[1]
    (held,) = advise(penalty, **settings, measured=[MeasuredCurvature(-3.0, 2.0, 0.1)]).problems
    assert held == problem  # theory and measurement agree
    worse = advise(penalty, **{**settings, "smallest_curvature": -1.0}, measured=[MeasuredCurvature(-1.0, 0.5, 0.1)])
    assert "a trap, though not on a quadratic" in worse.problems[0]
    calm = {**settings, "largest_curvature": 4.0, "smallest_curvature": -1.0}
    over = advise(penalty, **calm, measured=[MeasuredCurvature(4.0, 30.0, 0.1)])
    assert "12 on a quadratic, and 30 ± 0.1" in over.partings[0]
    assert "overshoots there" in over.partings[0]
    assert advise(penalty, **calm, measured=[MeasuredCurvature(4.0, 12.5, 0.1)]).partings == ()
    assert "the same verdict, from another number" in advise(penalty, **calm, measured=[MeasuredCurvature(4.0, 18.0, 0.1)]).partings[0]
