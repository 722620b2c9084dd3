"""Check the graph container: types of values, operator calls by name, copies, and the module that trains."""

import copy
import gc
import pickle

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphopt.graph import (
    FIXED,
    MODE,
    SPEC,
    Call,
    Graph,
    TensorSpec,
    TraceCodeGen,
    TraceModule,
    get_attribute,
    hint,
    set_tensor,
    spec_of,
    tensor_spec,
)

aten = torch.ops.aten


def spec(*shape: int, dynamic: int = 0) -> TensorSpec:
    """Return a float32 type whose first ``dynamic`` dimensions vary."""
    return TensorSpec(shape, torch.float32, tuple(i < dynamic for i in range(len(shape))))


def block() -> Graph:
    """Return linear, batch norm, dropout, linear with the first one's weight, and a branch that is never read."""
    module = TraceModule(nn.Module(), fx.Graph())
    weight = nn.Parameter(torch.randn(4, 4))
    set_tensor(module, "first.weight", weight)
    set_tensor(module, "last.weight", weight)
    set_tensor(module, "unread.weight", nn.Parameter(torch.zeros(2)))
    set_tensor(module, "norm.weight", nn.Parameter(torch.ones(4)))
    for name, value in {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}.items():
        set_tensor(module, f"norm.{name}", value)
    set_tensor(module, "norm.num_batches_tracked", torch.tensor(0))
    module.get_submodule("norm").register_buffer("scratch", torch.zeros(1), persistent=False)
    graph = fx.Graph()
    x, flag = graph.placeholder("x"), graph.placeholder("flag")
    x.meta[SPEC], flag.meta[FIXED] = spec(2, 4, dynamic=1), True
    read = {
        name: graph.get_attr(name) for name in ("first.weight", "norm.weight", "norm.running_mean", "norm.running_var")
    }
    for node in read.values():
        node.meta[SPEC] = TensorSpec.of(get_attribute(module, str(node.target)))
    y = graph.call_function(aten.linear.default, (x, read["first.weight"]))
    statistics = (read["norm.weight"], None, read["norm.running_mean"], read["norm.running_var"])
    y = graph.call_function(aten.batch_norm.default, (y, *statistics, False, 0.1, 1e-5, False))
    y.meta[MODE] = {5: (False, True)}
    y = graph.call_function(aten.dropout.default, (y, 0.5), {"train": False})
    y.meta[MODE] = {"train": (False, True)}
    y = graph.call_function(aten.linear.default, (y, read["first.weight"]))
    for node in graph.nodes:
        if node.op == "call_function":
            node.meta[SPEC] = spec(2, 4, dynamic=1)
    graph.output((y,))
    in_spec = pytree.tree_structure(((0, 0), {}))
    graph.set_codegen(TraceCodeGen(fx.graph._PyTreeInfo(["x", "flag"], in_spec, pytree.tree_structure({"y": 0}))))
    module.graph = graph
    module.eval()
    module.meta["counters"] = {"norm.num_batches_tracked": 2}
    return Graph(module, ((torch.ones(2, 4), True), {}), {"last.weight": "first.weight"}, ["made by hand"])


def node_of(graph: Graph, target: object) -> fx.Node:
    """Return the first node that calls ``target``."""
    return next(node for node in graph.nodes if node.target is target)


def test_tensor_spec_says_which_sizes_vary() -> None:
    described = TensorSpec((2, 3), torch.float16, (True, False))
    assert str(described) == "float16[2?, 3]"
    assert described.resized((2, 1)) == TensorSpec((2, 1), torch.float16, (True, False))
    assert TensorSpec.of(torch.zeros(2, 3, dtype=torch.int64)) == TensorSpec((2, 3), torch.int64, (False, False))
    assert str(TensorSpec.of(torch.tensor(0.0))) == "float32[]"


def test_call_reads_and_writes_by_the_names_of_the_schema() -> None:
    graph = block()
    norm, dropout = Call(node_of(graph, aten.batch_norm.default)), Call(node_of(graph, aten.dropout.default))
    assert norm.name == "aten.batch_norm.default"
    assert norm.has("running_mean")
    assert not norm.has("groups")
    assert (norm["eps"], norm["bias"], norm["training"]) == (1e-5, None, False)
    assert norm.spec("running_var") == spec(4)
    assert norm.out == spec(2, 4, dynamic=1)
    norm["momentum"] = 0.2
    assert norm.node.args[6] == 0.2
    assert (norm.key("training"), dropout.key("train")) == (5, "train")
    dropout["train"] = True
    assert dropout.node.kwargs == {"train": True}


def test_call_gives_the_default_of_what_is_left_out() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    call = Call(graph.call_function(aten.convolution.default, (x, x, None, [1], [0], [1], False, [0], 1)))
    assert call["groups"] == 1
    pooled = Call(graph.call_function(aten.avg_pool2d.default, (x, [2])))
    assert pooled["ceil_mode"] is False
    pooled["ceil_mode"] = True
    assert pooled["ceil_mode"] is True


