"""Check how programs are rebuilt: those with and without their model, and the regions inside."""

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from graphopt.capture import capture
from graphopt.errors import CaptureError
from graphopt.graph import TensorSpec, spec_of
from tests.capture.compare import assert_evaluates_like, assert_same, assert_trains_like
from tests.capture.models import Nested, Net, Tied, warm

aten = torch.ops.aten


def program_of(model: nn.Module, *args: Any, **kwargs: Any) -> ExportedProgram:
    """Export ``model`` in evaluation mode with a varying batch."""
    shapes = torch.export.ShapesCollection()
    for leaf in torch.utils._pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            shapes[leaf] = {0: Dim.AUTO}
    dynamic = shapes.dynamic_shapes(model, args, kwargs)
    return torch.export.export(model.eval(), args, kwargs, dynamic_shapes=dynamic)


class TestPrograms:
    """Exported programs are captured without their model."""

    def test_give_the_graph_of_the_model(self) -> None:
        model = warm(Net())
        x = torch.randn(4, 3, 8, 8)
        program = program_of(model, x)
        graph = capture(program)
        assert graph.text() == capture(model, x).text()
        assert set(graph.module.state_dict()) == set(model.state_dict())
        assert graph.notes == []
        assert_evaluates_like(model, graph, torch.randn(2, 3, 8, 8))
        with torch.no_grad():
            graph.tensor("head.weight").zero_()
        assert program.state_dict["head.weight"].abs().sum() > 0

    def test_keep_transient_buffers_constants_and_ties(self) -> None:
        model = Tied()
        graph = capture(program_of(model, torch.zeros(2, 5, dtype=torch.long)))
        assert set(graph.module.state_dict()) == set(model.state_dict())
        assert torch.equal(graph.module.get_buffer("frequencies"), model.frequencies)
        assert graph.module.get_parameter("head.weight") is graph.module.get_parameter("embedding.weight")
        assert_trains_like(model, graph, torch.randint(11, (3, 5)))

    def test_take_nested_inputs(self) -> None:
        model = Nested()
        x = torch.randn(3, 4)
        args, kwargs = ([x, x + 1],), {"options": {"bias": torch.randn(3, 4)}}
        capture(model, (args, kwargs))  # which teaches pytrees the types that it returns
        graph = capture(program_of(model, *args, **kwargs))
        assert_evaluates_like(model, graph, *args, **kwargs)

    @pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
    def test_without_writes_in_place_write_at_the_end(self) -> None:
        class Counting(nn.Module):
            calls: Tensor

            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                self.calls.add_(1)
                y.mul_(2)
                return x + self.calls

        model = Counting()
        program = program_of(model, torch.ones(2), torch.ones(2)).run_decompositions({})
        assert "aten.add_" not in str(program.graph)
        graph = capture(program)
        for _ in range(2):
            ours, theirs = torch.ones(2), torch.ones(2)
            assert_same(model(torch.ones(2), theirs), graph.module(torch.ones(2), ours))
            assert_same(theirs, ours)
        assert graph.tensor("calls") == 2

    def test_say_which_dimensions_they_fix(self) -> None:
        program = torch.export.export(Net().eval(), (torch.randn(2, 3, 8, 8),))
        assert capture(program).notes == ["dimension 0 of input x is fixed at 2: the program was exported so"]
        with pytest.raises(CaptureError, match="has its dynamic dimensions already: pass dynamic_shapes"):
            capture(program, dynamic={"x": {1: "channels"}})

    def test_take_other_example_inputs_of_the_same_nesting(self) -> None:
        program = program_of(Net(), torch.randn(2, 3, 8, 8))
        graph = capture(program, torch.randn(5, 3, 8, 8))
        assert spec_of(next(iter(graph.nodes))) == TensorSpec((5, 3, 8, 8), torch.float32, (True, False, False, False))
        with pytest.raises(CaptureError, match="takes inputs nested as"):
            capture(program, {"x": torch.randn(5, 3, 8, 8)})

    def test_without_example_inputs_ask_for_them(self) -> None:
        program = program_of(Net(), torch.randn(2, 3, 8, 8))
        program.example_inputs = None
        with pytest.raises(CaptureError, match="carries no example inputs: pass example_inputs"):
            capture(program)
        assert capture(program, torch.randn(2, 3, 8, 8)).text() == capture(Net(), torch.randn(2, 3, 8, 8)).text()


class TestAutocast:
    """Regions under autocast become explicit casts."""

    class Mixed(nn.Module):
        """Runs a part in bfloat16 and in it a part in float32."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.drop(self.first(x).relu())
                y = torch.cat([x, x.float()], 1).softmax(-1)
                with torch.autocast("cpu", enabled=False):
                    y = y + self.last(x.float()).repeat(1, 2)
            return y @ y.t()

    def test_casts_are_written_out(self) -> None:
        model = self.Mixed()
        graph = capture(model, torch.randn(1, 4))
        assert not any("wrap" in str(node.target) for node in graph.nodes)
        dtypes = [
            spec.dtype
            for node in graph.nodes
            if node.target is aten.linear.default and isinstance(spec := spec_of(node), TensorSpec)
        ]
        assert dtypes == [torch.bfloat16, torch.float32]
        assert_evaluates_like(model, graph, torch.randn(3, 4))
        assert_trains_like(model, graph, torch.randn(3, 4))

    def test_a_region_for_another_device_changes_nothing(self) -> None:
        class Elsewhere(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                with torch.autocast("cuda", dtype=torch.float16, enabled=False):
                    return self.linear(x)

        graph = capture(Elsewhere(), torch.randn(2, 4))
        assert [node.target for node in graph.nodes if node.op == "call_function"] == [aten.linear.default]


def test_results_of_several_outputs_are_read_by_getitem() -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                a, b = x.split(2, dim=1)
            return a + b

    graph = capture(Several(), torch.randn(2, 4))
    assert [node.target for node in graph.nodes if node.op == "call_function"].count(operator.getitem) == 2
    assert_evaluates_like(Several(), graph, torch.randn(3, 4))
