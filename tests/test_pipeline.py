"""Check pipelines: their textual forms, and that every pass keeps its promise or is named."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.allocation import Budget, Constraints
from graphopt.axes.infer import Operator
from graphopt.capture import capture
from graphopt.cost import CostModel
from graphopt.dialects import aten as dialect
from graphopt.dialects.aten import infer
from graphopt.errors import BudgetError, PassError, PipelineError, VerificationError
from graphopt.graph import Call, Graph
from graphopt.importance import L1, GroupTaylor
from graphopt.passes import PruneChannels
from graphopt.pipeline import (
    Context,
    Observer,
    Outcome,
    Pass,
    PassResult,
    Pipeline,
    Preserves,
    Reference,
    Removal,
    choice,
    describe,
    find_pass,
    register,
    registered,
    run,
    summary,
    watching,
)
from graphopt.pipeline import registry as pass_registry
from graphopt.report import PassRecord
from graphopt.verify import masked_equivalence

aten = torch.ops.aten


# -- passes to test with --------------------------------------------------------------------------------------------


class Colour(StrEnum):
    """Be something to choose from."""

    RED = "red"
    TWO_OF_FOUR = "2:4"


@dataclass(frozen=True)
class Soft:
    """Be chosen by name.

    Args:
        width: how wide.
    """

    width: float = 1.0


@dataclass(frozen=True)
class Hard:
    """Be chosen by name, without options."""


@dataclass(frozen=True)
class Inner:
    """Hold options of its own.

    Attributes:
        count: How many.
        label: What it is
            called.
    """

    count: int = 3
    label: str | None = None


CHOICES: dict[str, type] = {"soft": Soft, "hard": Hard}


@dataclass(frozen=True)
class Everything(Pass):
    """Take an option of every type. A second sentence."""

    name: ClassVar[str] = "take-everything"
    preserves: ClassVar[Preserves] = Preserves.EXACT

    flag: bool = False
    number: int | float | str | None = 1
    colour: Colour = Colour.RED
    mode: Literal["fast", "slow", "none"] = "fast"
    inner: Inner = field(default_factory=Inner)
    shape: Soft | Hard = field(default=Soft(), metadata=choice(CHOICES))

    def run(self, graph: Graph, context: Context) -> PassResult:
        return PassResult(graph)


@dataclass(frozen=True)
class Collections(Pass):
    """Take lists and tables."""

    name: ClassVar[str] = "take-collections"
    preserves: ClassVar[Preserves] = Preserves.EXACT

    names: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    parts: tuple[Inner, ...] = ()
    table: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    maybe: tuple[int, ...] | None = (1,)
    text: str = "x"

    def run(self, graph: Graph, context: Context) -> PassResult:
        return PassResult(graph)


@pytest.fixture
def extra_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the passes of this file for the length of a test."""
    monkeypatch.setattr(pass_registry, "_PASSES", dict(pass_registry._PASSES))
    for cls in (Everything, Collections, Nothing, Scale, Negate, Write, Break, Raise, Blur):
        register(cls)


@dataclass(frozen=True)
class Nothing(Pass):
    """Change nothing."""

    name: ClassVar[str] = "do-nothing"
    preserves: ClassVar[Preserves] = Preserves.EXACT

    def run(self, graph: Graph, context: Context) -> PassResult:
        context.skipped("everything", "there is nothing to do")
        return PassResult(graph)


@dataclass(frozen=True)
class Scale(Pass):
    """Scale one parameter, which is exact for a factor of one only."""

    name: ClassVar[str] = "scale-parameter"
    preserves: ClassVar[Preserves] = Preserves.EXACT

    factor: float = 1.0

    def run(self, graph: Graph, context: Context) -> PassResult:
        name = next(n for n, t in graph.tensors().items() if isinstance(t, nn.Parameter))
        graph.set_tensor(name, nn.Parameter(graph.tensor(name).detach() * self.factor))
        context.applied(name, f"scaled by {self.factor}", factor=self.factor)
        return PassResult(graph)


@dataclass(frozen=True)
class Negate(Pass):
    """Negate one parameter twice, which is exact only both together."""

    name: ClassVar[str] = "negate-parameter"
    preserves: ClassVar[Preserves] = Preserves.EXACT

    def run(self, graph: Graph, context: Context) -> PassResult:
        name = next(n for n, t in graph.tensors().items() if isinstance(t, nn.Parameter))
        graph.set_tensor(name, nn.Parameter(-graph.tensor(name).detach()))
        return PassResult(graph)


