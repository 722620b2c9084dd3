"""Vision transformers, mixers and their hybrids with convolutions, at their real widths and depths.

Models with windows get smaller windows along with the smaller image, in the proportion of the original: the stages
then have as many windows as at the native resolution, shifts and padding included.
"""

from functools import partial
from typing import Any

from .convnets import Size, image, timm_model
from .model import ZooModel

__all__ = ["MODELS"]

_VARIANTS: dict[str, tuple[Size, Size, dict[str, Any]]] = {  # (height, width) in tests, native; options of the former
    "vit_tiny_patch16_224": ((64, 96), (224, 224), {"img_size": (64, 96)}),
    "deit_small_patch16_224": ((64, 96), (224, 224), {"img_size": (64, 96)}),
    "swin_tiny_patch4_window7_224": ((64, 160), (224, 224), {"img_size": (64, 160), "window_size": (2, 5)}),
    "swinv2_tiny_window8_256": ((64, 160), (256, 256), {"img_size": (64, 160), "window_size": (2, 5)}),
    "beit_base_patch16_224": ((64, 80), (224, 224), {"img_size": (64, 80)}),
    "cait_xxs24_224": ((64, 96), (224, 224), {"img_size": (64, 96)}),
    "xcit_tiny_12_p16_224": ((64, 96), (224, 224), {"img_size": (64, 96)}),
    "mixer_s32_224": ((128, 160), (224, 224), {"img_size": (128, 160)}),
    "maxvit_tiny_tf_224": ((64, 160), (224, 224), {"img_size": (64, 160)}),
    "coat_tiny": ((64, 96), (224, 224), {"img_size": (64, 96)}),
    "levit_128": ((96, 160), (224, 224), {"img_size": (96, 160)}),
    "efficientformer_l1": ((224, 224), (224, 224), {}),
    "mobilevit_s": ((64, 128), (256, 256), {}),
    "edgenext_small": ((64, 96), (256, 256), {}),
    "volo_d1_224": ((64, 96), (224, 224), {"img_size": (64, 96)}),
    "twins_svt_small": ((96, 96), (224, 224), {"img_size": (96, 96), "wss": (3, 3, 3, 3)}),
}

MODELS = [
    ZooModel(name, "vision-transformer", partial(timm_model, name, options), partial(image, small, native))
    for name, (small, native, options) in _VARIANTS.items()
]
