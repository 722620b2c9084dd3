"""Test that ONNX files are read, or refused in words that name the culprit and the remedy."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from graphopt.capture.onnx import functions, library
from graphopt.capture.onnx.files import load
from graphopt.errors import CaptureError

from .files import model, value, weight

node = helper.make_node

# --- what is read


def test_a_file_is_read_with_its_weights(tmp_path: Path) -> None:
    given = model()
    onnx.save(given, tmp_path / "model.onnx")
    found = load(tmp_path / "model.onnx")
    assert found.path == tmp_path / "model.onnx"
    assert found.notes == ()
    (initializer,) = found.model.graph.initializer
    assert torch.equal(found.tensor(initializer), torch.from_numpy(numpy_helper.to_array(initializer).copy()))


def test_the_given_model_is_not_changed() -> None:
    given = model()
    given.graph.node[0].name = ""
    before = given.SerializeToString(deterministic=True)
    found = load(given)
    assert found.path is None
    assert [node.name for node in found.model.graph.node] == ["MatMul_0", "relu"]
    assert given.SerializeToString(deterministic=True) == before


def test_weights_beside_the_model_are_mapped_and_copied_on_write(tmp_path: Path) -> None:
    given = model(
        [node("MatMul", ["x", "w"], ["z"])],
        inputs=[value("x", ("n", 300))],
        outputs=[value("z", ("n", 200))],
        initializers=[weight("w", (300, 200)), weight("unused", (3,))],
    )
    expected = [numpy_helper.to_array(tensor).copy() for tensor in given.graph.initializer]
    onnx.save(given, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    before = (tmp_path / "m.data").read_bytes()
    found = load(tmp_path / "m.onnx")
    for initializer, array in zip(found.model.graph.initializer, expected, strict=True):
        assert not initializer.raw_data
        tensor = found.tensor(initializer)
        assert torch.equal(tensor, torch.from_numpy(array))
        tensor.zero_()
    assert (tmp_path / "m.data").read_bytes() == before


def test_nodes_out_of_order_are_sorted() -> None:
    given = model()
    nodes = list(reversed(given.graph.node))
    found = load(model(nodes))
    assert [n.name for n in found.model.graph.node] == ["linear", "relu"]
    assert found.notes == ("the nodes of the graph were put in order",)


def test_a_node_waits_for_what_the_graph_in_it_reads() -> None:
    branch = helper.make_graph([node("Relu", ["y"], ["t"])], "branch", [], [value("t", None)])
    other = helper.make_graph([node("Neg", ["y"], ["e"])], "other", [], [value("e", None)])
    nodes = [
        node("If", ["go"], ["z"], name="if", then_branch=branch, else_branch=other),
        node("MatMul", ["x", "w"], ["y"], name="linear"),
    ]
    found = load(model(nodes, inputs=[value("x"), value("go", (), TensorProto.BOOL)]))
    assert [n.name for n in found.model.graph.node] == ["linear", "if"]


def test_nodes_get_names_of_their_own() -> None:
    nodes = [node("Relu", ["x"], ["a"], name="n"), node("Relu", ["a"], ["b"], name="n"), node("Relu", ["b"], ["z"])]
    first = load(model(nodes, outputs=[value("z")], initializers=[]))
    assert [n.name for n in first.model.graph.node] == ["n", "n_0", "Relu_0"]
    assert first.notes == ("1 nodes had the name of another node: a number was added",)


def test_initializers_are_no_inputs() -> None:
    found = load(model(inputs=[value("x"), value("w", (4, 3))]))
    assert [i.name for i in found.model.graph.input] == ["x"]
    assert found.notes == ("the initializer w is also an input: it is a weight, and no longer an input",)


def test_the_long_name_of_the_default_domain_is_its_short_one() -> None:
    given = model([node("Relu", ["x"], ["z"], domain="ai.onnx")], outputs=[value("z")], initializers=[])
    given.opset_import[0].domain = "ai.onnx"
    found = load(given)
    assert found.model.graph.node[0].domain == ""
    assert [(o.domain, o.version) for o in found.model.opset_import] == [("", 18)]


def test_an_old_model_is_converted() -> None:
    nodes = [node("Unsqueeze", ["x"], ["u"], axes=[0]), node("Squeeze", ["u"], ["z"], axes=[0])]
    given = model(nodes, outputs=[value("z")], initializers=[weight("large", (64, 64))], opset=11, ir_version=6)
    given.metadata_props.add(key="made by", value="hand")
    found = load(given)
    assert found.notes == ("the model was converted from opset 11 to 13",)
    assert found.model.opset_import[0].version == 13
    assert all(len(n.input) == 2 for n in found.model.graph.node if n.op_type in ("Squeeze", "Unsqueeze"))
    (large,) = (i for i in found.model.graph.initializer if i.name == "large")
    assert large.SerializeToString() == given.graph.initializer[0].SerializeToString()
    assert [(p.key, p.value) for p in found.model.metadata_props] == [("made by", "hand")]
    assert [i.name for i in found.model.graph.input] == ["x"]


def _doubling(depth: int) -> onnx.ModelProto:
    """Return a model whose function number n calls number n - 1 twice."""
    made = [
        helper.make_function(
            "local",
            f"f{i}",
            ["a"],
            ["b"],
            [node("Neg", ["a"], ["m"]), node("Neg", ["m"], ["b"])]
            if i == 0
            else [
                node(f"f{i - 1}", ["a"], ["m"], domain="local"),
                node(f"f{i - 1}", ["m"], ["b"], domain="local"),
            ],
            [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)],
        )
        for i in range(depth)
    ]
    nodes = [node(f"f{depth - 1}", ["x"], ["z"], domain="local", name="call")]
    return model(nodes, outputs=[value("z")], initializers=[], imports=[("local", 1)], functions=made)


def test_functions_are_inlined() -> None:
    found = load(_doubling(4))
    assert [n.op_type for n in found.model.graph.node] == ["Neg"] * 16
    assert not found.model.functions
    assert "4 functions were inlined" in found.notes


def test_a_sparse_initializer_is_made_dense() -> None:
    given = model(initializers=[])
    values = numpy_helper.from_array(np.array([5.0, 6.0], np.float32), "w")
    at = numpy_helper.from_array(np.array([[0, 1], [3, 2]], np.int64), "w.indices")
    given.graph.sparse_initializer.append(helper.make_sparse_tensor(values, at, [4, 3]))
    found = load(given)
    (dense,) = found.model.graph.initializer
    expected = torch.zeros(4, 3)
    expected[0, 1], expected[3, 2] = 5, 6
    assert torch.equal(found.tensor(dense), expected)
    assert not found.model.graph.sparse_initializer
    assert found.notes == ("the sparse initializer w was made dense",)


def test_training_info_is_left_out() -> None:
    given = model()
    given.training_info.add().algorithm.name = "sgd"
    found = load(given)
    assert not found.model.training_info
    assert found.notes == ("training_info was left out: the model is read for inference",)


def test_operators_of_onnx_runtime_are_taken() -> None:
    nodes = [
        node("SimplifiedLayerNormalization", ["x", "s"], ["y"], name="rms"),
        node("Gelu", ["y"], ["z"], name="gelu", domain="com.microsoft"),
    ]
    found = load(model(nodes, outputs=[value("z")], initializers=[weight("s", (4,))]))
    assert [n.domain for n in found.model.graph.node] == ["", "com.microsoft"]
    assert found.notes == ("operators of com.microsoft are used and not imported: version 1 was taken",)


def test_a_wrong_type_of_an_inner_value_is_ignored() -> None:
    given = model()
    given.graph.value_info.append(value("y", None, TensorProto.INT64))
    found = load(given)
    assert found.notes == ("value y is declared INT64 and computed FLOAT: the declaration was ignored",)
    assert not found.model.graph.value_info


# --- element types


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize(
    ("kind", "values", "dtype"),
    [
        ("FLOAT", [1.5, -2.0, 3e30], torch.float32),
        ("DOUBLE", [1.5, -2.0, 3e300], torch.float64),
        ("FLOAT16", [1.5, -2.0, 3e4], torch.float16),
        ("BFLOAT16", [1.5, -2.0, 3e30], torch.bfloat16),
        ("FLOAT8E4M3FN", [1.5, -2.0, 448.0], torch.float8_e4m3fn),
        ("FLOAT8E5M2", [1.5, -2.0, 0.25], torch.float8_e5m2),
        ("INT8", [-128, 127, 0], torch.int8),
        ("UINT8", [255, 127, 0], torch.uint8),
        ("INT16", [-(2**15), 2**15 - 1, 0], torch.int16),
        ("UINT16", [2**16 - 1, 1, 0], torch.uint16),
        ("INT32", [-(2**31), 2**31 - 1, 0], torch.int32),
        ("UINT32", [2**32 - 1, 1, 0], torch.uint32),
        ("INT64", [-(2**63), 2**63 - 1, 0], torch.int64),
        ("UINT64", [2**64 - 1, 1, 0], torch.uint64),
        ("BOOL", [True, False, True], torch.bool),
        ("COMPLEX64", [1 + 2j, -3j, 0.5], torch.complex64),
        ("INT4", [-8, 7, -1], torch.int8),
        ("UINT4", [15, 7, 0], torch.uint8),
        ("INT2", [-2, 1, -1], torch.int8),
        ("UINT2", [3, 1, 0], torch.uint8),
    ],
)
def test_entries_of_every_type_are_read(kind: str, values: list[Any], dtype: torch.dtype, raw: bool) -> None:
    number = TensorProto.DataType.Value(kind)
    tensor = helper.make_tensor("t", number, [3, 1], values)
    if raw:
        tensor = numpy_helper.from_array(numpy_helper.to_array(tensor), "t")
    assert tensor.HasField("raw_data") == raw
    found = load(model(initializers=[weight(), tensor]))
    result = found.tensor(found.model.graph.initializer[1])
    assert (result.dtype, result.shape) == (dtype, (3, 1))
    wide = torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else None
    listed = (result.to(wide) if wide else result).reshape(-1).tolist()
    assert listed == pytest.approx(values, rel=1e-2 if dtype.itemsize < 4 else 1e-7)
    assert wide is not None or listed == values


def test_tensors_are_writable_and_empty_ones_have_their_shape() -> None:
    empty = numpy_helper.from_array(np.zeros((0, 5), np.float32), "empty")
    found = load(model(initializers=[weight(), empty]))
    one, other = (found.tensor(tensor) for tensor in found.model.graph.initializer)
    one.add_(1)
    assert other.shape == (0, 5)
    assert not torch.equal(one, found.tensor(found.model.graph.initializer[0]))


# --- what is refused

REMEDY = "Try this: "


def _refusal(source: Any, *culprits: str) -> str:
    with pytest.raises(CaptureError) as caught:
        load(source)
    message = str(caught.value)
    for culprit in culprits:
        assert culprit in message
    assert re.search(r"; required: .+\. Try this: .+", message)
    return message


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "no bytes"),
        (b"this is text, not a model\n", "text"),
        (b"PK\x03\x04 and more", "zip archive"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"\x20\0\0\0ORTM", "ONNX Runtime"),
        (b"\x20\0\0\0TFL3", "TensorFlow Lite"),
        (bytes(100), "bytes that are no ONNX model"),
        (b"\x0a\x03abc", "no graph"),  # a message that parses
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    _refusal(path, str(path), found)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    data = model().SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(data[: int(share * len(data))])
    _refusal(path, str(path))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    _refusal(tmp_path, str(tmp_path), "a folder")
    _refusal(tmp_path / "absent.onnx", "absent.onnx", "No such file")
    os.mkfifo(tmp_path / "pipe.onnx")
    _refusal(tmp_path / "pipe.onnx", "pipe.onnx", "no regular file")
    _refusal(Path("/dev/zero"), "/dev/zero", "no regular file")
    _refusal("nul\0.onnx", "null")
    _refusal(tmp_path / ("a" * 300), "too long")


def test_a_file_that_protocol_buffers_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    with path.open("wb") as file:
        file.truncate(1 << 31)
    _refusal(path, str(path), "2147483648 bytes", "save_as_external_data=True")


def _edited(edit: Callable[[onnx.ModelProto], object], **parts: Any) -> onnx.ModelProto:
    given = model(**parts)
    edit(given)
    return given


def _text(given: onnx.ModelProto, old: bytes, new: bytes) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(given.SerializeToString().replace(old, new))


def _set(message: Any, **fields: Any) -> None:
    for name, content in fields.items():
        setattr(message, name, content)


def _dims(given: onnx.ModelProto, dims: list[int]) -> None:
    given.graph.initializer[0].dims[:] = dims


HEADERS: dict[str, tuple[Callable[[onnx.ModelProto], object], tuple[str, ...]]] = {
    "ir_version 0": (lambda m: _set(m, ir_version=0), ("ir_version 0",)),
    "ir_version newer": (lambda m: _set(m, ir_version=999), ("ir_version 999", "update the package onnx")),
    "ir_version huge": (lambda m: _set(m, ir_version=2**62), ("ir_version 46116",)),
    "opset newer": (lambda m: _set(m.opset_import[0], version=999), ("opset 999", "update the package onnx")),
    "opset zero": (lambda m: _set(m.opset_import[0], version=0), ("opset 0",)),
    "no opset": (lambda m: m.ClearField("opset_import"), ("no opset version of ai.onnx", "opset_import")),
    "two opsets": (lambda m: m.opset_import.add(domain="ai.onnx", version=13), ("'ai.onnx'", "18 and 13")),
    "metadata twice": (
        lambda m: [m.metadata_props.add(key="k", value=v) for v in "ab"],
        ("metadata 'k'", "two values"),
    ),
    "no nodes": (lambda m: m.ClearField("graph"), ("no graph",)),
    "no outputs": (lambda m: m.graph.ClearField("output"), ("no outputs",)),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_is_refused(case: str) -> None:
    edit, culprits = HEADERS[case]
    _refusal(_edited(edit), *culprits)


GRAPHS: dict[str, tuple[Callable[[onnx.ModelProto], object], tuple[str, ...]]] = {
    "missing input": (lambda m: _set_input(m, 0, 0, "absent"), ("'linear' (MatMul)", "'absent' that nothing makes")),
    "near name": (lambda m: _set_output(m, "weights"), ("'relu' (Relu)", "did you mean 'weights'?")),
    "two makers": (lambda m: _set_output(m, "x"), ("value 'x'", "besides another value of that name")),
    "initializer twice": (lambda m: m.graph.initializer.append(weight()), ("value 'w'", "an initializer, besides")),
    "input twice": (lambda m: m.graph.input.append(value("x")), ("value 'x'", "an input, besides")),
    "initializer without name": (
        lambda m: m.graph.initializer.append(weight("")),
        ("an initializer in the graph", "an empty name"),
    ),
    "input without name": (lambda m: _set(m.graph.input[0], name=""), ("an input in the graph", "an empty name")),
    "output of nothing": (lambda m: _set(m.graph.output[0], name="absent"), ("output 'absent'", "nothing that makes")),
    "output twice": (lambda m: m.graph.output.append(m.graph.output[0]), ("output 'z'", "two outputs of that name")),
    "cycle": (
        lambda m: _set_input(m, 0, 0, "z"),
        ("cycle of nodes: node 'linear' (MatMul) <- node 'relu' (Relu) <- node 'linear' (MatMul)",),
    ),
    "own output": (lambda m: _set_input(m, 1, 0, "z"), ("cycle of nodes: node 'relu' (Relu) <- node 'relu' (Relu)",)),
    "nul in a name": (lambda m: _set(m.graph.node[0], name="a\0b"), ("'a\\x00b'", "cannot be printed")),
    "escapes in a name": (
        lambda m: _set(m.graph.node[0], name="a\x1b[31mb"),
        ("'a\\x1b[31mb'", "cannot be printed", "rename it"),
    ),
    "escapes in metadata": (
        lambda m: m.graph.node[0].metadata_props.add(key="k", value="one\n\x1b[31m"),
        ("metadata of node 'linear'", "cannot be printed"),
    ),
    "two lines in a weight's name": (
        lambda m: _set(m.graph.initializer[0], name="a\nb"),
        ("an initializer", "'a\\nb'", "cannot be printed"),
    ),
    "no operator": (lambda m: m.graph.node[0].ClearField("op_type"), ("node 'linear'", "no operator")),
    "unknown operator": (lambda m: _set(m.graph.node[0], op_type="MatMull"), ("MatMull",)),
    "custom operator": (
        lambda m: _set(m.graph.node[1], domain="my.company", op_type="Swish"),
        ("node 'relu' (Swish)", "'Swish'", "'my.company'", "model-local function"),
    ),
    "classical model": (
        lambda m: _set(m.graph.node[1], domain="ai.onnx.ml", op_type="TreeEnsemble"),
        ("node 'relu' (TreeEnsemble)", "'ai.onnx.ml'", "classical models"),
    ),
    "too many inputs": (lambda m: m.graph.node[1].input.extend(["x", "x"]), ("relu", "input size 3")),
    "unknown attribute": (
        lambda m: m.graph.node[1].attribute.append(helper.make_attribute("a", 1)),
        ("relu", "attribute"),
    ),
    "attribute twice": (
        lambda m: m.graph.node[1].attribute.extend(helper.make_attribute("a", i) for i in range(2)),
        ("node 'relu'", "'a' twice"),
    ),
    "attribute of no function": (
        lambda m: m.graph.node[1].attribute.add(name="a", ref_attr_name="b", type=1),
        ("node 'relu'", "outside of a function"),
    ),
    "type of an input": (lambda m: m.graph.input[0].ClearField("type"), ("input 'x'", "no type")),
    "sequence input": (
        lambda m: m.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", 1, None)),
        ("input 'x'", "a sequence"),
    ),
    "text input": (lambda m: m.graph.input[0].CopyFrom(value("x", (1,), 8)), ("input 'x'", "STRING")),
    "negative input": (lambda m: m.graph.input[0].CopyFrom(value("x", (-5, 4))), ("input 'x'", "dimension of -5")),
    "huge input": (
        lambda m: m.graph.input[0].CopyFrom(value("x", (2**31, 2**31, 4))),
        ("input 'x'", "declare names for dimensions"),
    ),
    "unknown type of an output": (
        lambda m: _set(m.graph.output[0].type.tensor_type, elem_type=-5),
        ("'z' in the graph", "number -5"),
    ),
    "negative output": (lambda m: m.graph.output[0].CopyFrom(value("z", (-5, 4))), ("'z' in the graph", "-5")),
    "type of an output": (
        lambda m: m.graph.output[0].CopyFrom(value("z", None, TensorProto.INT64)),
        ("output 'z'", "declared INT64, computed FLOAT"),
    ),
    "types do not fit": (
        lambda m: m.graph.input[0].CopyFrom(value("x", None, TensorProto.INT64)),
        ("types that do not fit", "MatMul"),
    ),
    "negative dimension": (lambda m: _dims(m, [-4, -3]), ("tensor 'w'", "dimensions [-4, -3]", "none negative")),
    "overflow": (lambda m: _dims(m, [2**32, 2**32, 3]), ("tensor 'w'", "fewer than 2**60 entries")),
    "overflow behind a zero": (lambda m: _dims(m, [0, 2**62, 2**62]), ("tensor 'w'", "fewer than 2**60 entries")),
    "absurd size": (lambda m: _dims(m, [2**40]), ("tensor 'w'", "48 bytes", "4398046511104 bytes")),
    "many dimensions": (lambda m: _dims(m, [1] * 65), ("tensor 'w'", "at most 64 dimensions")),
    "short data": (lambda m: _dims(m, [4, 4]), ("tensor 'w'", "48 bytes", "64 bytes for FLOAT of dimensions [4, 4]")),
    "no data": (lambda m: m.graph.initializer[0].ClearField("raw_data"), ("tensor 'w'", "no data")),
    "data twice": (lambda m: m.graph.initializer[0].float_data.extend([1.0] * 12), ("float_data and raw_data",)),
    "data of another type": (
        lambda m: m.graph.initializer[0].CopyFrom(TensorProto(name="w", dims=[1], data_type=1, int64_data=[1])),
        ("tensor 'w'", "FLOAT entries in int64_data", "float_data"),
    ),
    "type unknown": (lambda m: _set(m.graph.initializer[0], data_type=77), ("tensor 'w'", "number 77")),
    "type undefined": (lambda m: _set(m.graph.initializer[0], data_type=0), ("tensor 'w'", "UNDEFINED")),
    "text": (
        lambda m: m.graph.initializer.append(TensorProto(name="words", data_type=8, dims=[1], string_data=[b"a"])),
        ("tensor 'words'", "STRING"),
    ),
    "segment": (lambda m: _set(m.graph.initializer[0].segment, begin=0, end=3), ("tensor 'w'", "segment")),
    "sparse, huge": (lambda m: _sparse(m, [2**20, 2**20], [1, 5]), ("tensor 's'", "when dense", "dense tensor")),
    "sparse, outside": (lambda m: _sparse(m, [2, 3], [1, 6]), ("tensor 's'", "outside its dimensions")),
    "sparse, negative": (lambda m: _sparse(m, [2, 3], [-1, 5]), ("tensor 's'", "outside its dimensions")),
    "sparse, twice": (lambda m: _sparse(m, [2, 3], [1, 1]), ("tensor 's'", "come twice")),
    "sparse, parts": (lambda m: _sparse(m, [2, 3], [1, 2, 3]), ("tensor 's'", "indices of dimensions [3]")),
}


def _set_input(given: onnx.ModelProto, position: int, index: int, name: str) -> None:
    given.graph.node[position].input[index] = name


def _set_output(given: onnx.ModelProto, name: str) -> None:
    given.graph.node[0].output[0] = name
    given.graph.node[1].input[0] = "weight"


def _sparse(given: onnx.ModelProto, dims: list[int], at: list[int]) -> None:
    values = numpy_helper.from_array(np.array([5.0, 6.0], np.float32), "s")
    indices = numpy_helper.from_array(np.array(at, np.int64), "at")
    given.graph.sparse_initializer.append(onnx.SparseTensorProto(values=values, indices=indices, dims=dims))


@pytest.mark.parametrize("case", GRAPHS)
def test_a_graph_is_refused(case: str) -> None:
    edit, culprits = GRAPHS[case]
    _refusal(_edited(edit), *culprits)


def test_a_declaration_that_says_nothing_is_left_out() -> None:
    given = model()
    given.graph.value_info.extend([value("y", ("n", 3)), value("y", None, 77), value("y", (-3,))])
    found = load(given)
    assert [v.name for v in found.model.graph.value_info] == ["y"]
    assert found.notes == ("2 declarations of values in the graph were left out",)


def test_names_that_are_no_text_are_refused() -> None:
    _refusal(_text(model(imports=[("some", 1)]), b"some", b"\xff\xfe\xfd\xfc"), "domain", "bytes that are no text")
    _refusal(_text(model(), b"relu", b"\xff\xfe\xfd\xfc"), "bytes that are no text", "UTF-8")
    _refusal(_text(model(), b"Relu", b"\xff\xfe\xfd\xfc"), "bytes that are no text", "UTF-8")


def test_entries_that_do_not_fit_their_type_are_refused() -> None:
    tensor = TensorProto(name="t", dims=[2], data_type=TensorProto.INT8, int32_data=[1, 300])
    found = load(model(initializers=[weight(), tensor]))
    with pytest.raises(CaptureError, match=r"tensor 't'.*entries from 1 to 300.*INT8 entries from -128 to 127"):
        found.tensor(found.model.graph.initializer[1])


def test_a_name_that_is_taken_around_a_graph_is_refused() -> None:
    branch = helper.make_graph([node("Relu", ["x"], ["y"])], "branch", [], [value("y", None)])
    nodes = [
        node("MatMul", ["x", "w"], ["y"], name="linear"),
        node("If", ["go"], ["z"], name="if", then_branch=branch, else_branch=branch),
    ]
    _refusal(
        model(nodes, inputs=[value("x"), value("go", (), TensorProto.BOOL)]),
        "value 'y' in ",
        "_branch' of node 'if' (If)",
        "of that name around it",
    )


def _nested(depth: int) -> onnx.ModelProto:
    given = model([], inputs=[value("x"), value("go", (), TensorProto.BOOL)], outputs=[value("t0")], initializers=[])
    graph = given.graph
    for i in range(depth):
        outer = graph.node.add(op_type="If", name=f"if{i}", input=["go"], output=[f"t{i}"])
        graph = outer.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g
        graph.name = "branch"
        graph.output.add(name=f"t{i + 1}")
    graph.node.add(op_type="Neg", input=["x"], output=[f"t{depth}"])
    return given


def test_graphs_in_graphs_are_bounded(tmp_path: Path) -> None:
    _refusal(_nested(17), "'then_branch' of node 'if16' (If)", "graphs nested 17 deep", "at most 16")
    # Deeper than protocol buffers are read.
    given = _nested(60)
    _refusal(given, "the ModelProto", "graph")
    path = tmp_path / "deep.onnx"
    path.write_bytes(given.SerializeToString())
    _refusal(path, str(path), "MaxDepth")


# --- functions


def test_functions_that_double_are_refused_before_they_are_inlined() -> None:
    _refusal(_doubling(64), "function 'local.f", "nodes", "do not use the file unless you know who made it")


def test_functions_with_large_constants_are_refused_before_they_are_inlined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "BYTE_LIMIT", 300)
    _refusal(_doubling(5), "function 'local.f", "bytes")


@pytest.mark.parametrize("length", [1, 2, 5])
def test_functions_that_call_themselves_are_refused(length: int) -> None:
    made = [
        helper.make_function(
            "local",
            f"f{i}",
            ["a"],
            ["b"],
            [node(f"f{(i + 1) % length}", ["a"], ["b"], domain="local")],
            [helper.make_opsetid("local", 1)],
        )
        for i in range(length)
    ]
    nodes = [node("f0", ["x"], ["z"], domain="local", name="call")]
    given = model(nodes, outputs=[value("z")], initializers=[], imports=[("local", 1)], functions=made)
    _refusal(given, "function 'local.f0'", "a function that calls itself: f0 -> ", "Loop or Scan")


def test_long_chains_of_functions_are_refused() -> None:
    made = [
        helper.make_function(
            "local",
            f"f{i}",
            ["a"],
            ["b"],
            [node(f"f{i + 1}", ["a"], ["b"], domain="local") if i < 299 else node("Neg", ["a"], ["b"])],
            [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)],
        )
        for i in range(300)
    ]
    nodes = [node("f0", ["x"], ["z"], domain="local", name="call")]
    given = model(nodes, outputs=[value("z")], initializers=[], imports=[("local", 1)], functions=made)
    _refusal(given, "call each other 200 deep", "onnx.inliner")


def test_two_functions_of_one_name_are_refused() -> None:
    given = _doubling(2)
    given.functions.append(given.functions[0])
    _refusal(given, "function 'local.f0'", "another function of that name")


def test_a_call_with_too_many_inputs_is_refused() -> None:
    given = _doubling(2)
    given.graph.node[0].input.append("x")
    _refusal(given, "node 'call' (f1)", "2 inputs", "export the model again")


# --- data beside the model


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Make a model in a folder of its own, its weights in `w.data`; a file with a secret stands above the folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    given = model()
    tensor = given.graph.initializer[0]
    (folder / "w.data").write_bytes(tensor.raw_data)
    (tmp_path / "secret").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.data")
    (folder / "model.onnx").write_bytes(given.SerializeToString())
    return folder / "model.onnx"


def _moved(path: Path, **entries: str) -> Path:
    given = onnx.load(path, load_external_data=False)
    tensor = given.graph.initializer[0]
    kept = {entry.key: entry.value for entry in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, content in kept.items():
        tensor.external_data.add(key=key, value=content)
    path.write_bytes(given.SerializeToString())
    return path


@pytest.mark.parametrize(
    "location",
    [
        *(
            "../secret",
            "a/../../secret",
            "..",
            "/etc/hostname",
            "C:\\secret",
            "\\\\host\\share",
            "..\\secret",
            "C:secret",
        ),
    ],
)
def test_data_outside_the_folder_is_refused(outside: Path, location: str) -> None:
    _refusal(_moved(outside, location=location), "tensor 'w'", "leads out of the model's folder", "do not use the file")


def test_links_that_lead_out_of_the_folder_are_refused(outside: Path) -> None:
    data = outside.with_name("w.data")
    data.unlink()
    data.symlink_to(outside.parents[1] / "secret")
    _refusal(outside, "tensor 'w'", "'w.data'", "a link that leads out", "cp -rL")
    outside.with_name("sub").symlink_to(outside.parents[1])
    _refusal(_moved(outside, location="sub/secret"), "tensor 'w'", "a link that leads out", "cp -rL")


def test_hard_links_are_refused(outside: Path) -> None:
    data = outside.with_name("w.data")
    data.unlink()
    data.hardlink_to(outside.parents[1] / "secret")
    _refusal(outside, "tensor 'w'", "2 names (hard links)", "replace it by a copy of itself")


def test_links_inside_the_folder_are_followed(outside: Path) -> None:
    outside.with_name("sub").mkdir()
    outside.with_name("w.data").rename(outside.with_name("sub") / "real")
    outside.with_name("w.data").symlink_to(outside.with_name("sub") / "real")
    found = load(outside)
    assert torch.equal(found.tensor(found.model.graph.initializer[0]).reshape(-1)[:1], _first())
    found = load(_moved(outside, location="sub/real"))
    assert torch.equal(found.tensor(found.model.graph.initializer[0]).reshape(-1)[:1], _first())


def _first() -> torch.Tensor:
    return torch.from_numpy(numpy_helper.to_array(weight()).copy()).reshape(-1)[:1]


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ({"location": ""}, "without a location"),
        ({"location": "absent"}, "does not exist"),
        ({"location": "a\0b"}, "leads out"),
        ({"location": "a" * 300}, "cannot be found"),
        ({"location": "."}, "no regular file"),
        ({"location": "w.data/"}, ""),
        ({"location": "*/_ORT_MEM_ADDR_/*"}, "does not exist"),
        ({"offset": "4"}, "from byte 4 to 52, and the file has 48 bytes"),
        ({"offset": "9" * 18}, "and the file has 48 bytes"),
        ({"offset": "9" * 5000}, "offset '999"),
        ({"offset": "-4"}, "offset '-4'"),
        ({"offset": "0x10"}, "offset '0x10'"),
        ({"offset": "1_0"}, "offset '1_0'"),
        ({"length": "-1"}, "length '-1'"),
        ({"length": "44"}, "44 bytes of external data"),
        ({"length": "4398046511104"}, "4398046511104 bytes of external data"),
    ],
)
def test_places_of_data_are_refused(outside: Path, entries: dict[str, str], found: str) -> None:
    if entries == {"location": "w.data/"}:  # the file all the same
        load(_moved(outside, **entries))
        return
    _refusal(_moved(outside, **entries), "tensor 'w'", found)


def test_two_places_of_data_are_refused(outside: Path) -> None:
    given = onnx.load(outside, load_external_data=False)
    given.graph.initializer[0].external_data.add(key="location", value="other")
    outside.write_bytes(given.SerializeToString())
    _refusal(outside, "tensor 'w'", "two entries 'location'")


def test_data_that_is_no_file_is_refused_at_once(outside: Path) -> None:
    outside.with_name("w.data").unlink()
    os.mkfifo(outside.with_name("w.data"))
    _refusal(outside, "tensor 'w'", "no regular file")


def test_data_beside_a_model_in_memory_is_refused(outside: Path) -> None:
    given = onnx.load(outside, load_external_data=False)
    _refusal(given, "the ModelProto", "tensor 'w'", "'w.data'", "pass the path of the .onnx file")


def test_data_that_shrinks_after_it_was_examined_is_refused(outside: Path) -> None:
    found = load(outside)
    os.truncate(outside.with_name("w.data"), 8)
    with pytest.raises(CaptureError, match=r"tensor 'w'.*the file has 8 bytes"):
        found.tensor(found.model.graph.initializer[0])


def test_overlapping_data_is_read(outside: Path) -> None:
    given = onnx.load(outside, load_external_data=False)
    other = given.graph.initializer.add()
    other.CopyFrom(given.graph.initializer[0])
    other.name, other.dims[:] = "other", [2]
    other.external_data.add(key="offset", value="4")
    outside.write_bytes(given.SerializeToString())
    found = load(outside)
    one, two = (found.tensor(tensor) for tensor in found.model.graph.initializer)
    assert torch.equal(one.reshape(-1)[1:3], two)


def test_data_of_attributes_is_taken_into_the_model(outside: Path) -> None:
    given = onnx.load(outside, load_external_data=False)
    tensor = given.graph.initializer.pop()
    given.graph.node.insert(0, node("Constant", [], ["w"], name="constant", value=tensor))
    outside.write_bytes(given.SerializeToString())
    found = load(outside)
    held = found.model.graph.node[0].attribute[0].t
    assert held.data_location == TensorProto.DEFAULT
    assert held.raw_data == outside.with_name("w.data").read_bytes()
    tensor.external_data[0].value = "../secret"
    given.graph.node[0].attribute[0].t.CopyFrom(tensor)
    outside.write_bytes(given.SerializeToString())
    _refusal(outside, "leads out of the model's folder", "(attribute 'value' of node 'constant'")


# --- onnx's own code


def test_what_onnx_dies_of_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    monkeypatch.setattr(library, "_SCRIPT", script)
    library._HELPER.stop()
    script.write_text("import os, sys; sys.stdin.buffer.readline(); os.abort()")
    _refusal(model(), "onnx breaks off (status -6)", "export the model again")
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(library, "_SECONDS", 0.2)
    _refusal(model(), "did not come to an end", "export the model again")
    monkeypatch.undo()
    assert load(model()).notes == ()


def test_a_folder_with_modules_of_onnx_names_is_not_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "onnx.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    library._HELPER.stop()
    assert load(model()).notes == ()


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("model.onnx")
        _refusal(Path("model.onnx"), "no regular file")