@dataclass(frozen=True)
class Blur(Pass):
    """Change one parameter, admittedly."""

    name: ClassVar[str] = "blur-parameter"
    preserves: ClassVar[Preserves] = Preserves.APPROXIMATE

    def run(self, graph: Graph, context: Context) -> PassResult:
        name = next(n for n, t in graph.tensors().items() if isinstance(t, nn.Parameter))
        graph.set_tensor(name, nn.Parameter(graph.tensor(name).detach() * 1.5))
        return PassResult(graph)


@dataclass(frozen=True)
class Write(Pass):
    """Write into a tensor that is shared with the graph from before."""

    name: ClassVar[str] = "write-in-place"
    preserves: ClassVar[Preserves] = Preserves.APPROXIMATE

    def run(self, graph: Graph, context: Context) -> PassResult:
        with torch.no_grad():
            next(iter(graph.tensors().values())).mul_(2)
        return PassResult(graph)


@dataclass(frozen=True)
class Break(Pass):
    """Remove about half of every group, unevenly, whether or not the rules are right."""

    name: ClassVar[str] = "break-groups"
    preserves: ClassVar[Preserves] = Preserves.MASKED

    def run(self, graph: Graph, context: Context) -> PassResult:
        typing = infer(graph)
        keep = {}
        for position, group in enumerate(typing.groups):
            if group.name in context.left_alone:
                context.skipped(group.name, context.left_alone[group.name])
            elif group.size > 1:
                keep[group.atom] = np.arange(group.size // 2 + position % 2, dtype=np.int64)
                context.applied(group.name, "halved")
        return PassResult(graph, Removal(typing, keep))


@dataclass(frozen=True)
class Raise(Pass):
    """Raise what it is told to."""

    name: ClassVar[str] = "raise-error"
    preserves: ClassVar[Preserves] = Preserves.EXACT

    kind: Literal["pass", "key", "budget"] = "key"

    def run(self, graph: Graph, context: Context) -> PassResult:
        if self.kind == "pass":
            raise PassError("node relu has no second argument; give it one")
        if self.kind == "budget":
            raise BudgetError("cannot be met", smallest={"flops": 0.3})
        raise KeyError("lost")


# -- textual forms --------------------------------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.floats(allow_nan=False)
inners = st.builds(Inner, count=st.integers(), label=st.none() | words)
shapes = st.builds(Soft, width=numbers) | st.builds(Hard)
everything = st.builds(
    Everything,
    flag=st.booleans(),
    number=st.none() | st.integers() | numbers | words,
    colour=st.sampled_from(Colour),
    mode=st.sampled_from(["fast", "slow", "none"]),
    inner=inners,
    shape=shapes,
)
collections = st.builds(
    Collections,
    names=st.lists(words, max_size=3).map(tuple),
    pair=st.tuples(st.integers(), numbers),
    parts=st.lists(inners, max_size=2).map(tuple),
    table=st.dictionaries(words, st.tuples(numbers, numbers), max_size=2),
    maybe=st.none() | st.lists(st.integers(), max_size=3).map(tuple),
    text=words,
)
pipelines = st.lists(everything | collections, max_size=3).map(Pipeline)


def exactly_equal(left: Any, right: Any) -> bool:
    """Say whether two option values are equal and of the same types: 1, 1.0 and True are not."""
    if isinstance(left, Pass | Inner | Soft | Hard) and type(left) is type(right):
        return all(exactly_equal(getattr(left, f.name), getattr(right, f.name)) for f in fields(left))
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(exactly_equal, left, right))
    return type(left) is type(right) and bool(left == right)


