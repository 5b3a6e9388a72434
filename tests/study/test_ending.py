"""What the records of a run say at its end."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gradreg.study.ending import ending
from gradreg.study.tasks import Metric, TaskError

ACCURACY, RMSE = Metric("accuracy", "max"), Metric("rmse", "min")


def records(metric: Metric, values: list[tuple[float, float]], **more: Any) -> list[dict[str, Any]]:
    """A record for each epoch, of (validation, test)."""
    return [
        {"epoch": epoch, "step": 10 * epoch, "seconds": 1.0, metric.validation: validation, metric.test: test, **more}
        for epoch, (validation, test) in enumerate(values)
    ]


def test_the_best_epoch_is_the_first_of_equals():
    found = ending(records(ACCURACY, [(0.1, 0.2), (0.5, 0.3), (0.5, 0.9), (0.4, 0.6)]), ACCURACY)
    assert found["best"] == {"epoch": 1, "by": "validation_accuracy", "validation_accuracy": 0.5, "test_accuracy": 0.3}
    assert (found["test_accuracy"], found["validation_accuracy"], found["diverged"]) == (0.6, 0.4, False)


def test_the_best_of_a_metric_to_be_minimized_is_the_smallest_that_is_finite():
    found = ending(records(RMSE, [(math.nan, 1.0), (3.0, 4.0), (2.0, math.inf), (2.5, 5.0)]), RMSE)
    assert (found["best"]["epoch"], found["best"]["test_rmse"]) == (3, 5.0)


def test_without_validation_there_is_no_best_epoch():
    found = ending([{"epoch": 0, "test_rmse": 1.0}], RMSE)
    assert (found["best"], found["validation_rmse"], found["test_rmse"]) == (None, None, 1.0)


@pytest.mark.parametrize("last", [{"test_rmse": math.nan}, {"loss": math.inf}])
def test_a_run_whose_end_is_not_finite_has_diverged(last):
    history = records(RMSE, [(2.0, 2.0), (1.0, 1.0)], loss=0.5)
    history[-1] |= last
    found = ending(history, RMSE)
    assert (found["diverged"], found["test_rmse"], found["validation_rmse"], found["best"]) == (True, None, None, None)


def test_a_loss_that_was_not_finite_on_the_way_is_no_divergence():
    history = records(RMSE, [(2.0, 2.0), (1.0, 1.0)], loss=0.5)
    history[0]["loss"] = math.inf
    assert not ending(history, RMSE)["diverged"]


def test_what_else_was_logged_counts_at_its_last_value():
    history = records(RMSE, [(2.0, 2.0), (1.0, 1.0)], loss=0.5)
    history[0] |= {"forgetting": 3.0, "sharpness_trace": 7.0, "sharpness_trace_error": math.nan}
    history[1] |= {"forgetting": 4.0, "calibration": math.nan}
    found = ending(history, RMSE)
    assert found["logged"] == {"forgetting": 4.0, "calibration": None}
    assert {name: value for name, value in found.items() if name.startswith("sharpness")} == {
        "sharpness_epoch": 0, "sharpness_trace": 7.0, "sharpness_trace_error": None,
    }  # fmt: skip
    assert "logged" not in ending(records(RMSE, [(1.0, 1.0)], loss=0.5), RMSE)


def test_a_metric_that_was_never_logged_is_an_error_that_names_what_was():
    with pytest.raises(TaskError, match=r"must log its metric as test_rmse; got loss, test_mae\. Write run\.log"):
        ending([{"epoch": 0, "step": 1, "loss": 0.1, "test_mae": 2.0}], RMSE)
