"""Axes as types: the algebra of dimensions, the typing rules, inference, and the coupling that follows."""
