"""Write out the casts that ``torch.autocast`` makes, so that a region under it becomes ordinary operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.graph import TensorSpec, tensor_spec

Region = tuple[str, torch.dtype | None]
"""Device type and lower-precision type of a region under autocast."""


def casts(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device, region: Region
) -> dict[fx.Node, torch.dtype] | None:
    """Return to which type autocast would cast which operand of one call, or None where casts do not explain it.

    The call is run on fake tensors under autocast, which shows the casts; and without it on operands that were cast
    so, which must give the same types.

    Args:
        target: the operator.
        args: its positional arguments, with nodes for tensors.
        kwargs: its keyword arguments.
        device: where the operator runs.
        region: what autocast was told.
    """
    nodes = [leaf for leaf in pytree.tree_leaves((list(args), dict(kwargs))) if isinstance(leaf, fx.Node)]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fakes = {node: _fake(node, device) for node in nodes}
        watch = _Watch(fakes)
        with torch.autocast(region[0], dtype=region[1]), watch:
            under = _call(target, args, kwargs, fakes)
        explicit = {
            node: fake.to(watch.found.get(node, fake.dtype)) for node, fake in fakes.items() if torch.is_tensor(fake)
        }
        with torch.autocast(region[0], enabled=False):
            without = _call(target, args, kwargs, {**fakes, **explicit})
    return watch.found if _types(under) == _types(without) else None


def _fake(node: fx.Node, device: torch.device) -> Any:
    spec = node.meta.get("spec")
    if not isinstance(spec, TensorSpec):
        return spec
    spec = tensor_spec(node)
    return torch.empty(spec.shape, dtype=spec.dtype, device=device)


def _call(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((tuple(args), dict(kwargs)), values.__getitem__)
    return target(*args, **kwargs)


def _types(value: Any) -> list[torch.dtype | None]:
    return [getattr(leaf, "dtype", None) for leaf in pytree.tree_leaves(value)]


class _Watch(TorchDispatchMode):
    """Note which of the given tensors are cast to which type."""

    def __init__(self, fakes: Mapping[fx.Node, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._nodes = {id(fake): node for node, fake in fakes.items()}
        self.found: dict[fx.Node, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and id(args[0]) in self._nodes and kwargs.get("dtype") is not None:
            self.found[self._nodes[id(args[0])]] = kwargs["dtype"]
        return func(*args, **kwargs)
