"""Say which operators a graph's file has, and let the file declare a newer version."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from graphopt.dialects.onnx.facts import ONNX, facts_of
from graphopt.graph import Graph

__all__ = ["SINCE", "offers", "require"]

SINCE: Final = {
    "Attention": 23,
    "Gelu": 20,
    "GroupNormalization": 21,
    "HardSwish": 14,
    "LayerNormalization": 17,
    "Mish": 18,
    "RMSNormalization": 23,
    "Swish": 24,
}
"""The version of the default operator set since which there is an operator; of others, it is 13 or earlier."""


def offers(graph: Graph, name: str, *, raise_opset: bool = False) -> bool:
    """Say whether the file's operator set has an operator, or may be raised to one that has."""
    return raise_opset or facts_of(graph).opset >= SINCE.get(name, 0)


def require(graph: Graph, name: str) -> None:
    """Let the file declare the least version that has an operator, and a version of the format that goes with it."""
    import onnx.helper

    facts, since = facts_of(graph), SINCE.get(name, 0)
    if facts.opset >= since:
        return
    opsets = {**facts.opsets, "": since}
    needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid(d, v) for d, v in opsets.items() if d == ""])
    graph.module.meta[ONNX] = replace(facts, opsets=opsets, ir_version=max(facts.ir_version, needed))
