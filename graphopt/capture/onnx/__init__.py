"""Read ONNX files and models into a graph."""
