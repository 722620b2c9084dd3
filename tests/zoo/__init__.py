"""Build the sixty models on which graphopt is tested, without downloading anything.

`ZOO` maps each name to its `ZooModel`:

    module = ZOO["resnet50"].build()
    args, kwargs = ZOO["resnet50"].inputs()
    outputs = module(*args, **kwargs)

`native=True` gives the size for benchmarks in place of the one for tests. `randomise` draws other weights, `cast` and
`in_float64` make a float64 comparison of them.
"""

from . import convnets, dense, language, vision
from .model import Arguments, ZooModel, cast, in_float64, quiet
from .randomise import calibrate, randomise

__all__ = ["ZOO", "Arguments", "ZooModel", "calibrate", "cast", "in_float64", "quiet", "randomise"]

_ORDER = """
resnet50 resnext50_32x4d densenet121 mobilenetv2_100 mobilenetv3_large_100 efficientnet_b0 tf_efficientnetv2_s
regnety_016 convnext_tiny convnextv2_tiny inception_v3 vgg16_bn ghostnet_100 res2net50_26w_4s hrnet_w18 dla34 dpn68
seresnet50 repvgg_a2 mobileone_s1 vit_tiny_patch16_224 deit_small_patch16_224 swin_tiny_patch4_window7_224
swinv2_tiny_window8_256 beit_base_patch16_224 cait_xxs24_224 xcit_tiny_12_p16_224 mixer_s32_224 maxvit_tiny_tf_224
coat_tiny levit_128 efficientformer_l1 mobilevit_s fastvit_t8 edgenext_small poolformer_s12 dm_nfnet_f0 volo_d1_224
twins_svt_small shufflenet_v2_x1_0 deeplabv3_resnet50 bert gpt2 llama_gqa qwen2 qwen3 opt t5 clip mixtral whisper_tiny
segformer detr mask2former phi3 dinov2 mamba yolo_c2f unet_cat diffusers_unet2dcond
"""

_MODELS = {model.name: model for model in [*convnets.MODELS, *vision.MODELS, *language.MODELS, *dense.MODELS]}

ZOO: dict[str, ZooModel] = {name: _MODELS[name] for name in _ORDER.split()}
"""The models by name: convolutional first, then transformers, language models, and everything else."""
