"""Check that sizes are followed to where they come from, however far that is."""

from onnx import TensorProto, helper

from graphopt.capture import capture
from graphopt.passes.extents import Extents


def test_a_size_is_followed_along_a_chain_deeper_than_the_stack() -> None:
    depth = 3000
    nodes = [helper.make_node("Relu", [f"x{i}"], [f"x{i + 1}"]) for i in range(depth)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x0", f"x{depth}")]
    chain = helper.make_graph(nodes, "chain", ends[:1], ends[1:])
    graph = capture(helper.make_model(chain, opset_imports=[helper.make_opsetid("", 20)]))
    first, *_, last, _ = graph.nodes
    assert Extents()(last, 0) == (first, 0)
    assert Extents()(last, 1) == 4


def test_a_size_is_followed_through_a_norm() -> None:
    names = ("x", "scale", "bias")
    nodes = [helper.make_node("InstanceNormalization", names, ["y"]), helper.make_node("Relu", ["y"], ["z"])]
    weights = [helper.make_tensor(name, TensorProto.FLOAT, [4], [1, 2, 3, 4]) for name in names[1:]]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4, "w"]) for name in ("x", "z")]
    norm = helper.make_graph(nodes, "norm", ends[:1], ends[1:], weights)
    graph = capture(helper.make_model(norm, opset_imports=[helper.make_opsetid("", 20)]))
    x = next(node for node in graph.nodes if node.op == "placeholder")
    last = next(node for node in graph.nodes if str(node.target) == "onnx.Relu")
    assert Extents().shape(last) == ((x, 0), 4, (x, 2))
