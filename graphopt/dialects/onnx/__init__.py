"""The ONNX dialect: operators of ONNX as targets of a graph, by family."""
