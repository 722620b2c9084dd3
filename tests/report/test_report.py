"""Check what reports say, as data, in a terminal and as a page."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from graphopt.cost import Cost
from graphopt.report import BudgetLine, Comparison, FrozenRow, PassRecord, Report, Site, UnknownRow
from graphopt.report.terminal import statistics
from graphopt.report.wording import amount, bytes_of, listing, percent, plural, seconds
from graphopt.verify import Difference

BEFORE = Cost(macs=1_000_000, params=25_600, weight_bytes=102_400, activation_bytes=9_000, peak_activation_bytes=4_000)
AFTER = Cost(macs=500_000, params=12_800, weight_bytes=51_200, activation_bytes=6_000, peak_activation_bytes=3_000)


def site(name: str, *, kept: int, size: int = 64, reason: str = "", normalised: tuple[str, ...] = ()) -> Site:
    """Return what was done with a group."""
    facts = {
        "role": "channels",
        "size": size,
        "kept": kept,
        "places": [name, f"{name}.bias[0]"],
        "normalised": list(normalised),
        "params": 1200,
        "flops": 80_000 + kept,
    }
    return Site(name, kept < size, reason or f"kept {kept} of {size} indices", facts)


@pytest.fixture
def report() -> Report:
    """Return a report with something in every part."""
    comparison = Comparison.of(
        "the pruned and the masked model", Difference(2e-7, 0, torch.float32), "the example inputs"
    )
    record = PassRecord(
        position=0,
        name="prune-channels",
        text="prune-channels{importance=l1}",
        preserves="masked",
        changed=True,
        seconds=0.25,
        verify_seconds=1.5,
        before=BEFORE,
        after=AFTER,
        sites=(
            site("conv1.weight[0]", kept=32),
            site("conv2.weight[0]", kept=16),
            site("embed[1]", kept=64, reason="each of its 64 indices is worth more than the budget it takes"),
            site("other[1]", kept=8, size=8, reason="each of its 8 indices is worth more than the budget it takes"),
        ),
        comparisons=(comparison,),
        left_alone={"broken[0]": "relative difference 1.0"},
        notes=("a note of the pass",),
    )
    return Report(
        model="Net<1>",
        target="torch",
        pipeline="prune-channels{importance=l1}",
        seed=7,
        verify="each",
        before=BEFORE,
        after=AFTER,
        versions={"graphopt": "0.1.0"},
        budget=[BudgetLine("flops", BEFORE.flops, BEFORE.flops / 2, AFTER.flops)],
        passes=[record],
        frozen=[FrozenRow("a dimension of the model's output", ("fc.weight[0]",), ("output",), 650, 10_240)],
        unknown=[UnknownRow("mine.kernel.default", ("kernel", "kernel_1"))],
        notes=["a note of the capture"],
        warnings=["something [bold]loud[/] & <b>bad</b>"],
        timings={"capture": 2.0, "passes": 1.75},
        score=(0.987, 0.9),
        artifacts={"pt2": "out/model.pt2"},
    )


class TestWords:
    @pytest.mark.parametrize(
        ("value", "written"),
        [
            (0, "0"),
            (7, "7"),
            (0.5, "0.5"),
            (999, "999"),
            (1000, "1.00 k"),
            (25_557_032, "25.6 M"),
            (14_000_000, "14.0 M"),
            (102_000, "102 k"),
            (999_600, "1000 k"),
            (4_089_184_256, "4.09 G"),
            (2.5e15, "2500 T"),
        ],
    )
    def test_amounts(self, value: float, written: str) -> None:
        assert amount(value) == written

    def test_the_rest(self) -> None:
        assert [bytes_of(7), bytes_of(102_400)] == ["7 B", "102 kB"]
        assert [seconds(0.0123), seconds(3.44), seconds(125)] == ["12 ms", "3.4 s", "2 min 5 s"]
        assert [percent(1, 3), percent(1, 0)] == ["33.3 %", "–"]
        assert [plural(1, "index", "indices"), plural(2000, "index", "indices"), plural(2, "group")] == [
            "1 index",
            "2,000 indices",
            "2 groups",
        ]
        assert [listing(["a", "b"]), listing(["a", "b", "c", "d", "e"], 2)] == ["a, b", "a, b and 3 more"]


class TestData:
    def test_summary(self, report: Report) -> None:
        assert list(report.sentences()) == [
            "Of the model's multiply-adds 50.0 % are left, of its parameters 50.0 %: 2.00 M → 1.00 M flops, "
            "25.6 k → 12.8 k parameters, 102 kB → 51.2 kB of weights.",
            "80 indices of 128 were removed, in 2 groups.",
            "Budget of flops: at most 1.00 M (50.0 % of the original), and 1.00 M (50.0 %) reached.",
            "The caller's metric was 0.987 before and is 0.9 now (-0.087).",
            "Written: out/model.pt2.",
        ]

    def test_a_budget_that_is_missed_is_said_to_be(self, report: Report) -> None:
        report.budget = [BudgetLine("flops", 100.0, 40.0, 41.0)]
        assert any(sentence.endswith("reached, which is above the target.") for sentence in report.sentences())
        assert "not met" in str(report)
        assert "not met" in report.to_html()

    def test_nothing_done_is_said_so(self, report: Report) -> None:
        report.passes = []
        report.after = report.before
        assert next(report.sentences()) == "The model computes and costs what it did."

    def test_as_json(self, report: Report, tmp_path: Path) -> None:
        report.save_json(tmp_path / "report.json")
        data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        assert data == json.loads(json.dumps(report.to_dict()))
        assert data["cost"]["before"]["flops"] == 2_000_000
        assert data["budget"][0]["met"] is True
        assert data["passes"][0]["sites"][1]["kept"] == 16
        assert data["passes"][0]["comparisons"][0]["passed"] is True
        assert data["passes"][0]["left_alone"] == {"broken[0]": "relative difference 1.0"}
        assert data["score"] == {"before": 0.987, "after": 0.9}

    def test_json_holds_what_is_not_finite(self, report: Report) -> None:
        infinite = Comparison.of("a and b", Difference(float("inf"), 0, torch.float64), "x")
        report.comparisons = [infinite]
        assert not infinite.passed
        assert json.loads(report.to_json())["comparisons"][0]["relative"] == "inf"

    def test_a_measured_difference_always_passes(self) -> None:
        measured = Comparison.of("a and b", Difference(3.0, 1, torch.float32), "x", measured=True)
        assert measured.passed
        assert str(measured) == ("a and b: relative difference 3.0e+00 in output 1, in float32 (measured only), on x")


class TestTerminal:
    def test_every_part_is_there(self, report: Report) -> None:
        text = str(report)
        for part in (
            "Net<1> → torch",
            "something [bold]loud[/] & <b>bad</b>",
            "≤ 1.00 M, met",
            "Groups (2 of 4 cut)",
            "conv2.weight[0]",
            "each of its indices is worth more than the budget it takes",
            "a dimension of the model's output",
            "the pruned and the masked model",
            "2.0e-07",
            "a note of the capture",
            "a note of the pass",
            "out/model.pt2",
            "seed 7",
        ):
            assert part in text

    def test_like_reasons_stand_together(self, report: Report) -> None:
        (line,) = [line for line in str(report).splitlines() if "worth more than" in line]
        assert line.split()[-3:] == ["2", "embed[1],", "other[1]"]

    @pytest.mark.parametrize("width", [60, 80, 112, 200])
    def test_it_fits_the_terminal(self, report: Report, width: int) -> None:
        file = StringIO()
        Console(file=file, width=width, no_color=True).print(report)
        assert max(map(len, file.getvalue().splitlines())) <= width

    def test_long_tables_are_cut_short(self, report: Report) -> None:
        sites = tuple(site(f"layer{i}.weight[0]", kept=32) for i in range(40))
        report.passes = [dataclasses.replace(report.passes[0], sites=sites)]
        assert "and 16 groups more, 512 of 1,024 indices kept" in str(report)
        assert report.to_html().count("layer39.weight[0]</code>") == 2

    def test_statistics(self, report: Report) -> None:
        file = StringIO()
        Console(file=file, width=120).print(statistics(report))
        assert "1. prune-channels{importance=l1}" in file.getvalue()
        assert "250 ms, 1.5 s of verification, changed, 2 applied, 2 skipped, 2.00 M → 1.00 M flops" in file.getvalue()


class Page(HTMLParser):
    """Check that tags are balanced, and collect text and addresses."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


