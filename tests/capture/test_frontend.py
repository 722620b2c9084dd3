"""Check what a capture promises: the original's meaning at any batch, its names, its training, and itself untouched."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812

from graphopt.capture import capture
from graphopt.errors import CaptureError
from graphopt.graph import OWNER, SPEC, TensorSpec, TraceModule, spec_of
from tests.capture.compare import assert_evaluates_like, assert_same, assert_trains_like
from tests.capture.models import Attention, Functional, Nested, Net, Tied, warm

aten = torch.ops.aten


def images(batch: int, size: int = 8) -> Tensor:
    """Return random images."""
    return torch.randn(batch, 3, size, size)


class TestMeaning:
    """The graph computes what the original computes."""

    @pytest.mark.parametrize("example", [1, 2, 4])
    def test_any_batch_gives_what_the_original_gives(self, example: int) -> None:
        model = warm(Net())
        graph = capture(model, (images(example),))
        for batch in (1, 2, 3, 7):
            assert_evaluates_like(model, graph, images(batch))
        assert graph.notes == []

    def test_a_broken_weight_is_noticed(self) -> None:
        model = warm(Net())
        graph = capture(model, images(2))
        with torch.no_grad():
            graph.tensor("head.weight")[0, 0] += 1e-3
        with pytest.raises(AssertionError):
            assert_evaluates_like(model, graph, images(2))

    def test_training_is_that_of_the_original(self) -> None:
        model = warm(Net())
        assert_trains_like(model, capture(model, images(1)), images(4))

    def test_training_of_tied_weights_is_that_of_the_original(self) -> None:
        model = Tied()
        assert_trains_like(model, capture(model, torch.zeros(1, 5, dtype=torch.long)), torch.randint(11, (3, 5)))

    def test_what_is_written_in_place_stays_in_order(self) -> None:
        class Counting(nn.Module):
            calls: Tensor

            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("calls", torch.zeros(2))

            def forward(self, x: Tensor) -> Tensor:
                before = x * self.calls.sum()
                self.calls.add_(1)
                self.calls[0] = 5
                return before + self.calls.sum()

        model = Counting()
        graph = capture(model, torch.ones(2, 3))
        assert model.calls.tolist() == [0, 0]
        assert graph.tensor("calls").tolist() == [0, 0]
        x = torch.ones(4, 3)
        for _ in range(3):
            assert_same(model(x), graph.module(x))
        assert graph.tensor("calls").tolist() == model.calls.tolist()

    def test_dead_code_and_assertions_are_gone(self) -> None:
        class Checks(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                torch._check(x.shape[0] < 100)
                x.exp()
                y = x.to(torch.float64).float()
                torch._assert(x.shape[1] == 3, "three columns")
                return y * x.shape[0]

        graph = capture(Checks(), torch.ones(5, 3))
        assert not any("assert" in str(node.target) or "exp" in str(node.target) for node in graph.nodes)
        assert_same(graph.module(torch.ones(500, 3)), torch.full((500, 3), 500.0))


class TestTheOriginal:
    """The user's model is not touched."""

    def test_is_not_touched(self) -> None:
        model = Tied().train()
        model.proj.eval()
        model.head.weight.grad = torch.ones(11, 8)
        before = {name: (part, part.training, dict(vars(part))) for name, part in model.named_modules()}
        values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        versions = {name: tensor._version for name, tensor in model.state_dict(keep_vars=True).items()}
        graph = capture(model, torch.zeros(1, 5, dtype=torch.long))
        for name, part in model.named_modules():
            assert (part, part.training) == before[name][:2]
            assert vars(part).keys() == before[name][2].keys()
        assert versions == {name: tensor._version for name, tensor in model.state_dict(keep_vars=True).items()}
        graph.module.train()
        graph.module(torch.zeros(2, 5, dtype=torch.long)).sum().backward()
        with torch.no_grad():
            for parameter in graph.module.parameters():
                parameter.fill_(9)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, values[name])
        assert torch.equal(model.head.weight.grad, torch.ones(11, 8))
        assert model.proj.weight.grad is None

    def test_is_given_back_as_it_was_where_it_cannot_be_copied(self) -> None:
        class Stubborn(Net):
            cache: Tensor | None = None

            def __deepcopy__(self, memo: dict[int, Any]) -> "Stubborn":
                raise RuntimeError("one of a kind")

            def forward(self, x: Tensor) -> Tensor:
                self.cache = super().forward(x)
                return self.cache

        model = warm(Stubborn()).train()
        model.get_submodule("norm").eval()
        modes = {name: part.training for name, part in model.named_modules()}
        x = images(2)
        graph = capture(model, x)
        assert {name: part.training for name, part in model.named_modules()} == modes
        assert "cache" not in vars(model)
        assert not model._forward_hooks
        model.eval()
        assert torch.equal(model(x), graph.module(x))

    def test_is_given_back_as_it_was_after_a_failure(self) -> None:
        class Failing(nn.Module):
            def __deepcopy__(self, memo: dict[int, Any]) -> "Failing":
                raise RuntimeError("one of a kind")

            def forward(self, x: Tensor) -> Tensor:
                raise ValueError("not today")

        model = Failing()
        with pytest.raises(CaptureError, match="not today"):
            capture(model, torch.ones(1))
        assert model.training
        assert not model._forward_hooks

    def test_is_not_kept_alive_by_its_capture(self) -> None:
        model = Net()
        graph = capture(model, images(2))
        theirs = {tensor.data_ptr() for tensor in model.state_dict().values()}
        assert theirs.isdisjoint(tensor.data_ptr() for tensor in graph.module.state_dict().values() if tensor.numel())
        alive = weakref.ref(model)
        del model
        gc.collect()
        assert alive() is None

    @pytest.mark.parametrize("training", [True, False])
    def test_mode_is_told_and_the_graph_is_in_evaluation_mode(self, training: bool) -> None:
        graph = capture(Net().train(training), images(2))
        assert graph.training is training
        assert not graph.module.training
        assert not any(part.training for part in graph.module.modules())


