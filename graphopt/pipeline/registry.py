"""Find a pass by its name.

The registry is filled by ``graphopt.passes``, which registers each of its passes as it is imported. A pass of your own
is registered the same way: ``register(MyPass)``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, TypeVar

from graphopt.errors import PipelineError, unknown_name
from graphopt.pipeline.base import Pass, Preserves

__all__ = ["find_pass", "register", "registered"]

MOST_OPTIONS: Final = 6

_PASSES: Final[dict[str, type[Pass]]] = {}

P = TypeVar("P", bound=type[Pass])


def register(cls: P) -> P:
    """Make a pass known to pipelines' texts; returns the class, so that it can be used as a decorator.

    Raises:
        ValueError: the class is no frozen dataclass with a name, a promise, a docstring and at most six options, or
            another pass has its name.
    """
    name = getattr(cls, "name", "")
    parameters = getattr(cls, "__dataclass_params__", None)
    if "__dataclass_params__" not in vars(cls) or parameters is None or not parameters.frozen:
        raise ValueError(f"{cls.__name__} must be decorated with @dataclass(frozen=True)")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ValueError(f"{cls.__name__}.name must be lower-case words joined by hyphens; found {name!r}")
    if not isinstance(getattr(cls, "preserves", None), Preserves):
        raise ValueError(f"{cls.__name__}.preserves must say what the pass promises, as a member of Preserves")
    if not vars(cls).get("__doc__"):
        raise ValueError(f"{cls.__name__} has no docstring")
    if len(dataclasses.fields(cls)) > MOST_OPTIONS:
        raise ValueError(f"{cls.__name__} has {len(dataclasses.fields(cls))} options; {MOST_OPTIONS} are the most")
    if _PASSES.get(name, cls) is not cls:
        raise ValueError(f"two passes are named '{name}': {_PASSES[name].__name__} and {cls.__name__}")
    _PASSES[name] = cls
    return cls


def registered() -> Mapping[str, type[Pass]]:
    """Return every registered pass by its name."""
    return MappingProxyType(dict(sorted(_PASSES.items())))


def find_pass(name: str) -> type[Pass]:
    """Return the pass of that name.

    Raises:
        PipelineError: there is none; the message has the nearest name, and all of them.
    """
    if name not in _PASSES:
        raise PipelineError(unknown_name("pass", name, _PASSES))
    return _PASSES[name]
