"""Models that predict more than a label: detection, segmentation, features, diffusion."""

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from .convnets import image
from .language import transformers_model
from .model import Arguments, ZooModel
from .unet import UNetCat
from .yolo import YoloC2f

__all__ = ["MODELS"]

Options = dict[str, Any]


def _deeplab(native: bool) -> nn.Module:
    from torchvision.models.segmentation import deeplabv3_resnet50

    module: nn.Module = deeplabv3_resnet50(weights=None, weights_backbone=None)
    return module


def _unet2dcond(native: bool) -> nn.Module:
    options: Options = {  # in native size the widths of Stable Diffusion, halved
        "block_out_channels": (160, 320, 640, 640) if native else (24, 48, 72),
        "down_block_types": ("CrossAttnDownBlock2D",) * (3 if native else 2) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (3 if native else 2),
        "cross_attention_dim": 768 if native else 40,
        "attention_head_dim": 8 if native else (3, 4, 6),
        "norm_num_groups": 32 if native else 6,
        "layers_per_block": 2 if native else 1,
        "sample_size": 64 if native else (8, 12),
    }
    module: nn.Module = import_module("diffusers").UNet2DConditionModel(**options)
    return module


def _latents(native: bool, batch: int, rng: torch.Generator) -> Arguments:
    """Draw noisy latents, their time steps, and the text's hidden states."""
    size, text = ((64, 64), (77, 768)) if native else ((8, 12), (7, 40))
    return Arguments(
        (
            torch.randn(batch, 4, *size, generator=rng),
            torch.randint(0, 1000, (batch,), generator=rng),
            torch.randn(batch, *text, generator=rng),
        ),
        {},
    )


def _pixels(
    small: tuple[int, int], native_size: tuple[int, int], native: bool, batch: int, rng: torch.Generator
) -> Arguments:
    """Draw images, passed by the name that transformers gives them."""
    return Arguments((), {"pixel_values": image(small, native_size, native, batch, rng).args[0]})


_SEGFORMER: tuple[Options, Options] = (
    {
        "depths": [1, 1, 2, 1],
        "hidden_sizes": [24, 40, 60, 96],
        "num_attention_heads": [1, 2, 5, 8],
        "mlp_ratios": [3, 3, 3, 3],
        "decoder_hidden_size": 52,
        "num_labels": 7,
    },
    {"num_labels": 150},
)
_DETR: tuple[Options, Options] = (
    {
        "backbone_config": {
            "model_type": "resnet",
            "embedding_size": 20,
            "hidden_sizes": [32, 48, 64, 80],
            "depths": [1, 2, 2, 1],
            "out_features": ["stage4"],
        },
        "num_queries": 11,
        "d_model": 72,
        "encoder_layers": 2,
        "encoder_attention_heads": 6,
        "encoder_ffn_dim": 116,
        "decoder_layers": 3,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 132,
        "num_labels": 7,
    },
    {"backbone_config": {"model_type": "resnet", "out_features": ["stage4"]}},
)
_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_MASK2FORMER: tuple[Options, Options] = (
    {
        "backbone_config": {
            "model_type": "swin",
            "image_size": (64, 96),
            "embed_dim": 20,
            "depths": [1, 2, 1, 1],
            "num_heads": [2, 4, 5, 8],
            "window_size": 3,
            "out_features": _STAGES,
        },
        "feature_size": 96,
        "mask_feature_size": 36,
        "hidden_dim": 60,
        "encoder_feedforward_dim": 88,
        "dim_feedforward": 104,
        "encoder_layers": 2,
        "decoder_layers": 4,
        "num_attention_heads": 6,
        "num_queries": 11,
        "num_labels": 7,
    },
    {"backbone_config": {"model_type": "swin", "out_features": _STAGES}},
)
_DINOV2: tuple[Options, Options] = (
    {
        "hidden_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "mlp_ratio": 2,
        "image_size": 56,
        "patch_size": 14,
        "num_labels": 9,
    },
    {"hidden_size": 384, "num_attention_heads": 6, "num_labels": 1000},
)

MODELS = [
    ZooModel("deeplabv3_resnet50", "dense", _deeplab, partial(image, (64, 96), (520, 520))),
    ZooModel(
        "segformer",
        "dense",
        partial(transformers_model, "SegformerForSemanticSegmentation", "SegformerConfig", *_SEGFORMER),
        partial(_pixels, (64, 96), (512, 512)),
    ),
    ZooModel(
        "detr",
        "dense",
        partial(transformers_model, "DetrForObjectDetection", "DetrConfig", *_DETR),
        partial(_pixels, (64, 96), (800, 800)),
    ),
    ZooModel(
        "mask2former",
        "dense",
        partial(transformers_model, "Mask2FormerForUniversalSegmentation", "Mask2FormerConfig", *_MASK2FORMER),
        partial(_pixels, (64, 96), (384, 384)),
    ),
    ZooModel(
        "dinov2",
        "vision-transformer",
        partial(transformers_model, "Dinov2ForImageClassification", "Dinov2Config", *_DINOV2),
        partial(_pixels, (56, 56), (224, 224)),
    ),
    ZooModel("yolo_c2f", "dense", lambda native: YoloC2f(), partial(image, (64, 96), (640, 640))),
    ZooModel("unet_cat", "dense", lambda native: UNetCat(), partial(image, (48, 72), (256, 256))),
    ZooModel("diffusers_unet2dcond", "dense", _unet2dcond, _latents),
]
