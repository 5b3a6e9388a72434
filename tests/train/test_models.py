"""Models by name, ours and timm's."""

from __future__ import annotations

import pytest
import torch

from gradreg.train import models


def test_our_mlp_is_found_through_timm_and_fits_the_images():
    model = models.create({"name": "mlp", "hidden": [256, 256]}, classes=10, image_shape=(1, 8, 8))
    assert sum(p.numel() for p in model.parameters()) == 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_a_model_of_timm_with_options_of_its_own():
    options = {"name": "vit_tiny_patch16_224", "img_size": 8, "patch_size": 4, "depth": 1}
    assert models.create(options, classes=10, image_shape=(1, 8, 8))(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_unknown_options_and_pretrained_weights_are_refused():
    with pytest.raises(ValueError, match=r"model 'mlp' refuses its options .*'hiden'"):
        models.create({"name": "mlp", "hiden": [3]}, classes=10, image_shape=(1, 8, 8))
    with pytest.raises(ValueError, match=r"pretrained must be False for 'mlp'"):
        models.create({"name": "mlp", "pretrained": True}, classes=10, image_shape=(1, 8, 8))
    with pytest.raises(ValueError, match=r"model.hidden must be >= 1; got 0"):
        models.create({"name": "mlp", "hidden": [0]}, classes=10, image_shape=(1, 8, 8))
