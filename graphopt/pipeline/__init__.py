"""Run passes in order, check what each promised, and write such an order as text.

What may live here: the contract of a pass, the list of passes with its textual forms, and the machine that runs it.
Nothing here knows a particular pass; ``graphopt.passes`` fills the registry.

- ``base``: :class:`Pass`, :class:`PassResult`, :class:`Context`
- ``registry``: passes by name
- ``text``, ``options``: the grammar, and dataclasses as options
- ``pipeline``: :class:`Pipeline`
- ``promises``: what passes promise, how that is checked, and which groups are to blame
- ``runner``: the order of events
"""

from graphopt.pipeline.base import Context, Pass, PassResult, Preserves, Reference, Removal
from graphopt.pipeline.options import OptionDoc, choice, describe, summary
from graphopt.pipeline.pipeline import Pipeline
from graphopt.pipeline.registry import find_pass, register, registered
from graphopt.pipeline.runner import Observer, Outcome, Verify, observer, run, watching

__all__ = [
    "Context",
    "Observer",
    "OptionDoc",
    "Outcome",
    "Pass",
    "PassResult",
    "Pipeline",
    "Preserves",
    "Reference",
    "Removal",
    "Verify",
    "choice",
    "describe",
    "find_pass",
    "observer",
    "register",
    "registered",
    "run",
    "summary",
    "watching",
]
