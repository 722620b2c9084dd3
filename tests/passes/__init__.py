"""Test the passes."""
