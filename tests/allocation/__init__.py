"""Test how sizes are chosen under budgets."""
