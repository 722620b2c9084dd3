"""Build the sixty models on which graphopt is tested, without downloading anything.

`ZOO` maps each name to its `ZooModel`:

    module = ZOO["resnet50"].build()
    args, kwargs = ZOO["resnet50"].inputs()
    outputs = module(*args, **kwargs)

`native=True` gives the size for benchmarks in place of the one for tests.
"""

from . import convnets, vision
from .model import Arguments, ZooModel, cast, in_float64, quiet
from .randomise import randomise

__all__ = ["ZOO", "Arguments", "ZooModel", "cast", "in_float64", "quiet", "randomise"]

ZOO: dict[str, ZooModel] = {model.name: model for model in [*convnets.MODELS, *vision.MODELS]}
"""The models by name."""
