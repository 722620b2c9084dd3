"""Turn a model into a :class:`~graphopt.graph.Graph`.

What may live here: reading model formats, running ``torch.export``, and rebuilding its program as a module that
trains. Nothing here changes what a model computes; nothing here knows axes or passes.

- ``frontend``: :func:`capture`, which tells the kinds of model apart
- ``inputs``: example inputs: given, found, described; which dimensions are dynamic
- ``export``: the structural copy, ``torch.export``, and its failures in plain words
- ``build``: an exported program becomes a :class:`~graphopt.graph.TraceModule`
- ``modes``: what differs between training and evaluation
- ``tensors``: tensors of the graph's own
- ``hollow``: :func:`without_weights`, to build a model larger than memory
"""

from graphopt.capture.frontend import capture
from graphopt.capture.hollow import without_weights

__all__ = ["capture", "without_weights"]