class TestPage:
    def test_it_is_whole_and_needs_nothing(self, report: Report) -> None:
        page = Page()
        page.feed(report.to_html())
        assert page.open == []
        assert page.addresses == []
        for part in ("http:", "https:", "<script", "@import", "url("):
            assert part not in report.to_html()

    def test_every_part_is_there(self, report: Report) -> None:
        page = Page()
        page.feed(report.to_html())
        text = " ".join(page.text)
        for part in (
            "Net<1>",
            "something [bold]loud[/] & <b>bad</b>",
            "50.0 % of 25.6 k",
            "conv2.weight[0]",
            "embed[1]",
            "mine.kernel.default",
            "fc.weight[0]",
            "2.0e-07",
            "a note of the pass",
            "Seed 7",
            "graphopt 0.1.0",
        ):
            assert part in text

    def test_names_are_escaped(self, report: Report) -> None:
        assert "<b>bad</b>" not in report.to_html()
        assert "Net<1>" not in report.to_html()

    def test_it_stands_in_a_notebook(self, report: Report, tmp_path: Path) -> None:
        fragment = report._repr_html_()
        assert fragment.startswith("<div class=graphopt>")
        assert fragment in report.to_html()
        report.save_html(tmp_path / "report.html")
        assert (tmp_path / "report.html").read_text(encoding="utf-8") == report.to_html()