@pytest.mark.usefixtures("extra_passes")
class TestText:
    @given(pipelines)
    def test_text_parses_back(self, pipeline: Pipeline) -> None:
        parsed = Pipeline.parse(str(pipeline))
        assert parsed == pipeline
        assert all(map(exactly_equal, parsed, pipeline))
        assert str(parsed) == str(pipeline)

    @given(pipelines)
    def test_toml_parses_back(self, pipeline: Pipeline) -> None:
        text = pipeline.to_toml()
        tables = tomllib.loads(text).get("pass", [])
        assert [table["name"] for table in tables] == [each.name for each in pipeline]
        # TOML has no word for none: where text and none are both allowed, the text "none" stands for none.
        ambiguous = any(
            getattr(part, name, "") == "none"
            for each in pipeline
            for part in (each, getattr(each, "inner", None), *getattr(each, "parts", ()))
            for name in ("number", "label")
        )
        if not ambiguous:
            parsed = Pipeline.from_toml(text)
            assert parsed == pipeline
            assert all(map(exactly_equal, parsed, pipeline))

    @given(st.text(max_size=40) | st.text('take-vryhng,{}[]=" .5', max_size=40))
    def test_any_text_parses_or_is_refused_in_words(self, text: str) -> None:
        try:
            pipeline = Pipeline.parse(text)
        except PipelineError:
            return
        assert Pipeline.parse(str(pipeline)) == pipeline

    @pytest.mark.parametrize(
        ("text", "printed"),
        [
            ("", ""),
            (" take-everything ", "take-everything"),
            ("take-everything{}", "take-everything"),
            ("take-everything{ flag=true\n  number = 2 }", "take-everything{flag=true number=2}"),
            ("take-everything{number=none}", "take-everything{number=none}"),
            ("take-everything{number=0.5}", "take-everything{number=0.5}"),
            ("take-everything{number=half}", 'take-everything{number="half"}'),
            ('take-everything{number="0.5"}', 'take-everything{number="0.5"}'),
            ("take-everything{colour=2:4 mode=none}", 'take-everything{colour=2:4 mode="none"}'),
            ("take-everything{inner.count=4}", "take-everything{inner.count=4}"),
            ("take-everything{inner={count=4 label=a}}", 'take-everything{inner.count=4 inner.label="a"}'),
            ("take-everything{inner.count=4 inner.count=4}", None),
            ("take-everything{inner=4}", None),
            ("take-everything{shape=hard}", "take-everything{shape=hard}"),
            ("take-everything{shape=soft}", "take-everything"),
            ("take-everything{shape=soft{width=2}}", "take-everything{shape=soft{width=2.0}}"),
            ("take-collections{names=head.*}", "take-collections{names=[head.*]}"),
            ('take-collections{names=[a,"b c"]}', 'take-collections{names=[a, "b c"]}'),
            ("take-collections{parts=[{count=1},{}]}", "take-collections{parts=[{count=1}, {}]}"),
            ('take-collections{table={"a.b"=[0, 1]}}', 'take-collections{table={"a.b"=[0.0, 1.0]}}'),
            ("take-collections{maybe=none}", "take-collections{maybe=none}"),
            ("take-collections,take-everything", "take-collections,take-everything"),
        ],
    )
    def test_normal_form(self, text: str, printed: str | None) -> None:
        if printed is None:
            with pytest.raises(PipelineError):
                Pipeline.parse(text)
        else:
            assert str(Pipeline.parse(text)) == printed

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("take-everythin", "unknown pass 'take-everythin'; did you mean 'take-everything'? Valid names: "),
            ("quantize", "unknown pass 'quantize'. Valid names: "),
            (
                "take-everything{color=red}",
                "unknown option of take-everything 'color'; did you mean 'colour'? Valid names: colour, flag, ",
            ),
            (
                "do-nothing,take-everything{colour=rad}",
                "unknown value of pass 2, take-everything, colour: 'rad'; did you mean 'red'? Valid names: 2:4, red.",
            ),
            (
                "take-everything{mode=fats}",
                "unknown value of take-everything, mode: 'fats'; did you mean 'fast'? Valid names: fast, none, slow.",
            ),
            (
                "take-everything{shape=softt}",
                "unknown value of take-everything, shape: 'softt'; did you mean 'soft'? Valid names: hard, soft.",
            ),
            (
                "take-everything{shape=soft{widht=1}}",
                "unknown option of take-everything, shape=soft 'widht'; did you mean 'width'? Valid names: width.",
            ),
            ("take-everything{flag=yes}", "take-everything: the option 'flag' must be true or false; found yes"),
            (
                "take-everything{inner.count=1.5}",
                "take-everything, inner: the option 'count' must be an integer; found 1.5",
            ),
            (
                "take-everything{inner=[1]}",
                "take-everything: the option 'inner' must be {count=… label=…}; found [1]",
            ),
            (
                "take-collections{pair=[1]}",
                "take-collections: the option 'pair' must be a list of 2 values; found [1]",
            ),
            (
                "take-collections{table={a=[1]}}",
                "take-collections: the option 'table' must be a table whose entry 'a' is a list of 2 values; "
                "found {a=[1]}",
            ),
            (
                "take-everything{flag}",
                "pipeline text, character 21: expected '=' after 'flag'; found '}'\n"
                "  take-everything{flag}\n"
                "                      ^",
            ),
            (
                "take-everything{flag=true",
                "pipeline text, character 26: expected an option, as in name=value, or '}'; ",
            ),
            ("take-everything flag", "pipeline text, character 17: expected ',' between two passes; found 'f'"),
            ("do-nothing,", "pipeline text, character 12: expected the name of a pass; the text ends there"),
            ('take-collections{text="a}', "the string does not end, or holds a bad escape"),
            ("take-collections{names=[a b]}", "expected ',' or ']' in the list of 'names'; found 'b'"),
            ("take-everything{flag=true flag=true}", "the option 'flag' is given twice"),
            ("take-everything{inner=none inner.count=1}", "'inner' is given a value and options of its own"),
        ],
    )
    def test_refusals_say_what_is_wrong(self, text: str, message: str) -> None:
        with pytest.raises(PipelineError) as raised:
            Pipeline.parse(text)
        assert message in str(raised.value)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[[pass]", "the pipeline is not valid TOML: "),
            ("name = 1", "a pipeline in TOML holds tables [[pass]] and nothing else; found name"),
            ("[pass]\nname = 'do-nothing'", "found a single table 'pass'"),
            ("[[pass]]\nflag = true", 'table 0 of [[pass]] needs a name = "…"'),
            ("[[pass]]\nname = 'take-everything'\nflag = 1", "the option 'flag' must be true or false; found 1"),
            ("[[pass]]\nname = 'take-everything'\ncolour = 3", "unknown value of take-everything, colour: '3'"),
        ],
    )
    def test_toml_refusals_say_what_is_wrong(self, text: str, message: str) -> None:
        with pytest.raises(PipelineError) as raised:
            Pipeline.from_toml(text)
        assert message in str(raised.value)

    def test_toml_reads_like_toml(self) -> None:
        text = """
            [[pass]]
            name = "take-everything"
            flag = true
            number = 2.5
            shape = {name = "soft", width = 3}
            inner = {count = 5}

            [[pass]]
            name = "take-collections"
            names = ["a", "b"]
            maybe = "none"
            table = {"layer.*" = [0.5, 1]}
        """
        assert Pipeline.from_toml(text) == Pipeline(
            [
                Everything(flag=True, number=2.5, shape=Soft(3.0), inner=Inner(count=5)),
                Collections(names=("a", "b"), maybe=None, table={"layer.*": (0.5, 1.0)}),
            ]
        )

    def test_files(self, tmp_path: Path) -> None:
        path = tmp_path / "passes.toml"
        pipeline = Pipeline([Everything(flag=True)])
        path.write_text(pipeline.to_toml(), encoding="utf-8")
        assert Pipeline.of(str(path)) == Pipeline.of(path) == pipeline
        path.write_text("[[pass]]\nname = 'x'", encoding="utf-8")
        with pytest.raises(PipelineError, match=re.escape(f"{path}: unknown pass 'x'")):
            Pipeline.of(path)
        with pytest.raises(PipelineError, match=r"cannot read the pipeline lost\.toml: .*No such file"):
            Pipeline.of("lost.toml")

    def test_what_stands_for_a_pipeline(self) -> None:
        wanted = Pipeline([Everything(), Collections()])
        assert Pipeline.of("take-everything,take-collections") == wanted
        assert Pipeline.of([Everything(), Collections()]) == wanted
        assert Pipeline.of(Everything()) + Pipeline.of(Collections()) == wanted
        assert wanted[:1] == Pipeline([Everything()])
        assert wanted[1] == Collections()
        with pytest.raises(
            PipelineError, match="entry 0 of a pipeline must be an instance of a pass; found Everything"
        ):
            Pipeline([Everything])  # type: ignore[list-item]

    def test_options_are_described(self) -> None:
        assert summary(Everything) == "Take an option of every type. A second sentence."
        docs = {option.name: option for option in describe(Everything)}
        assert [*docs] == ["flag", "number", "colour", "mode", "inner.count", "inner.label", "shape"]
        assert (docs["flag"].takes, docs["flag"].default) == ("true or false", "false")
        assert docs["number"].takes == "an integer or a number or text or none"
        assert (docs["colour"].takes, docs["mode"].takes) == ("red | 2:4", "fast | slow | none")
        assert (docs["inner.count"].default, docs["inner.count"].help) == ("3", "How many.")
        assert docs["inner.label"].help == "What it is called."
        assert (docs["shape"].takes, docs["shape"].default) == ("soft | hard", "soft")


