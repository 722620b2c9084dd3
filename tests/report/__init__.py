"""Test reports and what they look like."""
