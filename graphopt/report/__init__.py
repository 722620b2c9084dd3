"""Say what was done, what was not and why: as data, as a terminal table, and as a page.

What may live here: the records that the stages above fill, and their rendering. Nothing here decides anything.

- ``records``: what happened, as plain data
- ``report``: :class:`Report`, the account of one run
- ``inspection``: :class:`Inspection`, what a model is made of before anything is done to it
- ``wording``: numbers and lists in words
- ``terminal``, ``html``: the two renderings
"""

from graphopt.report.inspection import FrozenRow, GroupRow, Inspection, UnknownRow, frozen_rows, unknown_rows
from graphopt.report.records import BudgetLine, Comparison, PassRecord, Site
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
    "frozen_rows",
    "unknown_rows",
]
