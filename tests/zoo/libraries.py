"""Import timm and torchvision, also where torchvision has no compiled operators for the installed torch."""

import importlib
import sys
from types import ModuleType

import torch

__all__ = ["timm", "torchvision"]

_stubs: torch.library.Library | None = None


def timm() -> ModuleType:
    """Import timm, which itself imports torchvision."""
    torchvision()
    return importlib.import_module("timm")


def torchvision() -> ModuleType:
    """Import torchvision, and declare the operators it registers kernels for if its compiled library does not load.

    No model of the zoo calls one of these operators.
    """
    global _stubs
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error) or _stubs is not None:
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _stubs = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        _stubs.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")
