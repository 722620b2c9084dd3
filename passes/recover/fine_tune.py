"""Train what is left of a model, with the caller's own training."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from graphopt.errors import GraphOptError, PassError, PipelineError
from graphopt.graph import Graph
from graphopt.pipeline import Context, Pass, PassResult, Preserves, register


@register
@dataclass(frozen=True)
class FineTune(Pass):
    """Hand the model to the caller's training, between steps of pruning or after the last one.

    ``finetune`` of :func:`graphopt.optimize` is called with a copy of the model, an ``nn.Module`` in training mode that
    runs and trains like the original, and trains it in place. Its structure must stay as it is; what it returns is not
    looked at.

    Batch norms of an ONNX model are those of inference: training moves their scale and shift, and leaves mean and
    variance as the file has them. Dropout, which exporters leave out, is not there either.
    """

    name: ClassVar[str] = "fine-tune"
    preserves: ClassVar[Preserves] = Preserves.APPROXIMATE

    def run(self, graph: Graph, context: Context) -> PassResult:
        if context.train is None:
            raise PipelineError(
                f"{self.name} has nothing to call: pass finetune=, a function that trains a module in place, to "
                "graphopt.optimize"
            )
        module = copy.deepcopy(graph.module)
        text = graph.text()
        module.train()
        try:
            context.train(module)
        except GraphOptError:
            raise
        except Exception as error:
            raise PassError(
                f"finetune broke off: {type(error).__name__}: {error}. It is called with a module in training mode and "
                "trains it in place"
            ) from error
        module.eval()
        trained = Graph(module, graph.example_inputs, graph.aliases, graph.notes, graph.sources)
        if trained.text() != text:
            raise PassError("finetune changed the structure of the module; it may change the parameters' values only")
        _check_finite(trained)
        context.applied("the whole model", "trained by the caller's finetune")
        return PassResult(trained, retrained=True)


def _check_finite(graph: Graph) -> None:
    for name, tensor in graph.tensors().items():
        if tensor.is_floating_point() and not bool(tensor.detach().isfinite().all()):
            raise PassError(
                f"after finetune {name} holds NaN or infinity: the training diverged; lower the learning rate, or "
                "prune in more steps"
            )
