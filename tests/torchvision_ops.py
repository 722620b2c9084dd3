"""Let torchvision, and what builds on it, be imported next to a torch that its compiled part was not built for.

A torchvision built for another torch (commonly: one for CUDA next to a CPU torch) cannot load its compiled operators,
and then fails on import, where it registers shape functions for operators which do not exist. The models of the zoo
call none of them, so declaring their signatures is enough.
"""

import functools
import importlib.util
from pathlib import Path

import torch


@functools.cache
def declare_missing_operators() -> torch.library.Library | None:
    """Declare the torchvision operators that its shape functions refer to, where the compiled part does not load.

    Call it before the first import of torchvision, timm, transformers or diffusers. Nothing happens where torchvision
    is not installed or works.

    Returns:
        The library that holds the declarations, kept alive by the cache; None where nothing had to be declared.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    for compiled in Path(spec.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(compiled)
        except OSError:
            continue
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
