"""Hold the account of one run, and show it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.report.html import fragment, page
from graphopt.report.records import Account
from graphopt.report.terminal import as_text, report_parts

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["Report"]


@dataclass
class Report(Account):
    """The account of one run: what was done, what was not, and why. Printed as tables, in a terminal and in Jupyter."""

    def save_json(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    def to_html(self) -> str:
        """Return the report as a page that needs nothing but itself."""
        return page(self)

    def save_html(self, path: str | Path) -> None:
        """Write the report as a page that needs nothing but itself."""
        Path(path).write_text(self.to_html(), encoding="utf-8")

    def _repr_html_(self) -> str:
        return fragment(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from report_parts(self)

    def __str__(self) -> str:
        return as_text(self)
