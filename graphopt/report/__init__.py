"""Say what was done, what was not and why: as data, as a terminal table, and as a page.

What may live here: the records that the stages above fill, and their rendering. Nothing here decides anything.

- ``records``: what happened, as plain data
- ``report``: :class:`Report`, the account of one run
- ``inspection``: :class:`Inspection`, what a model is made of before anything is done to it
- ``explanation``: what ties a dimension, in words
- ``wording``: numbers and lists in words
- ``terminal``, ``html``: the two renderings
"""

from graphopt.report.explanation import explanation_lines, print_explanation
from graphopt.report.inspection import Inspection, at_stake, frozen_rows, unknown_rows
from graphopt.report.records import BudgetLine, Comparison, FrozenRow, GroupRow, PassRecord, Site, UnknownRow
from graphopt.report.report import Report

__all__ = [
    "BudgetLine",
    "Comparison",
    "FrozenRow",
    "GroupRow",
    "Inspection",
    "PassRecord",
    "Report",
    "Site",
    "UnknownRow",
    "at_stake",
    "explanation_lines",
    "frozen_rows",
    "print_explanation",
    "unknown_rows",
]
