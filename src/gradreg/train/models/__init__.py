"""Models by the names that recipes use: ours, from the files here, and all of ``timm.create_model``.

Ours are built without timm, whose import takes several times as long as PyTorch's; ``register_with_timm()`` registers them with timm too.
Those of one's own are in ``own``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gradreg import checks, own_code
from gradreg.own_code import Code
from gradreg.train.models import mlp as mlp  # each adds its models to ENTRIES
from gradreg.train.models import own as own
from gradreg.train.models import plain_cnn as plain_cnn
from gradreg.train.models import pyramidnet as pyramidnet
from gradreg.train.models import shake_shake as shake_shake
from gradreg.train.models import small_convnets as small_convnets
from gradreg.train.models import small_transformers as small_transformers
from gradreg.train.models import wide_resnet as wide_resnet
from gradreg.train.models.registration import ENTRIES, in_natural_order, known, register_with_timm

OURS = in_natural_order(list(ENTRIES))
"""The names of the models that the files here define."""

_OF_CREATE_MODEL = ("checkpoint_path", "scriptable", "exportable", "no_jit")
"""Options that ``timm.create_model`` itself takes."""


def create(
    options: Mapping[str, Any], *, classes: int | None, image_shape: tuple[int, int, int] | None, code: Code | None = None
) -> nn.Module:
    """The model of ``options["name"]`` for images of (channels, height, width) and ``classes`` outputs.

    A model that is built for one size of images (``img_size``: transformers, fully connected networks) is built for that of
    ``image_shape``, unless ``options`` say otherwise.

    Args:
        options: "name" and the model's own options.
        classes: outputs; None if the data do not say.
        image_shape: (channels, height, width) of the images; None for samples that are none.
        code: where the files of one's own functions are.

    Raises:
        ValueError: an unknown model or option; for a model the nearest known one is named. Or data that do not say what it needs.
    """
    name = options["name"]
    if own_code.is_own(name):
        return own.create(options, code, classes=classes, image_shape=image_shape)
    arguments = {k: v for k, v in options.items() if k != "name"}
    classes = arguments.pop("num_classes", classes) if classes is None else classes
    if classes is None or image_shape is None:
        missing = "images (channels, height, width)" if image_shape is None else "a number of classes"
        raise ValueError(
            f"model {name!r} must get {missing}, which the data set does not say. "
            + ("Name a model of your own." if image_shape is None else "Give it an attribute classes, or write model.num_classes.")
        )
    channels, height, width = image_shape
    if name in ENTRIES and not any(option in arguments for option in _OF_CREATE_MODEL):
        build: Any = ENTRIES[name]
        fixed, size = known(name)["fixed_input_size"], known(name)["input_size"]
    else:
        import timm

        register_with_timm()
        if not timm.is_model(name):
            unknown = checks.unknown("model", name, dict.fromkeys([*OURS, *timm.list_models()]))
            raise ValueError(f"{unknown} gradreg models 'vit*', say, lists those that match.")
        build = timm.create_model
        arguments["model_name"] = name
        of_timm = timm.get_pretrained_cfg(name)
        fixed, size = (False, (3, 0, 0)) if of_timm is None else (of_timm.fixed_input_size, of_timm.input_size)
    if fixed and size[1:] != (height, width):
        arguments.setdefault("img_size", height if height == width else (height, width))
    try:
        return build(num_classes=classes, in_chans=channels, **{k: v for k, v in arguments.items() if v is not None})
    except (TypeError, AssertionError) as error:
        refused = {k: v for k, v in arguments.items() if k != "model_name"}
        raise ValueError(f"model {name!r} does not accept its options {refused or 'none'}: {error}") from error
