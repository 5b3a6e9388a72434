"""The value that ranks an epoch, and that finding the best of many epochs takes no time that matters."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from gradreg.study.tasks import Metric
from gradreg.train.outcome import Epoch, best_of

PLAIN = Epoch(
    epoch=1,
    step=10,
    gradient_evaluations=10.0,
    train_loss=1.0,
    test_loss=0.9,
    test_accuracy=0.5,
    test_top5=0.9,
    lr=0.1,
    gradient_norm=1.0,
    strength=0.0,
    radius=None,
)
OWN = replace(PLAIN, test_accuracy=None, test_top5=None, own={"test_rmse": 2.0, "validation_rmse": 3.0, "ema_test_rmse": 1.0})
ACCURACY, LOSS, RMSE = Metric("accuracy", "max", True), Metric("loss", "min", False), Metric("rmse", "min", False)


@pytest.mark.parametrize(
    ("epoch", "metric", "judged"),
    [
        (PLAIN, ACCURACY, ("test_accuracy", 0.5)),
        (replace(PLAIN, validation_accuracy=0.4), ACCURACY, ("validation_accuracy", 0.4)),
        (replace(PLAIN, validation_loss=0.8), LOSS, ("validation_loss", 0.8)),
        (OWN, RMSE, ("validation_rmse", 3.0)),
        (replace(OWN, own={"test_rmse": 2.0}), RMSE, ("test_rmse", 2.0)),
        (replace(OWN, validation_accuracy=0.4, own={"test_accuracy": 0.3}), ACCURACY, ("test_accuracy", 0.3)),
    ],
)
def test_an_epoch_is_judged_by_validation_or_else_by_test_as_its_record_has_it(epoch, metric, judged):
    assert epoch.judged_by(metric) == judged
    assert epoch.to_dict()[judged[0]] == judged[1]


def test_a_metric_that_was_not_recorded_is_named():
    with pytest.raises(KeyError, match="test_rmse"):
        PLAIN.judged_by(RMSE)


def test_the_best_of_a_long_run_is_found_at_once():
    """After each of 1,800 epochs all are looked at: a copy of every record would take a minute of each of those runs."""
    history = [replace(PLAIN, epoch=i, test_accuracy=(i * 7 % 1801) / 1801) for i in range(1, 1801)]
    started = time.process_time()
    best = best_of(history, ACCURACY)
    assert time.process_time() - started < 0.1
    assert best is not None
    assert best.test_accuracy == max(epoch.test_accuracy or 0.0 for epoch in history)
