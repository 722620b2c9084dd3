"""Convolutional classifiers at their real widths and depths."""

from functools import partial
from typing import Any

import torch
from torch import nn

from .model import Arguments, ZooModel

__all__ = ["MODELS", "image", "timm_model"]

Size = tuple[int, int]

_SIZES: dict[str, tuple[Size, Size]] = {  # (height, width) in tests, native
    "resnet50": ((64, 96), (224, 224)),
    "resnext50_32x4d": ((64, 96), (224, 224)),
    "densenet121": ((64, 96), (224, 224)),
    "mobilenetv2_100": ((64, 96), (224, 224)),
    "mobilenetv3_large_100": ((64, 96), (224, 224)),
    "efficientnet_b0": ((64, 96), (224, 224)),
    "tf_efficientnetv2_s": ((64, 96), (300, 300)),
    "regnety_016": ((64, 96), (224, 224)),
    "convnext_tiny": ((64, 96), (224, 224)),
    "convnextv2_tiny": ((64, 96), (224, 224)),
    "inception_v3": ((96, 128), (299, 299)),
    "vgg16_bn": ((64, 96), (224, 224)),
    "ghostnet_100": ((64, 96), (224, 224)),
    "res2net50_26w_4s": ((64, 96), (224, 224)),
    "hrnet_w18": ((64, 96), (224, 224)),
    "dla34": ((64, 96), (224, 224)),
    "dpn68": ((64, 96), (224, 224)),
    "seresnet50": ((64, 96), (224, 224)),
    "repvgg_a2": ((64, 96), (224, 224)),
    "mobileone_s1": ((64, 96), (224, 224)),
    "fastvit_t8": ((64, 96), (256, 256)),
    "poolformer_s12": ((64, 96), (224, 224)),
    "dm_nfnet_f0": ((64, 96), (192, 192)),
}


def image(small: Size, native_size: Size, native: bool, batch: int, generator: torch.Generator) -> Arguments:
    """Draw a batch of normalised images, (n, 3, h, w)."""
    height, width = native_size if native else small
    return Arguments((torch.randn(batch, 3, height, width, generator=generator),), {})


def timm_model(name: str, options: dict[str, Any], native: bool) -> nn.Module:
    """Construct one of timm's models; the options make its small form."""
    import timm

    module: nn.Module = timm.create_model(name, **({} if native else options))
    return module


def _shufflenet(native: bool) -> nn.Module:
    from torchvision.models import shufflenet_v2_x1_0

    module: nn.Module = shufflenet_v2_x1_0()
    return module


MODELS = [
    *(
        ZooModel(name, "convnet", partial(timm_model, name, {}), partial(image, small, native))
        for name, (small, native) in _SIZES.items()
    ),
    ZooModel("shufflenet_v2_x1_0", "convnet", _shufflenet, partial(image, (64, 96), (224, 224))),
]
