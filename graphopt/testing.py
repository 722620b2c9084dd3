"""Help to test passes: run one on a model, and look at what it did and whether it kept its promise.

What may live here: what tests of passes, in this project and in others, have in common. Nothing here is imported by the
rest of graphopt.

    trial = try_pass(PruneChannels(budget=Budget(flops=0.5)), model, inputs)
    assert trial.difference() < 1e-9      # meaning, in float64
    assert trial.notices_damage()         # the comparison is able to fail
    assert trial.again().unchanged        # idempotence
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphopt.allocation import Budget
from graphopt.axes.algebra import Atom, Indices
from graphopt.axes.infer import Typing
from graphopt.capture import capture
from graphopt.cost import Cost, CostModel
from graphopt.dialects import infer
from graphopt.graph import Graph
from graphopt.pipeline import Context, Pass, PassResult, Reference
from graphopt.plan import Plan
from graphopt.report import Site
from graphopt.rewrite import rewrite
from graphopt.verify import difference, evaluate, masked_outputs

__all__ = ["Trial", "damaged", "pruned", "try_pass"]


@dataclass(frozen=True)
class Trial:
    """What a pass did to a graph.

    Attributes:
        each: The pass.
        before: The graph from before.
        after: The graph after it, with removed indices gone.
        result: What the pass handed back.
        context: What it was given, with what it said.
    """

    each: Pass
    before: Graph
    after: Graph
    result: PassResult
    context: Context

    @property
    def applied(self) -> list[Site]:
        """The sites where the pass acted."""
        return [site for site in self.context.sites if site.applied]

    @property
    def skipped(self) -> list[Site]:
        """The sites that it left alone, with the reasons."""
        return [site for site in self.context.sites if not site.applied]

    @property
    def unchanged(self) -> bool:
        """Say whether the graph's text is what it was."""
        return self.before.text() == self.after.text()

    @property
    def cost(self) -> Cost:
        """What the graph costs now."""
        return CostModel(infer(self.after)).cost()

    def text(self) -> str:
        """Return the lines of the graph's text that changed, before with ``-`` and after with ``+``."""
        lines = difflib.unified_diff(self.before.text().splitlines(), self.after.text().splitlines(), n=0, lineterm="")
        return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))

    def difference(self, after: Graph | None = None) -> float:
        """Return how far the graph is from what it must compute, relative, in float64.

        It must compute what the graph from before does; with removed indices, what that does when they are masked.
        """
        args, kwargs = self.before.example_inputs
        removal = self.result.removal
        if removal is None:
            expected = evaluate(self.before, args, kwargs, double=True)
        else:
            expected = masked_outputs(removal.typing, removal.keep, args, kwargs, double=True)
        found = evaluate(after or self.after, args, kwargs, double=True)
        return difference(expected, found, double=True).relative

    def notices_damage(self, least: float = 1e-6) -> bool:
        """Say whether the comparison fails when a weight is wrong, for every parameter that the graph reads."""
        parameters = [name for name, tensor in self.after.tensors().items() if isinstance(tensor, nn.Parameter)]
        return all(self.difference(damaged(self.after, name)) > least for name in parameters)

    def again(self) -> Trial:
        """Run the pass once more, on the result; fractions of a budget still refer to the first model."""
        return _try(self.each, self.after, self.context)


def try_pass(
    each: Pass,
    model: Any,
    example_inputs: Any = None,
    *,
    budget: Budget | None = None,
    channel_multiple: int = 1,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
    reference: Reference | None = None,
) -> Trial:
    """Run one pass on a model, outside of any pipeline: nothing is verified.

    Args:
        each: the pass.
        model: a graph, or whatever :func:`~graphopt.capture.capture` takes.
        example_inputs: as for ``capture``.
        budget: the caller's budget.
        channel_multiple: sizes that the target computes in multiples of.
        calibration: batches, for criteria that look at data.
        seed: seeds whatever is random.
        reference: what the model was before indices were removed, as :func:`pruned` returns it.
    """
    graph = model if isinstance(model, Graph) else capture(model, example_inputs)
    context = Context(
        original=CostModel(infer(graph)).cost(),
        budget=budget,
        channel_multiple=channel_multiple,
        calibration=calibration,
        seed=seed,
        reference=reference,
    )
    return _try(each, graph, context)


def pruned(typing: Typing, keep: Mapping[Atom, Indices]) -> tuple[Graph, Reference]:
    """Remove indices from a graph, and return what is left with what later passes measure it against."""
    return rewrite(typing, keep), Reference(typing.graph, Plan.direct(typing, keep))


def damaged(graph: Graph, name: str) -> Graph:
    """Return a copy of the graph in which every entry of a parameter is a little wrong."""
    copy = graph.clone()
    tensor = graph.tensor(name)
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor.device)
    if tensor.is_floating_point():
        wrong = tensor.detach() + 0.1 * (tensor.detach().abs().max() + 1) * noise.to(tensor)
    else:  # a weight that is stored as whole numbers
        wrong = torch.where(tensor.detach() > 0, tensor.detach() - 1, tensor.detach() + 1 + (noise > 0).to(tensor))
    copy.set_tensor(name, nn.Parameter(wrong, requires_grad=tensor.requires_grad))
    return copy


def _try(each: Pass, graph: Graph, context: Context) -> Trial:
    fresh = Context(
        original=context.original,
        budget=context.budget,
        channel_multiple=context.channel_multiple,
        calibration=context.calibration,
        loss=context.loss,
        evaluate=context.evaluate,
        seed=context.seed,
        reference=context.reference,
    )
    with torch.random.fork_rng(devices=[]):
        result = each.run(graph.clone(), fresh)
    removal = result.removal
    after = result.graph if removal is None else rewrite(removal.typing, removal.keep)
    return Trial(each, graph, after, result, fresh)
