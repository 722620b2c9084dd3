"""Read ONNX models into a graph of ONNX operators.

- ``frontend``: :func:`read`, from a file, a ``ModelProto`` or a graph of onnx-graphsurgeon
- ``files``: a file that may be broken or hostile becomes a model in good form
- ``inputs``: example inputs, given or made up; other sizes at which dimensions show that they vary
- ``build``: nodes of onnx-graphsurgeon become nodes of ``torch.fx``, with types
- ``operands``, ``values``, ``naming``: what is asked of one operator, known of one value, and how both are called
- ``sizes``: arithmetic on sizes, which becomes arguments
"""

from graphopt.capture.onnx.frontend import is_onnx, read

__all__ = ["is_onnx", "read"]