def test_prune_channels_in_text() -> None:
    each = PruneChannels(
        importance=GroupTaylor(batches=4),
        budget=Budget(flops=0.5),
        constraints=Constraints(exclude=("head.*",), bounds={"layer1.*": (0.5, 1.0)}, channel_multiple=8),
    )
    text = (
        "prune-channels{importance=group-taylor{batches=4} budget.flops=0.5 constraints.channel_multiple=8 "
        'constraints.exclude=[head.*] constraints.bounds={"layer1.*"=[0.5, 1.0]}}'
    )
    assert str(each) == text
    assert list(Pipeline.parse(text)) == [each]
    assert Pipeline.parse("prune-channels{importance=l1}") == Pipeline([PruneChannels(importance=L1())])


# -- the registry ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("extra_passes")
class TestRegistry:
    def test_passes_are_found_by_name(self) -> None:
        assert find_pass("take-everything") is Everything
        assert list(registered()) == sorted(registered())
        assert registered()["prune-channels"] is PruneChannels

    def test_two_passes_of_one_name_are_refused(self) -> None:
        @dataclass(frozen=True)
        class Other(Pass):
            """Have a name that is taken."""

            name: ClassVar[str] = "do-nothing"
            preserves: ClassVar[Preserves] = Preserves.EXACT

            def run(self, graph: Graph, context: Context) -> PassResult:
                return PassResult(graph)

        with pytest.raises(ValueError, match="two passes are named 'do-nothing': Nothing and Other"):
            register(Other)

    @pytest.mark.parametrize(
        ("name", "preserves", "message"),
        [
            ("Do_Nothing", Preserves.EXACT, "must be lower-case words joined by hyphens; found 'Do_Nothing'"),
            ("do-something", "exact", "must say what the pass promises, as a member of Preserves"),
        ],
    )
    def test_a_pass_has_a_name_and_a_promise(self, name: str, preserves: Any, message: str) -> None:
        cls = type("Made", (Nothing,), {"name": name, "preserves": preserves, "__doc__": "Do."})
        with pytest.raises(ValueError, match=re.escape(message)):
            register(dataclass(frozen=True)(cls))

    def test_a_pass_is_a_frozen_dataclass(self) -> None:
        with pytest.raises(ValueError, match=re.escape("Made must be decorated with @dataclass(frozen=True)")):
            register(type("Made", (Nothing,), {"name": "do-something"}))

    def test_a_pass_has_six_options_at_most(self) -> None:
        namespace = {"name": "do-much", "__annotations__": {f"o{i}": int for i in range(7)}, "__doc__": "Do."}
        cls = type("Made", (Nothing,), namespace | {f"o{i}": 0 for i in range(7)})
        with pytest.raises(ValueError, match="Made has 7 options; 6 are the most"):
            register(dataclass(frozen=True)(cls))


