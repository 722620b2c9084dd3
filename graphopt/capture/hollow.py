"""Build models without values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["without_weights"]


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Let the modules that are built within the block have parameters without values, and buffers as usual.

    A model as large as its checkpoint is then built in no memory: its parameters are on the meta device. Its buffers,
    many of which no checkpoint holds, are computed: ``with torch.device("meta")`` would leave them out, too, and such
    a model can be planned but not be run on calibration data. All threads build so while the block lasts.

    Example:
        >>> with graphopt.without_weights():  # doctest: +SKIP
        ...     model = LlamaForCausalLM(config)
        >>> graphopt.optimize(model, tokens, checkpoint="llama/", budget=budget, output="out/")  # doctest: +SKIP
    """
    register = nn.Module.register_parameter

    def register_hollow(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(torch.empty_like(param, device="meta"), param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_hollow  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
