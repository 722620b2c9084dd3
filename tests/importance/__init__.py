"""Test how indices are scored."""