# -- promises -------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Three linear layers with a rectifier between them: groups of 8 and 6."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.second = nn.Linear(8, 6)
        self.third = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        return self.third(torch.sigmoid(self.second(hidden)) * 2)


@pytest.fixture
def graph() -> Graph:
    return capture(Chain(), torch.randn(4, 5))


def execute(pipeline: Sequence[Pass], graph: Graph, **options: Any) -> Outcome:
    """Run passes with the example inputs, as `optimize` does."""
    context = Context(original=CostModel(infer(graph)).cost(), budget=options.pop("budget", None))
    return run(Pipeline(pipeline), graph, context, inputs=[("the example inputs", graph.example_inputs)], **options)


def same_outputs(left: Graph, right: Graph) -> bool:
    args, kwargs = left.example_inputs
    return bool(torch.equal(left.run(*args, **kwargs), right.run(*args, **kwargs)))


@dataclass(frozen=True)
class Look(Pass):
    """Look at what the model is measured against, and write it down."""

    name: ClassVar[str] = "look"
    preserves: ClassVar[Preserves] = Preserves.APPROXIMATE
    seen: ClassVar[list[Reference | None]] = []

    def run(self, graph: Graph, context: Context) -> PassResult:
        self.seen.append(context.reference)
        return PassResult(graph)


class TestReference:
    """What a pass that makes up for removals measures the model against."""

    @pytest.fixture(autouse=True)
    def forget(self) -> None:
        Look.seen.clear()

    def test_there_is_none_before_a_removal(self, graph: Graph) -> None:
        execute([Look(), Nothing(), Look()], graph)
        assert Look.seen == [None, None]

    @pytest.mark.parametrize("between", [[], [Nothing()], [Blur()]], ids=["nothing", "no change", "approximate"])
    def test_removals_add_up(self, graph: Graph, between: list[Pass]) -> None:
        outcome = execute([Break(), Look(), *between, Break(), Look()], graph)
        first, second = Look.seen
        assert first is not None
        assert second is not None
        assert first.graph.text() == second.graph.text() == graph.text()
        assert {n: first.plan.shape_after(n) for n in ("first.weight", "second.weight")} == {
            "first.weight": (4, 5),
            "second.weight": (4, 4),
        }
        assert second.plan == outcome.plan
        for name, tensor in outcome.graph.tensors().items():
            assert tuple(tensor.shape) == (second.plan.shape_after(name) if name in second.plan.keep else tensor.shape)

    def test_a_lossless_change_ends_it(self, graph: Graph) -> None:
        execute([Break(), Scale(), Look(), Break(), Look()], graph)
        first, second = Look.seen
        assert first is None
        assert second is not None
        assert tuple(second.graph.tensor("first.weight").shape) == (4, 5)


