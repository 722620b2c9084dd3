"""Say what a model costs, and what it would cost with fewer indices: polynomials in the kept sizes."""

from graphopt.cost.model import Cost, CostModel, LayerCost, Quantity
from graphopt.cost.polynomial import Peak, Polynomial

__all__ = ["Cost", "CostModel", "LayerCost", "Peak", "Polynomial", "Quantity"]
