"""Test graphopt; the folders mirror the package, `zoo` builds the models."""
