"""Find and set the numbers that modules keep as attributes: plain, in containers, and in configuration objects.

What may live here: what counts as a place for a number, and how one is replaced without touching an object that other
modules share.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Site", "find", "get", "put"]

DEEPEST = 4
"""How many containers and objects deep a number is looked for."""

OWN = frozenset(vars(nn.Module()))
"""What every module keeps for itself: its tables of parameters and hooks, its mode."""

_OPAQUE = (
    torch.Tensor,
    nn.Module,
    torch.dtype,
    torch.device,
    torch.Generator,
    type,
    str,
    bytes,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
)


@dataclass(frozen=True, slots=True)
class Site:
    """One number that a module holds.

    Attributes:
        path: The module's qualified name.
        kind: The module's class.
        way: The attribute's name, then the steps into its value: ``.name`` of an object, or a key or index.
        old: The number as it is in the user's module.
    """

    path: str
    kind: type
    way: tuple[Any, ...]
    old: int

    def __str__(self) -> str:
        """Return the site as code would say it."""
        steps = "".join(s if isinstance(s, str) and s.startswith(".") else f"[{s!r}]" for s in self.way[1:])
        return f"{self.path or 'the model'}: self.{self.way[0]}{steps}"


def find(path: str, module: nn.Module, wanted: Container[int]) -> Iterator[Site]:
    """Yield the integers among ``wanted``, and the switches (true or false), that a module holds."""
    for name, value in vars(module).items():
        if name not in OWN:
            for way, number in _walk(value, DEEPEST):
                if isinstance(number, bool) or number in wanted:
                    yield Site(path, type(module), (name, *way), number)


def _walk(value: Any, depth: int) -> Iterator[tuple[tuple[Any, ...], int]]:
    if type(value) in (int, bool):
        yield (), value
    elif depth == 0 or isinstance(value, _OPAQUE) or value is None:
        return
    elif isinstance(value, dict):
        for key, each in value.items():
            if isinstance(key, str | int):
                for way, number in _walk(each, depth - 1):
                    yield (key, *way), number
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            for way, number in _walk(each, depth - 1):
                yield (index, *way), number
    elif hasattr(value, "__dict__"):
        for name, each in vars(value).items():
            for way, number in _walk(each, depth - 1):
                yield (f".{name}", *way), number


def get(module: nn.Module, site: Site) -> Any:
    """Return the number at a site."""
    value: Any = vars(module)[site.way[0]]
    for step in site.way[1:]:
        value = vars(value)[step[1:]] if isinstance(step, str) and step.startswith(".") else value[step]
    return value


def put(module: nn.Module, site: Site, number: int) -> None:
    """Replace the number at a site; containers and objects on the way to it are copied, for others may share them."""
    first, *rest = site.way
    vars(module)[first] = _replaced(vars(module)[first], rest, number)


def _replaced(value: Any, way: list[Any], number: int) -> Any:
    if not way:
        return number
    step, *rest = way
    if isinstance(step, str) and step.startswith("."):
        made = copy.copy(value)
        vars(made)[step[1:]] = _replaced(vars(value)[step[1:]], rest, number)
        return made
    if isinstance(value, tuple):
        items = [_replaced(each, rest, number) if i == step else each for i, each in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    made = copy.copy(value)
    made[step] = _replaced(value[step], rest, number)
    return made
