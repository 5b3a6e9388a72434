"""timm's vision transformers with patches and windows for 32-pixel images, under separate names.

Only the names are new: ``vit_tiny_patch4_32`` is ``{name: vit_tiny_patch16_224, img_size: 32, patch_size: 4}``, untrained.

Differs from the GNP reference (arXiv 2202.03599 and 2406.09723, their code): timm has no dropout by default, there ViT has 0.1 (here
``pos_drop_rate``, ``proj_drop_rate`` and ``attn_drop_rate``), and Swin 0.1 on its attention in place of timm's stochastic depth of 0.1.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from gradreg.train.models.registration import images, ours, untrained

_VIT = {"img_size": 32, "patch_size": 4}
_CAIT = {"img_size": 32, "patch_size": 4}

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"vit_{size}_patch4_32": (f"vit_{size}_patch16_224", _VIT) for size in ("tiny", "small", "base", "large")},
    **{
        f"swin_{size}_patch{patch}_window4_32": (
            f"swin_{size}_patch4_window7_224",
            {"img_size": 32, "patch_size": patch, "window_size": 4},
        )
        for size in ("tiny", "small", "base")
        for patch in (2, 4)
    },
    "cait_xxs12_patch4_32": ("cait_xxs24_224", {**_CAIT, "depth": 12}),
    "cait_xxs24_patch4_32": ("cait_xxs24_224", _CAIT),
    "cait_xxs36_patch4_32": ("cait_xxs36_224", _CAIT),
    "cait_xs12_patch4_32": ("cait_xs24_384", {**_CAIT, "depth": 12}),
    "cait_xs24_patch4_32": ("cait_xs24_384", _CAIT),
    "cait_s12_patch4_32": ("cait_s24_224", {**_CAIT, "depth": 12}),
    "cait_s24_patch4_32": ("cait_s24_224", _CAIT),
    "cait_s36_patch4_32": ("cait_s36_384", _CAIT),
    "cait_m24_patch4_32": ("cait_m36_384", {**_CAIT, "depth": 24}),
    "cait_m36_patch4_32": ("cait_m36_384", _CAIT),
    "cait_m48_patch4_32": ("cait_m48_448", _CAIT),
}
"""Name -> (timm's name, the options that make it one for 32-pixel images)."""

default_cfgs: dict[str, dict[str, Any]] = {name: images(3, 32, fixed=True) for name in SETTINGS}


def _entry(name: str, of_timm: str, settings: dict[str, Any]) -> None:
    def build(**options: Any) -> nn.Module:
        import timm

        return timm.create_model(of_timm, **options)

    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        return untrained(name, build, pretrained, options, **{"num_classes": 10, **settings})

    entry.__name__ = name
    entry.__doc__ = f"timm's {of_timm} with {', '.join(f'{k}={v}' for k, v in settings.items())}."
    ours(entry)


for _name, (_of_timm, _settings) in SETTINGS.items():
    _entry(_name, _of_timm, _settings)
