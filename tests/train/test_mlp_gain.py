"""The scale at which a fully connected network starts."""

from __future__ import annotations

import pytest
import torch

from gradreg.train import models


@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_gain_sets_the_deviation_of_the_weights_in_units_of_hes(gain):
    torch.manual_seed(0)
    model = models.create({"name": "mlp", "hidden": [300, 300], "gain": gain}, classes=300, image_shape=(1, 20, 20))
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            assert layer.weight.std().item() == pytest.approx(gain * (2 / layer.in_features) ** 0.5, rel=0.02)
            assert not layer.bias.any()


def test_without_gain_the_initialization_is_pytorchs():
    torch.manual_seed(0)
    model = models.create({"name": "mlp", "hidden": [8]}, classes=3, image_shape=(1, 4, 4))
    torch.manual_seed(0)
    first = torch.nn.Linear(16, 8)
    assert torch.equal(next(model.parameters()), first.weight)


def test_a_bad_gain_is_refused():
    with pytest.raises(ValueError, match=r"model.gain must be finite and > 0; got -1.0"):
        models.create({"name": "mlp", "gain": -1.0}, classes=3, image_shape=(1, 4, 4))
