"""Find what differs between training and evaluation, and write it where :class:`TraceModule` switches it."""

from __future__ import annotations

from typing import Final

from torch import nn

from graphopt.graph import MODE, OWNER, Call, TraceModule

FLAGS: Final = ("training", "train", "use_input_stats")
"""Arguments by which ATen operators are told the mode."""


def mark(module: TraceModule, original: nn.Module) -> list[str]:
    """Mark the arguments that training switches on, as the modules of ``original`` (a copy) would; returns notes."""
    was_training = {name: part.training for name, part in original.named_modules(remove_duplicate=False)}
    original.train()
    trains = {name: part.training for name, part in original.named_modules(remove_duplicate=False)}
    for name, part in original.named_modules(remove_duplicate=False):
        part.training = was_training[name]
    for node in module.graph.nodes:
        if not hasattr(node.target, "_schema"):
            continue
        call = Call(node)
        for flag in FLAGS:
            if call.has(flag) and call[flag] is False and trains.get(node.meta.get(OWNER, ""), True):
                node.meta[MODE] = {call.key(flag): (False, True)}
    return []
