"""Lower a graph of ATen operators to ONNX.

What may live here: rewrites that make a graph ready, one a file, and one translation an operator, by family. A
translation emits standard ONNX operators for one call; it reads arguments by schema name and types from the graph,
so nothing is traced or exported a second time. Importing this package does not import ``onnx``.

- ``fold``, ``functionalise``: the rewrites, in this order
- ``emitter``: nodes, constants and sizes of an ONNX graph under construction
- ``elementwise``, ``contraction``, ``normalisation``, ``reduction``, ``shape``, ``indexing``, ``creation``,
  ``spatial``, ``symbols``: the translations
- ``names``: what inputs and outputs are called
- ``translate``: the walk over a graph
- ``storage``: weights inside the file, or beside it
- ``exporter``: PyTorch's own exporter, for operators without a translation
"""