class TestPromises:
    @pytest.mark.parametrize("verify", ["each", "final", "off"])
    def test_nothing_is_nothing(self, graph: Graph, verify: Any) -> None:
        outcome = execute([Nothing(), Nothing()], graph, verify=verify)
        assert [record.changed for record in outcome.records] == [False, False]
        assert [site.reason for site in outcome.records[0].skipped] == ["there is nothing to do"]
        assert same_outputs(graph, outcome.graph)
        assert not outcome.plan.keep

    def test_an_exact_pass_is_compared(self, graph: Graph) -> None:
        before = graph.text()
        outcome = execute([Scale(1.0)], graph)
        (record,) = outcome.records
        assert record.changed
        assert [(c.relative, c.passed, c.inputs) for c in record.comparisons] == [(0.0, True, "the example inputs")]
        assert graph.text() == before

    def test_an_exact_pass_that_is_not_is_named(self, graph: Graph) -> None:
        with pytest.raises(VerificationError) as raised:
            execute([Nothing(), Scale(1.25)], graph)
        message = str(raised.value)
        assert message.startswith(
            "pass 2 'scale-parameter' of the pipeline \"do-nothing,scale-parameter{factor=1.25}\" did not keep its "
            "promise (the outputs must stay as they were): the model before and after: relative difference "
        )
        assert re.search(r"relative difference \d\.\de[+-]\d\d in output 0, in float64 \(allowed 8e-06\)", message)
        assert message.endswith("The model was left as it was before")

    def test_at_the_end_only_the_end_counts(self, graph: Graph) -> None:
        with pytest.raises(VerificationError):
            execute([Negate(), Negate()], graph)
        outcome = execute([Negate(), Negate()], graph, verify="final")
        assert same_outputs(graph, outcome.graph)
        assert [c.passed for c in outcome.comparisons] == [True]
        with pytest.raises(VerificationError) as raised:
            execute([Negate(), Nothing()], graph, verify="final")
        assert "pass 1 'negate-parameter'" in str(raised.value)
        assert "and pass 2 'do-nothing'" in str(raised.value)

    def test_off_checks_nothing(self, graph: Graph) -> None:
        outcome = execute([Scale(3.0)], graph, verify="off")
        assert not same_outputs(graph, outcome.graph)
        assert outcome.records[0].comparisons == ()

    def test_an_approximate_pass_is_measured(self, graph: Graph) -> None:
        for verify in ("each", "final"):
            (record,) = execute([Blur()], graph, verify=verify).records
            (comparison,) = record.comparisons
            assert comparison.relative > 1e-3
            assert comparison.allowed is None
            assert comparison.passed
        assert execute([Blur()], graph, verify="off").records[0].comparisons == ()

    def test_what_was_promised_before_an_approximate_pass_is_checked_before_it(self, graph: Graph) -> None:
        outcome = execute([Negate(), Negate(), Blur(), Break()], graph, verify="final")
        assert [c.subject.split(",")[0] for c in outcome.comparisons][:2] == [
            "the model before and after",
            "the pruned and the masked model",
        ]
        with pytest.raises(VerificationError, match="pass 1 'negate-parameter'"):
            execute([Negate(), Blur()], graph, verify="final")

    def test_a_masked_pass_is_compared_and_its_plan_kept(self, graph: Graph) -> None:
        outcome = execute([Break()], graph)
        (record,) = outcome.records
        assert all(c.passed for c in record.comparisons)
        assert record.changed
        assert record.after.params < record.before.params
        assert outcome.plan.keep["first.weight"][0].tolist() == [0, 1, 2, 3]
        assert outcome.graph.tensor("first.weight").shape == (4, 5)

    def test_plans_compose(self, graph: Graph) -> None:
        outcome = execute([Break(), Break()], graph)
        assert outcome.plan.keep["first.weight"][0].tolist() == [0, 1]
        assert outcome.plan.keep["second.weight"][0].tolist() == [0, 1, 2]
        assert outcome.plan.keep["second.weight"][1].tolist() == [0, 1]
        assert outcome.graph.tensor("second.weight").shape == (3, 2)

    def test_a_broken_pass_is_named(self, graph: Graph) -> None:
        with pytest.raises(PassError) as raised:
            execute([Raise("key")], graph)
        assert str(raised.value) == (
            "pass 1 'raise-error' of the pipeline \"raise-error\" broke off: KeyError: 'lost'. "
            "The model was left as it was"
        )
        assert isinstance(raised.value.__cause__, KeyError)

    def test_what_a_pass_says_is_kept(self, graph: Graph) -> None:
        with pytest.raises(PassError) as raised:
            execute([Nothing(), Raise("pass")], graph)
        assert str(raised.value) == (
            "pass 2 'raise-error' of the pipeline \"do-nothing,raise-error{kind=pass}\": "
            "node relu has no second argument; give it one"
        )
        with pytest.raises(BudgetError) as budget:
            execute([Raise("budget")], graph)
        assert budget.value.smallest == {"flops": 0.3}
        assert budget.value.__notes__ == ["in pass 1 'raise-error' of the pipeline \"raise-error{kind=budget}\""]

    def test_a_pass_that_writes_into_shared_tensors_is_caught(self, graph: Graph) -> None:
        with pytest.raises(PassError, match=r"wrote into the tensor 'first\.weight', which it shares"):
            execute([Write()], graph)