def test_spec_of_tells_tensors_from_numbers() -> None:
    graph = fx.Graph()
    size, tensor = graph.placeholder("size"), graph.placeholder("tensor")
    size.meta[SPEC], tensor.meta[SPEC] = 7, spec(2)
    assert spec_of(size) == 7
    assert (hint(size), hint(3)) == (7, 3)
    assert tensor_spec(tensor) == spec(2)
    with pytest.raises(TypeError, match="size does not yield a tensor but 7"):
        tensor_spec(size)
    with pytest.raises(TypeError, match="tensor does not yield an integer"):
        hint(tensor)


def test_text_is_the_form_of_golden_tests() -> None:
    graph = block()
    norm, first = node_of(graph, aten.batch_norm.default), node_of(graph, aten.linear.default)
    assert graph.text().splitlines() == [
        "%x: float32[2?, 4] = placeholder x",
        "%flag: None = placeholder flag",
        "%first_weight: float32[4, 4] = @first.weight",
        "%norm_weight: float32[4] = @norm.weight",
        "%norm_running_mean: float32[4] = @norm.running_mean",
        "%norm_running_var: float32[4] = @norm.running_var",
        f"%{first.name}: float32[2?, 4] = aten.linear.default(%x, %first_weight)",
        f"%{norm.name}: float32[2?, 4] = aten.batch_norm.default(%{first.name}, %norm_weight, None, "
        "%norm_running_mean, %norm_running_var, False, 0.1, 1e-05, False)",
        f"%dropout_default: float32[2?, 4] = aten.dropout.default(%{norm.name}, 0.5, train=False)",
        "%linear_default_1: float32[2?, 4] = aten.linear.default(%dropout_default, %first_weight)",
        "return [%linear_default_1]",
    ]


def test_train_switches_arguments_by_position_and_by_name() -> None:
    graph = block()
    norm, dropout = node_of(graph, aten.batch_norm.default), node_of(graph, aten.dropout.default)
    assert graph.module.train() is graph.module
    assert graph.module.training
    assert (norm.args[5], dropout.kwargs["train"]) == (True, True)
    assert not torch.equal(graph.module(torch.ones(8, 4), True)["y"], graph.module(torch.ones(8, 4), True)["y"])
    graph.module.eval()
    assert (norm.args[5], dropout.kwargs["train"]) == (False, False)
    assert torch.equal(graph.module(torch.ones(8, 4), True)["y"], graph.module(torch.ones(8, 4), True)["y"])


def test_a_call_in_training_mode_advances_the_batch_counters() -> None:
    module = block().module
    module(torch.ones(3, 4), True)
    assert module.get_buffer("norm.num_batches_tracked") == 0
    module.train()(torch.ones(3, 4), True)
    assert module.get_buffer("norm.num_batches_tracked") == 2
    del module.get_submodule("norm")._buffers["num_batches_tracked"]
    module(torch.ones(3, 4), True)
    module.meta["counters"] = {"gone.num_batches_tracked": 1}
    module(torch.ones(3, 4), True)


