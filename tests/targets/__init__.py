"""Test the targets, and the lowering to ONNX."""
