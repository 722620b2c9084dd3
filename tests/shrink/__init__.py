"""Test modules that are given back in their own class."""
