"""Models by name, ours and timm's: built for the images, run, and refused in words."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

from gradreg.train import models
from gradreg.train.models.small_transformers import SETTINGS

models.register_with_timm()


def test_our_mlp_is_found_through_timm_and_fits_the_images():
    model = models.create({"name": "mlp", "hidden": [256, 256]}, classes=10, image_shape=(1, 8, 8))
    assert sum(p.numel() for p in model.parameters()) == 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_a_model_of_timm_with_options_of_its_own():
    options = {"name": "vit_tiny_patch16_224", "img_size": 8, "patch_size": 4, "depth": 1}
    assert models.create(options, classes=10, image_shape=(1, 8, 8))(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("name", models.OURS)
def test_every_model_of_ours_takes_images_of_32_pixels_and_gives_100_logits(name):
    with torch.device("meta"):
        model = models.create({"name": name}, classes=100, image_shape=(3, 32, 32))
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


SMALL = {  # the smallest of each kind, made smaller where a key allows it
    "wrn16_4": {"depth": 10, "width": 1},
    "pyramidnet110_270": {"depth": 8, "alpha": 12},
    "pyramidnet164_48": {"depth": 11, "alpha": 12},
    "pyramidnet164_48_shakedrop": {"depth": 11, "alpha": 12},
    "shakeshake26_2x96d": {"depth": 8, "channels": 8},
    "mlp": {},
    "mlp_fgr": {},
    "mlp_l2": {"hidden": [64]},
    "cnn_l2": {"channels": [4, 8], "hidden": 16},
    "cnn_bn": {"channels": [4], "convolutions": 2},
    "vit_tiny_patch4_32": {"depth": 2},
    "swin_tiny_patch2_window4_32": {"depths": (1, 1, 2, 1), "embed_dim": 24},
    "swin_tiny_patch4_window4_32": {"depths": (1, 1, 2, 1), "embed_dim": 24},
    "cait_xxs12_patch4_32": {"depth": 2},
    "resnet18_cifar": {"channels": (64, 8, 8, 8)},
    "resnet50_cifar": {"layers": (1, 1, 1, 1)},
    "vgg16_bn_cifar": {},
}


@pytest.mark.parametrize("name", SMALL)
def test_each_kind_runs_forwards_and_backwards(name):
    torch.manual_seed(0)
    model = models.create({"name": name, **SMALL[name]}, classes=10, image_shape=(3, 32, 32))
    loss = cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([1, 7]))
    loss.backward()
    assert 0 < loss.item() < 20
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("name", ["mlp", "mlp_fgr", "cnn_l2", "wrn16_4", "pyramidnet164_48_shakedrop", "shakeshake26_2x96d"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 20)])
def test_ours_take_images_of_other_shapes(name, shape):
    small = {} if name == "mlp" else SMALL[name]
    model = models.create({"name": name, **small}, classes=4, image_shape=shape)
    assert model(torch.zeros(2, *shape)).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"patch_size": 4, "depth": 1}),
        ("swin_tiny_patch4_window7_224", {"window_size": 4}),
        ("swin_tiny_patch4_window7_224", {}),
        ("cait_xxs24_224", {"patch_size": 4, "depth": 1}),
        ("mixer_s32_224", {}),
        ("resnet18", {}),
        ("vgg11", {}),
    ],
)
def test_models_of_timm_are_built_for_the_size_of_the_images(name, options):
    with torch.device("meta"):
        model = models.create({"name": name, **options}, classes=10, image_shape=(3, 32, 32))
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_at_its_own_size_a_model_of_timm_gets_no_img_size():
    with torch.device("meta"):
        model = models.create({"name": "vit_tiny_patch16_224"}, classes=1000, image_shape=(3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == 5_717_416


@pytest.mark.parametrize("name", SETTINGS)
def test_the_names_for_32_pixels_are_timms_networks_with_options(name):
    of_timm, options = SETTINGS[name]
    with torch.device("meta"):
        ours, theirs = timm.create_model(name), timm.create_model(of_timm, num_classes=10, **options)
    assert type(ours) is type(theirs)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_the_cifar_stem_keeps_every_pixel():
    with torch.device("meta"):
        features = timm.create_model("resnet18_cifar").forward_features(torch.zeros(2, 3, 32, 32))
        assert features.shape == (2, 512, 4, 4)  # timm's own leaves 1 x 1
        assert timm.create_model("resnet18").forward_features(torch.zeros(2, 3, 32, 32)).shape == (2, 512, 1, 1)


def test_unknown_options_and_pretrained_weights_are_refused():
    with pytest.raises(ValueError, match=r"model 'mlp' does not accept its options .*'hiden'"):
        models.create({"name": "mlp", "hiden": [3]}, classes=10, image_shape=(1, 8, 8))
    for name in ("mlp", "wrn28_10", "vit_tiny_patch4_32", "resnet18_cifar"):
        with pytest.raises(ValueError, match=rf"pretrained must be False for '{name}'"):
            models.create({"name": name, "pretrained": True}, classes=10, image_shape=(3, 8, 8))
    with pytest.raises(ValueError, match=r"model.hidden must be a list of whole numbers >= 1; got 16. Write it in brackets"):
        models.create({"name": "mlp", "hidden": 16}, classes=10, image_shape=(1, 8, 8))
    with pytest.raises(ValueError, match=r"model.channels must be a list of whole numbers >= 1; got '16' \(str\)"):
        models.create({"name": "cnn_l2", "channels": "16"}, classes=10, image_shape=(1, 8, 8))
    with pytest.raises(ValueError, match=r"model.hidden must be >= 1; got 0"):
        models.create({"name": "mlp", "hidden": [0]}, classes=10, image_shape=(1, 8, 8))
    with pytest.raises(ValueError, match=r"unknown model 'wm28_10'. Did you mean 'wrn28_10'"):
        models.create({"name": "wm28_10"}, classes=10, image_shape=(1, 8, 8))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wrn28_10", {"depth": 27}, r"model.depth must be 6 k \+ 4 for a wide residual network; got 27"),
        ("wrn28_10", {"depth": 4}, r"model.depth must be >= 10; got 4"),
        ("wrn28_10", {"width": 0}, r"model.width must be >= 1; got 0"),
        ("pyramidnet110_270", {"depth": 111}, r"model.depth must be 6 k \+ 2 for a PyramidNet of basic blocks; got 111"),
        ("pyramidnet164_48", {"depth": 110, "alpha": 3, "bottleneck": False, "shake_drop": 2}, r"model.shake_drop must be a probability"),
        ("pyramidnet164_48", {"depth": 163}, r"model.depth must be 9 k \+ 2 for a PyramidNet of bottleneck blocks; got 163"),
        ("shakeshake26_2x96d", {"depth": 25}, r"model.depth must be 6 k \+ 2 for a Shake-Shake network; got 25"),
        ("shakeshake26_2x96d", {"channels": 95}, r"model.channels must be even"),
        ("cnn_bn", {"convolutions": 0}, r"model.convolutions must be >= 1; got 0"),
        ("cnn_l2", {"channels": [2] * 6}, r"model.img_size must be >= 64 for 6 halvings; got 32"),
    ],
)
def test_sizes_that_do_not_exist_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        models.create({"name": name, **options}, classes=10, image_shape=(3, 32, 32))
