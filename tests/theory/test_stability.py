"""The map against simulation and against the engine, and where power 1 settles."""

import numpy as np
import pytest
import torch

import gradreg
from gradreg.theory.stability import (
    Fate,
    advise,
    fate,
    largest_gamma,
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
    assert "is a trap" in problems(gradreg.sam(rho=0.1), smallest_curvature=-0.5)[0]
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