@pytest.fixture
def lying_sigmoid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Type the sigmoid as if its result had nothing to do with its argument: a missing tie."""

    def fresh(t: Any, call: Call) -> Any:
        return tuple(t.fresh(n) for n in t.shape())

    assert isinstance(dialect.OPERATORS, dict)
    monkeypatch.setitem(dialect.OPERATORS, aten.sigmoid.default, Operator(fresh))


@pytest.mark.usefixtures("lying_sigmoid")
class TestBlame:
    def test_groups_to_blame_are_found_and_left_alone(self, graph: Graph) -> None:
        outcome = execute([Break()], graph)
        (record,) = outcome.records
        assert sorted(record.left_alone) == ["second.weight[0]", "third.weight[1]"]
        assert all("the result does not run" in why for why in record.left_alone.values())
        assert [site.name for site in record.applied] == ["first.weight[0]"]
        assert [site.name for site in record.skipped] == ["second.weight[0]", "third.weight[1]"]
        assert all(c.passed for c in record.comparisons)
        assert outcome.graph.tensor("first.weight").shape == (4, 5)
        assert outcome.graph.tensor("second.weight").shape == (6, 4)

    def test_at_the_end_they_are_only_told(self, graph: Graph) -> None:
        with pytest.raises(VerificationError, match="verify='each' finds the groups that are to blame"):
            execute([Break()], graph, verify="final")

    def test_a_budget_that_needs_them_is_refused(self, graph: Graph) -> None:
        with pytest.raises(VerificationError) as raised:
            execute([PruneChannels()], graph, budget=Budget(params=0.3))
        message = str(raised.value)
        assert "changing second.weight[0] gave a wrong model" in message
        assert "Without them the budget cannot be met" in message

    def test_a_budget_that_does_not_is_met(self, graph: Graph) -> None:
        outcome = execute([PruneChannels()], graph, budget=Budget(params=0.7))
        (record,) = outcome.records
        assert record.left_alone
        assert record.after.params <= 0.7 * record.before.params
        reasons = {site.name: site.reason for site in record.skipped}
        assert reasons["third.weight[1]"].startswith("left alone: cutting it gave a wrong model (")


@dataclass(frozen=True)
class Bump(Pass):
    """Double every parameter whose name the option does not spare, and halve the result: wrong for the second layer."""

    name: ClassVar[str] = "bump-parameters"
    preserves: ClassVar[Preserves] = Preserves.EXACT
    asks: bool = True

    def run(self, graph: Graph, context: Context) -> PassResult:
        for name, tensor in graph.tensors().items():
            if self.asks and not context.allows(name):
                continue
            wrong = name.startswith("second")
            graph.set_tensor(name, nn.Parameter(tensor.detach() * (2 if wrong else 1)))
            context.applied(name, "bumped")
        return PassResult(graph)


class TestSites:
    """A lossless pass that is wrong at some sites is run again without them."""

    def test_sites_to_blame_are_found_and_left_alone(self, graph: Graph) -> None:
        outcome = execute([Bump()], graph)
        (record,) = outcome.records
        assert sorted(record.left_alone) == ["second.bias", "second.weight"]
        assert [site.name for site in record.applied] == ["first.weight", "first.bias", "third.weight", "third.bias"]
        (reason,) = {site.reason.split(" (")[0] for site in record.skipped}
        assert reason == "left alone: with it the result was wrong"
        assert same_outputs(graph, outcome.graph)

    def test_a_pass_that_spares_nothing_is_refused(self, graph: Graph) -> None:
        with pytest.raises(VerificationError, match="did not keep its promise"):
            execute([Bump(asks=False)], graph)

    @pytest.mark.parametrize("broken", [Bump(asks=False), Raise("key"), Raise("pass")], ids=str)
    def test_a_forgiving_run_goes_on_without_it(self, graph: Graph, broken: Pass) -> None:
        outcome = execute([broken, Break()], graph, forgiving=True)
        record, after = outcome.records
        assert f"pass 1 '{broken.name}' of the pipeline" in record.left_out
        assert (record.changed, record.before, after.before) == (False, record.after, record.before)
        assert after.changed
        assert all(c.passed for c in after.comparisons)

    def test_a_budget_is_never_forgiven(self, graph: Graph) -> None:
        with pytest.raises(BudgetError):
            execute([Raise("budget")], graph, forgiving=True)


class TestSteps:
    def test_a_pruning_is_repeated_with_what_makes_up_for_it(self) -> None:
        passes = Pipeline([Nothing(), PruneChannels(), Blur(), Scale(), Blur()])
        assert str(passes.stepped(2, Pipeline([Negate()]))) == (
            "do-nothing,prune-channels{progress=0.5},blur-parameter,negate-parameter,prune-channels,blur-parameter,"
            "negate-parameter,scale-parameter,blur-parameter"
        )

    def test_one_step_changes_nothing(self) -> None:
        passes = Pipeline([Nothing(), PruneChannels(progress=0.5), Blur()])
        assert passes.stepped(1) == passes

    def test_part_of_the_way_is_gone_in_parts(self) -> None:
        found = Pipeline([PruneChannels(progress=0.5)]).stepped(2)
        assert list(found) == [PruneChannels(progress=0.25), PruneChannels(progress=0.5)]


class Gated(nn.Module):
    """A branch that starts at zero, as residual branches often do, behind a mean over its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.gate = nn.Parameter(torch.zeros(6))
        self.outer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.sigmoid(self.inner(x)) * self.gate
        return x + self.outer(inner)


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_constant_parameters_hide_nothing(monkeypatch: pytest.MonkeyPatch, gate: float) -> None:
    """A rule that mixes indices up gives equal outputs where what it mixes is multiplied by zero."""

    class Mixed(Gated):
        def forward(self, x: Tensor) -> Tensor:
            inner = torch.sigmoid(self.inner(x)).flip(-1) * self.gate
            return x + self.outer(inner)

    def straight(t: Any, call: Call) -> Any:
        return t[call["self"]]

    assert isinstance(dialect.OPERATORS, dict)
    monkeypatch.setitem(dialect.OPERATORS, aten.flip.default, Operator(straight, lambda z, call: z[call["self"]]))
    model = Mixed()
    nn.init.constant_(model.gate, gate)
    outcome = execute([Break()], capture(model, torch.randn(3, 4)))
    (record,) = outcome.records
    assert len(record.left_alone) == 1
    if gate == 0.0:
        assert "with noise in 1 constant tensors" in next(iter(record.left_alone.values()))
    assert not record.changed