def test_code_is_generated_at_the_first_call_after_an_edit() -> None:
    graph = block()
    module = graph.module
    assert "forward" not in vars(type(module))
    before = module(torch.ones(3, 4), True)["y"]
    assert "forward" in vars(type(module))
    last = list(graph.nodes)[-2]
    with graph.module.graph.inserting_after(last):
        negated = graph.module.graph.call_function(aten.neg.default, (last,))
    last.replace_all_uses_with(negated, delete_user_cb=lambda user: user is not negated)
    module.recompile()
    assert torch.equal(module(torch.ones(3, 4), True)["y"], -before)
    assert "aten.neg.default" in module.code
    assert "aten.neg.default" in str(module)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.ones(2, 5), True), "input x was captured with size 4 in dimension 1, .*; found 5: .*`dynamic`"),
        ((torch.ones(4), True), "input x must have 2 dimensions as at capture; found 1"),
        ((3.0, True), r"input x must be a tensor as it was at capture \(float32\[2\?, 4\]\); found float"),
        ((torch.ones(2, 4), False), "input flag was captured as True, .*; found False: capture the model again"),
        ((torch.ones(2, 4), 1), "input flag was captured as True, .*; found 1"),
    ],
)
def test_a_call_that_differs_from_what_was_built_in_is_refused(inputs: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block().module(*inputs)


def test_clone_shares_tensors_and_nothing_else() -> None:
    graph = block()
    clone = graph.clone()
    assert clone.text() == graph.text()
    assert clone.aliases == graph.aliases
    assert clone.notes == graph.notes
    assert list(clone.module.state_dict()) == list(graph.module.state_dict())
    for name, tensor in graph.module.state_dict(keep_vars=True).items():
        assert get_attribute(clone.module, name) is tensor
    assert torch.equal(clone.run(torch.ones(3, 4), True)["y"], graph.run(torch.ones(3, 4), True)["y"])
    assert torch.equal(clone.run(flag=True, x=torch.ones(3, 4))["y"], graph.run(torch.ones(3, 4), True)["y"])

    clone.notes.append("other")
    clone.aliases.clear()
    clone.module.meta["counters"].clear()
    clone.set_tensor("first.weight", nn.Parameter(torch.zeros(4, 4)))
    node_of(clone, aten.dropout.default).meta[SPEC] = spec(1)
    Call(node_of(clone, aten.batch_norm.default))["eps"] = 1.0
    fresh = block()
    assert graph.text() == fresh.text()
    assert (graph.notes, graph.aliases, graph.module.meta) == (fresh.notes, fresh.aliases, fresh.module.meta)
    assert graph.tensor("first.weight").abs().sum() > 0


@pytest.mark.parametrize("enabled", [True, False])
def test_clone_leaves_garbage_collection_as_it_was(enabled: bool) -> None:
    try:
        (gc.enable if enabled else gc.disable)()
        block().clone()
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


def test_deepcopy_copies_every_tensor_and_keeps_ties_and_unread_ones() -> None:
    module = block().module
    twin = copy.deepcopy(module)
    assert list(twin.state_dict()) == list(module.state_dict())
    assert "norm.scratch" not in twin.state_dict()
    assert twin.get_buffer("norm.scratch") is not module.get_buffer("norm.scratch")
    assert twin.get_parameter("first.weight") is twin.get_parameter("last.weight")
    assert twin.get_parameter("first.weight") is not module.get_parameter("first.weight")
    assert torch.equal(twin.get_parameter("first.weight"), module.get_parameter("first.weight"))
    assert not twin.training
    twin.train()
    assert not module.training
    assert node_of(Graph(module, ((), {})), aten.batch_norm.default).args[5] is False


def test_deepcopy_inside_a_parent_keeps_sharing_with_it() -> None:
    module = block().module
    parent = nn.ModuleDict({"a": module, "b": module})
    parent.register_parameter("w", module.get_parameter("first.weight"))
    twin = copy.deepcopy(parent)
    assert twin["a"] is twin["b"]
    assert twin.w is twin["a"].get_parameter("first.weight")


def test_shallow_copy_shares_tensors() -> None:
    module = block().module
    twin = copy.copy(module)
    assert twin.graph is not module.graph
    assert twin.get_parameter("first.weight") is module.get_parameter("first.weight")
    assert isinstance(twin, TraceModule)


def test_pickle_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(TypeError, match=r"save module.state_dict\(\), or the whole of it with torch.export.save"):
        pickle.dumps(block().module)


def test_set_tensor_replaces_a_tensor_under_all_its_names() -> None:
    graph = block()
    assert graph.names("first.weight") == ["first.weight", "last.weight"]
    new = nn.Parameter(torch.zeros(4, 4))
    graph.set_tensor("first.weight", new)
    assert graph.module.get_parameter("last.weight") is new
    assert graph.tensor("first.weight") is new
    graph.set_tensor("norm.weight", torch.zeros(4))
    assert "weight" in graph.module.get_submodule("norm")._buffers
    assert "weight" not in graph.module.get_submodule("norm")._parameters
    set_tensor(graph.module, "norm.scratch", torch.ones(3))
    assert "norm.scratch" not in graph.module.state_dict()
    with pytest.raises(TypeError, match="norm is not a tensor but Module"):
        graph.tensor("norm")


def test_tensors_lists_what_the_graph_reads_in_order() -> None:
    assert list(block().tensors()) == ["first.weight", "norm.weight", "norm.running_mean", "norm.running_var"]


def test_moving_to_a_device_moves_what_the_graph_creates() -> None:
    module = TraceModule(nn.Module(), fx.Graph())
    set_tensor(module, "scale", nn.Parameter(torch.ones(3)))
    graph = fx.Graph()
    steps = graph.call_function(aten.arange.default, (3,), {"device": torch.device("cpu"), "pin_memory": False})
    moved = graph.call_function(aten.to.device, (steps, torch.device("cpu"), torch.float32))
    graph.output(graph.call_function(aten.mul.Tensor, (moved, graph.get_attr("scale"))))
    module.graph = graph
    assert module().tolist() == [0, 1, 2]
    assert module.to("meta")().device == torch.device("meta")
    assert module.to_empty(device="cpu")().device == torch.device("cpu")
    assert module.double().get_parameter("scale").dtype == torch.float64


@pytest.mark.parametrize("training", [True, False])
def test_graph_says_which_mode_the_original_was_in(training: bool) -> None:
    graph = block()
    graph.module.meta["training"] = training
    assert graph.training is training
    assert graph.clone().training is training
    assert graph.module.training is False
