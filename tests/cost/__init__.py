"""Test what graphopt says a model costs."""