class TestTensors:
    """The graph owns the tensors, under the original names."""

    def test_keep_their_names_and_order_also_where_nothing_reads_them(self) -> None:
        model = Tied()
        graph = capture(model, torch.zeros(1, 5, dtype=torch.long))
        assert list(graph.module.state_dict()) == list(model.state_dict())
        assert {name for name, _ in graph.module.named_parameters()} == {name for name, _ in model.named_parameters()}
        assert graph.notes == ["the graph does not read unread.weight, unread.bias; kept as in the original"]
        assert "frequencies" not in graph.module.state_dict()
        assert torch.equal(graph.module.get_buffer("frequencies"), model.frequencies)

    def test_load_and_save(self) -> None:
        model, other = warm(Net(), 0), warm(Net(), 1)
        graph = capture(model, images(2))
        graph.module.load_state_dict(other.state_dict())
        assert_evaluates_like(other, graph, images(3))
        model.load_state_dict(graph.module.state_dict())
        assert_evaluates_like(model, graph, images(3))

    def test_stay_tied_and_have_aliases(self) -> None:
        graph = capture(Tied(), torch.zeros(1, 5, dtype=torch.long))
        (alias, canonical), *more = graph.aliases.items()
        assert not more
        assert {alias, canonical} == {"embedding.weight", "head.weight"}
        assert graph.module.get_parameter(alias) is graph.module.get_parameter(canonical)
        assert [
            node.target for node in graph.nodes if "embedding" in str(node.target) or "head" in str(node.target)
        ] == [
            canonical,
            aten.embedding.default,
        ]

    def test_of_a_shared_module_stay_tied(self) -> None:
        shared = nn.Linear(4, 4)
        model = nn.Sequential(shared, nn.ReLU(), shared)
        graph = capture(model, torch.ones(2, 4))
        assert list(graph.module.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert graph.aliases in (
            {"2.weight": "0.weight", "2.bias": "0.bias"},
            {"0.weight": "2.weight", "0.bias": "2.bias"},
        )
        assert_trains_like(model, graph, torch.randn(3, 4))

    def test_constants_become_transient_buffers_of_their_own(self) -> None:
        graph = capture(Tied(), torch.zeros(1, 5, dtype=torch.long))
        constants = {name for name, _ in graph.module.named_buffers()} - {"scale", "frequencies"}
        assert len(constants) == 2
        assert "offset" in constants
        assert constants.isdisjoint(graph.module.state_dict())

    def test_keep_type_layout_and_whether_they_need_a_gradient(self) -> None:
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
        model[0].weight = nn.Parameter(torch.randn(4, 6).t())
        model[1].weight.requires_grad_(False)
        model.register_buffer("small", torch.ones(3, dtype=torch.float16))
        graph = capture(model, torch.ones(1, 4))
        assert graph.tensor("0.weight").stride() == (1, 6)
        assert isinstance(graph.tensor("1.weight"), nn.Parameter)
        assert not graph.tensor("1.weight").requires_grad
        assert graph.tensor("small").dtype == torch.float16

    def test_named_like_a_part_of_torch_fx_are_refused(self) -> None:
        model = nn.Sequential()
        model.add_module("graph", nn.Linear(2, 2))
        with pytest.raises(CaptureError, match=r"'graph', of the tensor graph.weight, is one that torch.fx reserves"):
            capture(model, torch.ones(1, 2))


class TestModule:
    """The result is a module like any other."""

    def test_moves_and_converts(self) -> None:
        model = warm(Net())
        graph = capture(model, images(2))
        x = images(2).double()
        assert_same(copy.deepcopy(model).eval().double()(x), graph.module.double()(x))
        assert graph.module.to("meta")(x.to("meta")).device.type == "meta"

    def test_creates_tensors_where_it_was_moved_to(self) -> None:
        class Positions(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding = nn.Embedding(9, 4)

            def forward(self, x: Tensor) -> Tensor:
                return x + self.embedding(torch.arange(x.shape[1], device=x.device))

        graph = capture(Positions(), torch.ones(2, 5, 4))
        assert graph.module.to("meta")(torch.ones(3, 5, 4, device="meta")).device.type == "meta"

    def test_is_copied_deeply(self) -> None:
        graph = capture(warm(Net()), images(2))
        twin = copy.deepcopy(graph.module)
        x = images(2)
        before = graph.module(x)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(graph.module(x), before)
        assert twin(x).abs().sum() == 0

    def test_is_exported_and_compiled_again(self) -> None:
        graph = capture(warm(Net()), images(2))
        x = images(4)
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(graph.module, (images(3),), dynamic_shapes={"x": {0: batch}})
        assert torch.equal(program.module()(x), graph.module(x))
        assert torch.equal(torch.compile(graph.module, backend="eager")(x), graph.module(x))

    def test_has_the_name_of_the_original(self) -> None:
        graph = capture(Net(), images(2))
        assert type(graph.module).__name__ == type(graph.clone().module).__name__ == "Net"

    def test_carries_no_trace_of_the_export(self) -> None:
        graph = capture(Net(), images(2))
        assert {key for node in graph.nodes for key in node.meta} <= {"spec", "owner", "train_arguments"}
        assert all(node.op in ("placeholder", "get_attr", "call_function", "output") for node in graph.nodes)


class TestInputsAndOutputs:
    """Inputs and outputs are nested as in the original."""

    def test_nested_inputs_and_outputs_come_back_as_their_types(self) -> None:
        model = Nested()

        def inputs(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x = torch.randn(batch, 4)
            return ([x, x + 1], x + 2, x + 3), {"options": {"bias": torch.randn(batch, 4)}, "double": True}

        graph = capture(model, inputs(1))
        for batch in (1, 2, 5):
            args, kwargs = inputs(batch)
            assert_evaluates_like(model, graph, *args, **kwargs)
        assert "input double is fixed at True" in graph.notes
        args, kwargs = inputs(2)
        with pytest.raises(ValueError, match="input double was captured as True"):
            graph.module(*args, **{**kwargs, "double": False})
        assert list(inputs(1)[1]) == list(graph.example_inputs[1])

    def test_optional_inputs_that_were_left_out_stay_out(self) -> None:
        model = Tied()
        ids = torch.randint(11, (2, 5))
        assert_evaluates_like(model, capture(model, ids), ids)
        masked = capture(model, {"ids": ids, "mask": torch.ones(2, 5)})
        assert_evaluates_like(model, masked, ids=ids, mask=torch.rand(2, 5))
        assert_evaluates_like(model, masked, mask=torch.rand(2, 5), ids=ids)
        none = capture(model, {"ids": ids, "mask": None})
        assert_evaluates_like(model, none, ids=ids, mask=None)
        with pytest.raises(ValueError, match="input mask was captured as None"):
            none.module(ids=ids, mask=torch.ones(2, 5))

    def test_example_inputs_are_kept_as_they_were(self) -> None:
        x = images(1)
        graph = capture(Net(), x)
        x.zero_()
        (kept,), keywords = graph.example_inputs
        assert keywords == {}
        assert kept.shape == (1, 3, 8, 8)
        assert kept.abs().sum() > 0


class TestSpecs:
    """Every node says what it yields and who called it."""

    def test_describe_every_value_at_the_sizes_of_the_example(self) -> None:
        class Many(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                a, b = x.chunk(2, dim=1)
                rows = x.shape[0] * x.shape[1]
                values, places = torch.max(b, dim=1)
                return a.reshape(rows // 2, -1), values + places

        graph = capture(Many(), torch.ones(1, 4, 6))
        described = {str(node.target): spec_of(node) for node in graph.nodes}
        assert described["x"] == TensorSpec((1, 4, 6), torch.float32, (True, False, False))
        half = TensorSpec((1, 2, 6), torch.float32, (True, False, False))
        assert described["aten.chunk.default"] == (half, half)
        assert described["aten.max.dim"] == (
            TensorSpec((1, 6), torch.float32, (True, False)),
            TensorSpec((1, 6), torch.int64, (True, False)),
        )
        assert described["aten.reshape.default"] == TensorSpec((2, 6), torch.float32, (True, False))
        sizes = [spec_of(node) for node in graph.nodes if node.target is aten.sym_size.int]
        assert sizes == [1]
        assert all(SPEC in node.meta for node in graph.nodes if node.op != "output")

    def test_measure_sizes_that_depend_on_data(self) -> None:
        class Selects(nn.Module):
            calls: Tensor

            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, x: Tensor) -> Tensor:
                self.calls.add_(1)
                return x[x > 0].exp()

        graph = capture(Selects(), torch.tensor([-1.0, 1.0, 2.0]))
        assert spec_of(list(graph.nodes)[-2]) == TensorSpec((2,), torch.float32, (True,))
        assert graph.tensor("calls") == 0
        assert_evaluates_like(Selects(), graph, torch.tensor([1.0, 2.0, 3.0, -4.0]))

    def test_name_the_module_that_called_each_operator(self) -> None:
        graph = capture(Net(), images(2))
        owners = {(str(node.target), node.meta.get(OWNER)) for node in graph.nodes if node.op == "call_function"}
        assert ("aten.conv2d.default", "body.0") in owners
        assert ("aten.batch_norm.default", "norm") in owners
        assert ("aten.add.Tensor", "") in owners


class TestDynamic:
    """The dimensions that were asked for vary."""

    def test_named_dimensions_vary_besides_the_batch(self) -> None:
        model = Tied()
        ids = torch.randint(11, (2, 5))
        graph = capture(
            model, {"ids": ids, "mask": torch.ones(2, 5)}, dynamic={"ids": {1: "length"}, "mask": {1: "length"}}
        )
        assert graph.notes == ["the graph does not read unread.weight, unread.bias; kept as in the original"]
        for batch, length in ((1, 1), (3, 9)):
            ids = torch.randint(11, (batch, length))
            assert_evaluates_like(model, graph, ids=ids, mask=torch.rand(batch, length))

    def test_other_dimensions_are_built_in_and_checked(self) -> None:
        graph = capture(Net(), images(2))
        with pytest.raises(ValueError, match=r"input x was captured with size 8 in dimension 2.*found 16"):
            graph.module(images(2, 16))

    def test_nothing_varies_where_nothing_should(self) -> None:
        graph = capture(Net(), images(2), dynamic=None)
        assert spec_of(next(iter(graph.nodes))) == TensorSpec((2, 3, 8, 8), torch.float32, (False,) * 4)
        with pytest.raises(ValueError, match=r"input x was captured with size 2 in dimension 0.*found 3"):
            graph.module(images(3))

    def test_an_input_can_be_kept_fixed(self) -> None:
        class Scaled(nn.Module):
            def forward(self, x: Tensor, scale: Tensor) -> Tensor:
                return x * scale

        graph = capture(Scaled(), (torch.ones(1, 4), torch.full((1,), 2.0)), dynamic={"scale": None})
        assert graph.notes == []
        assert_same(graph.module(torch.ones(5, 4), torch.full((1,), 3.0)), torch.full((5, 4), 3.0))

    def test_what_the_code_fixes_is_said(self) -> None:
        class Fixes(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x + torch.ones(2, 6)

        graph = capture(Fixes(), torch.ones(2, 6))
        assert graph.notes == ["dimension 0 of input x is fixed at 2: the model's code fixes it"]
        assert spec_of(next(iter(graph.nodes))) == TensorSpec((2, 6), torch.float32, (False, False))

    def test_a_batch_of_one_that_the_code_fixes_stays_one(self) -> None:
        class One(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.reshape(6) + torch.ones(6)

        graph = capture(One(), torch.ones(1, 6))
        assert_same(graph.module(torch.ones(1, 6)), torch.full((6,), 2.0))
        (note,) = graph.notes
        assert note.startswith("dimension 0 of input x is fixed at 1: ")

    def test_the_way_taken_is_said_where_the_code_branches_on_the_batch(self) -> None:
        class Branches(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x + 1 if x.shape[0] > 4 else x

        graph = capture(Branches(), torch.ones(6, 2))
        assert graph.notes == ["dimension 0 of input x: the graph follows the way the model takes for sizes from 5 up"]

    def test_two_inputs_of_one_batch_vary_together(self) -> None:
        class Adds(nn.Module):
            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return x + y

        graph = capture(Adds(), (torch.ones(1, 2), torch.ones(1, 2)))
        assert_same(graph.module(torch.ones(4, 2), torch.ones(4, 2)), torch.full((4, 2), 2.0))


class TestGraphModules:
    """Graph modules are models, too."""

    def test_symbolic_traces_are_exported(self) -> None:
        model = warm(Net())
        traced = fx.symbolic_trace(model)
        graph = capture(traced, images(2))
        assert set(graph.module.state_dict()) == set(model.state_dict())
        assert_evaluates_like(model, graph, images(3))
        assert_trains_like(model, graph, images(3))

    def test_traces_are_taken_as_they_are(self) -> None:
        model = warm(Net()).train()
        first = capture(model, images(1))
        first.module.train(first.training)
        second = capture(first.module)
        assert first.module.training
        assert second.training
        assert not second.module.training
        assert second.text() == capture(model, images(1)).text()
        assert_evaluates_like(model, second, images(3))
        assert_trains_like(model, second, images(3))
        assert second.tensor("head.weight") is not first.tensor("head.weight")
        assert type(second.module).__name__ == "Net"

    def test_traces_keep_their_edits(self) -> None:
        first = capture(warm(Net()), images(2))
        with torch.no_grad():
            first.tensor("head.weight").zero_()
        assert torch.equal(capture(first.module).tensor("head.weight"), torch.zeros(5, 8))

    @pytest.mark.parametrize("model", [Net(), Attention(), Functional()], ids=lambda m: type(m).__name__)
    def test_traces_are_exported_anew_for_other_inputs(self, model: nn.Module) -> None:
        def inputs(batch: int) -> Tensor:
            return (
                images(batch)
                if isinstance(model, Net)
                else torch.randn(batch, 8 if isinstance(model, Attention) else 6)
            )

        def shaped(batch: int) -> Tensor:
            return (
                inputs(batch)[:, None].expand(-1, 5, -1).contiguous() if isinstance(model, Attention) else inputs(batch)
            )

        first = capture(warm(model), shaped(1))
        second = capture(first.module, shaped(4))
        assert spec_of(next(iter(second.nodes))).shape[0] == 4  # type: ignore[union-attr]
        assert [node.meta.get(OWNER) for node in second.nodes] == [node.meta.get(OWNER) for node in first.nodes]
        assert second.notes == first.notes
        assert_trains_like(model, second, shaped(3))

    def test_traces_without_inputs_say_so(self) -> None:
        graph = capture(Net(), images(2))
        del graph.module.meta["example_inputs"]
        with pytest.raises(CaptureError, match="carries no example inputs: pass example_inputs"):
            capture(graph.module)
        assert isinstance(capture(graph.module, images(2)).module, TraceModule)


class TestHigherOrder:
    """Regions become ordinary operators."""

    def test_regions_without_gradient_are_inlined_and_cut(self) -> None:
        class Cuts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                with torch.no_grad():
                    a = self.first(x)
                    b = torch.ones(4).cos()
                return self.last(a + b) + x

        model = Cuts()
        graph = capture(model, torch.ones(2, 4))
        targets = [str(node.target) for node in graph.nodes]
        assert not any("wrap" in target for target in targets)
        # Only what a gradient could reach is cut: the cosine of ones is not.
        assert targets.count("aten.detach.default") == 1
        assert_trains_like(model, graph, torch.randn(3, 4))
        x = torch.randn(3, 4, requires_grad=True)
        twin = x.detach().clone().requires_grad_()
        model(x).sum().backward()
        graph.module(twin).sum().backward()
        assert_same(x.grad, twin.grad)

    def test_writes_in_a_region_without_gradient_reach_their_buffer(self) -> None:
        class Averages(nn.Module):
            mean: Tensor

            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 4)
                self.register_buffer("mean", torch.zeros(4))

            def forward(self, x: Tensor) -> Tensor:
                x = self.linear(x)
                with torch.no_grad():
                    self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
                return x - self.mean

        model = Averages()
        graph = capture(model, torch.ones(2, 4))
        assert_trains_like(model, graph, torch.randn(3, 4), steps=3)
        assert not graph.module.train()(torch.ones(2, 4)).isnan().any()
        assert not graph.tensor("mean").requires_grad

    def test_capture_under_no_grad_still_trains(self) -> None:
        model = warm(Net())
        with torch.no_grad():
            graph = capture(model, images(2))
        assert "detach" not in graph.text()
        assert_trains_like(model, graph, images(4))

    def test_capture_in_inference_mode_still_trains(self) -> None:
        model = warm(Net())
        with torch.inference_mode():
            graph = capture(model, images(2))
        assert_trains_like(model, graph, images(4))

    def test_autocast_around_the_capture_is_not_captured(self) -> None:
        model = nn.Linear(4, 4)
        with torch.autocast("cpu", torch.bfloat16):
            graph = capture(model, torch.ones(2, 4))
        assert_evaluates_like(model, graph, torch.randn(3, 4))
        assert spec_of(list(graph.nodes)[-2]) == TensorSpec((2, 4), torch.float32, (True, False))

    def test_branches_stay_one_operator(self) -> None:
        class Branches(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                return torch.cond(x.sum() > 0, lambda x: self.linear(x), lambda x: x.sin(), (x,))

        model = Branches()
        graph = capture(model, torch.ones(2, 3))
        for each in (graph, graph.clone()):
            assert_evaluates_like(model, each, torch.ones(3, 3))
            assert_evaluates_like(model, each, -torch.ones(3, 3))
        assert torch.equal(copy.deepcopy(graph.module)(torch.ones(1, 3)), graph.module(torch.ones(1, 3)))


class Branching(nn.Module):
    """Decides by values."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x


class TestRefusals:
    """What cannot be captured is refused with what to do."""

    def test_decisions_by_values_are_refused_at_their_line(self) -> None:
        with pytest.raises(
            CaptureError, match=r"Branching makes a decision .* at .*test_frontend.py:\d+ \(`if x.sum\(\) > 0:`\)"
        ) as caught:
            capture(Branching(), torch.ones(2, 2))
        assert caught.value.__cause__ is not None

    def test_errors_of_the_model_are_passed_on_with_their_line(self) -> None:
        with pytest.raises(CaptureError, match=r"Linear cannot be exported: RuntimeError: .*"):
            capture(nn.Linear(3, 3), torch.ones(2, 4))
        with pytest.raises(CaptureError, match="Net cannot be exported: TypeError: missing a required argument: 'x'"):
            capture(Net(), ())

    def test_results_that_hold_no_tensors_are_refused(self) -> None:
        class Odd(nn.Module):
            def forward(self, x: Tensor) -> object:
                return object()

        with pytest.raises(CaptureError, match=r"Odd takes or returns a value that has no tensors .*dataclasses"):
            capture(Odd(), torch.ones(2, 2))

    def test_lazy_parameters_are_refused(self) -> None:
        with pytest.raises(CaptureError, match="weight has no shape yet: call the model once"):
            capture(nn.LazyLinear(3), torch.ones(2, 4))

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (Net, r"Net is a class: pass an instance, Net\(…\)"),
            ({"weight": torch.ones(2)}, "a state dict holds weights but no model"),
            (F.relu, "relu is a function: wrap it in the forward of an nn.Module"),
            (3, "a int cannot be captured: pass an nn.Module"),
            (nn.DataParallel(nn.Linear(2, 2)), "wrapped in DataParallel: pass model.module"),
            ("model.onnx", "model.onnx: the path: found nothing"),
            ("model.pt", r"model.pt is a pickle by its name; .* weights_only=True"),
            (Path("model.safetensors"), "model.safetensors holds weights but no model"),
            ("bert-base-uncased", "'bert-base-uncased' is no model that can be read: .*from_pretrained"),
            ("missing.pt2", "there is no file missing.pt2"),
        ],
        ids=lambda value: value if isinstance(value, str) else type(value).__name__,
    )
    def test_what_is_no_model_is_refused_with_what_to_do(self, model: Any, message: str) -> None:
        with pytest.raises(CaptureError, match=message):
            capture(model, torch.ones(1, 2))

    @pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
    def test_torchscript_is_refused(self) -> None:
        with pytest.raises(CaptureError, match=r"TorchScript cannot be captured: pass the nn.Module"):
            capture(torch.jit.script(nn.Linear(2, 2)), torch.ones(1, 2))

    def test_compiled_models_are_unwrapped(self) -> None:
        model = warm(Net())
        graph = capture(torch.compile(model, backend="eager"), images(2))
        assert list(graph.module.state_dict()) == list(model.state_dict())
        assert_evaluates_like(model, graph, images(2))
