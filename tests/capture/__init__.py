"""Check that a captured model is the model."""
