"""Test that ONNX models are read."""