def test_groups_that_fail_only_together_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bisection blames one of two groups that do no harm alone."""
    graph = capture(Chain(), torch.randn(4, 5))

    def jealous(typing: Any, keep: Mapping[Any, Any], *rest: Any) -> Any:
        if len(keep) == 2:
            raise RuntimeError("not both")
        return masked_equivalence(typing, keep, *rest)

    monkeypatch.setattr("graphopt.pipeline.promises.masked_equivalence", jealous)
    (record,) = execute([Break()], graph).records
    assert [*record.left_alone] == ["second.weight[0]"]
    assert [site.name for site in record.applied] == ["first.weight[0]"]


# -- watching -------------------------------------------------------------------------------------------------------


class Notebook(Observer):
    """Write down what happens."""

    def __init__(self, stop_after: int = 9) -> None:
        self.seen: list[str] = []
        self.stop_after = stop_after

    def stage(self, name: str) -> None:
        self.seen.append(name)

    def goes_on(self, position: int) -> bool:
        return position < self.stop_after

    def changed(self, record: PassRecord, graph: Graph) -> None:
        self.seen.append(f"{record.name} changed the graph to {len(graph.text().splitlines())} lines")


def test_a_run_can_be_watched(graph: Graph) -> None:
    book = Notebook()
    with watching(book):
        execute([Nothing(), Break()], graph)
    lines = len(graph.text().splitlines())
    assert book.seen == [
        "do-nothing",
        "break-groups",
        "verify break-groups",
        f"break-groups changed the graph to {lines} lines",
    ]
    execute([Nothing()], graph)
    assert len(book.seen) == 4


def test_a_run_can_be_stopped(graph: Graph) -> None:
    with watching(Notebook(stop_after=1)):
        outcome = execute([Nothing(), Break()], graph)
    assert [record.name for record in outcome.records] == ["do-nothing"]


@pytest.fixture(autouse=True)
def no_graph_is_left_changed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check after every test that has a graph that the graph computes what it did."""
    if "graph" not in request.fixturenames:
        yield
        return
    graph: Graph = request.getfixturevalue("graph")
    args, kwargs = graph.example_inputs
    before = graph.run(*args, **kwargs).clone()
    yield
    if "shared" not in request.node.name:
        assert torch.equal(before, graph.run(*args, **kwargs))
