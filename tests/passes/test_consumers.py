"""Check that every layer is the product of rows and a matrix that the compensating passes take it for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.graph import Graph
from graphopt.passes.recover.consumers import Consumer, find_consumers
from graphopt.sweep import Sweep
from tests.onnx_models import graph_of

KINDS: dict[int, tuple[Any, Any]] = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}


def only(graph: Graph) -> Consumer:
    found, refused = find_consumers(graph)
    assert not refused
    (consumer,) = found.values()
    return consumer


def check(module: nn.Module, x: Tensor) -> Consumer:
    """Compare a layer with ``A Mᵀ + b``, and its weight with what comes back of its matrix."""
    return checked(capture(module.double().eval(), x.double()), x)


def checked(graph: Graph, x: Tensor) -> Consumer:
    consumer = only(graph)
    weight = graph.tensor(consumer.weight).detach()
    matrix = consumer.matrix(weight)
    assert torch.equal(consumer.stored(matrix, weight), weight)
    sweep = Sweep(graph, [((x.double(),), {}), ((x.double() + 1,), {})])
    seen = 0
    for node in sweep:
        if node.name == consumer.node.name:
            for value, y in zip(sweep.values(consumer.input), consumer.results(sweep), strict=True):
                patches = consumer.patches(value)
                expected = consumer.samples(y)
                picked = torch.arange(0, len(expected), 2)
                rows = consumer.take(patches, picked)
                found = rows @ matrix.mT
                if consumer.bias is not None:
                    found = found + graph.tensor(consumer.bias).detach().unflatten(0, (consumer.groups, 1, -1))
                torch.testing.assert_close(found, consumer.grouped(expected[picked]), rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(consumer.applied(value, graph), y, rtol=1e-12, atol=1e-12)
                seen += 1
    assert seen == 2
    return consumer


def convolution(
    kind: str, x: tuple[int, ...], weight: tuple[int, ...], attributes: dict[str, Any], *, bias: bool
) -> Graph:
    """Return a graph of one convolution of ONNX."""
    places = [f"d{d}" for d in range(len(x) - 2)]
    head = f"(double[N,{x[1]},{','.join(map(str, x[2:]))}] x) => (double[N,m,{','.join(places)}] y)"
    given = ", ".join(
        f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}" for name, value in attributes.items()
    )
    outputs = weight[0] if kind == "Conv" else weight[1] * attributes["group"]
    body = f"y = {kind} <{given}> (x, w{', b' if bias else ''})"
    return graph_of(head, body, {"w": weight} | ({"b": (outputs,)} if bias else {}))


@settings(max_examples=60)
@given(st.data())
def test_convolutions_of_onnx(data: st.DataObject) -> None:
    draw = data.draw
    extents = draw(st.sampled_from([1, 2, 3]))

    def each(values: list[int], count: int = extents) -> list[int]:
        return [draw(st.sampled_from(values)) for _ in range(count)]

    group = draw(st.sampled_from([1, 2, 3]))
    x = (2, group * draw(st.integers(1, 2)), *each([5, 6, 7]))
    kernel, strides, dilations = each([1, 2, 3]), each([1, 2]), each([1, 2])
    automatic = draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    attributes: dict[str, Any] = {"group": group, "kernel_shape": kernel, "strides": strides, "dilations": dilations}
    attributes["auto_pad"] = automatic
    transposed = draw(st.booleans())
    if automatic == "NOTSET":
        attributes["pads"] = each([0, 1], 2 * extents)
    if transposed:
        attributes["output_padding"] = [
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(strides, dilations, strict=True)
        ]
        if draw(st.booleans()):
            attributes["output_shape"] = [n * s + draw(st.integers(0, 1)) for n, s in zip(x[2:], strides, strict=True)]
    outputs = draw(st.integers(2, 3))  # a single number is no weight
    weight = (x[1], outputs, *kernel) if transposed else (group * outputs, x[1] // group, *kernel)
    kind = "ConvTranspose" if transposed else "Conv"
    consumer = checked(convolution(kind, x, weight, attributes, bias=draw(st.booleans())), torch.randn(x).double())
    assert (consumer.is_transposed, consumer.groups) == (transposed, group)


@settings(max_examples=60)
@given(st.data())
def test_convolutions(data: st.DataObject) -> None:
    draw = data.draw
    extents = draw(st.sampled_from([1, 2, 3]))

    def each(values: list[int]) -> tuple[int, ...]:
        return tuple(draw(st.sampled_from(values)) for _ in range(extents))

    groups = draw(st.sampled_from([1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    kernel, stride, dilation = each([1, 2, 3]), each([1, 2]), each([1, 2])
    x = torch.randn(2, inputs, *each([5, 6, 7]))
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    plain, transposed = KINDS[extents]
    if draw(st.booleans()):
        more = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        consumer = check(transposed(inputs, outputs, kernel, padding=each([0, 1]), output_padding=more, **options), x)
        assert consumer.is_transposed
        assert (consumer.unevenness is None) == (kernel == (1,) * extents)
    else:
        padding = "same" if stride == (1,) * extents and draw(st.booleans()) else each([0, 1, 2])
        consumer = check(plain(inputs, outputs, kernel, padding=padding, **options), x)
        assert (consumer.unevenness is not None) == any(
            kernel[d] > 1 if padding == "same" else padding[d] for d in range(extents)
        )
    assert consumer.groups == groups


def test_a_convolution_without_a_batch() -> None:
    check(nn.Conv2d(3, 4, 3, padding=1), torch.randn(3, 5, 6))


class Product(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], turned: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4) if turned else torch.randn(4, 5))
        self.bias = nn.Parameter(torch.randn(5))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


@pytest.mark.parametrize(
    ("function", "turned", "bias"),
    [
        (lambda x, w, b: x @ w, False, None),
        (lambda x, w, b: x @ w + b, False, "bias"),
        (lambda x, w, b: b + x @ w, False, "bias"),
        (lambda x, w, b: x @ w.t() + b, True, "bias"),
        (lambda x, w, b: x @ w.transpose(-1, 0), True, None),
        (lambda x, w, b: x @ w.permute(1, 0).permute(0, 1), True, None),
        (lambda x, w, b: torch.mm(x, w), False, None),
        (lambda x, w, b: torch.addmm(b, x, w), False, "bias"),
        (lambda x, w, b: torch.addmm(b, x, w.T), True, "bias"),
        (lambda x, w, b: nn.functional.linear(x, w.t(), b), False, "bias"),
        (lambda x, w, b: nn.functional.linear(x, w), True, None),
    ],
)
def test_products(function: Any, turned: bool, bias: str | None) -> None:
    assert check(Product(function, turned), torch.randn(3, 4)).bias == bias


def test_rows_of_a_linear_layer_with_further_dimensions() -> None:
    check(nn.Linear(4, 3), torch.randn(2, 3, 5, 4))
    check(nn.Linear(4, 3, bias=False), torch.randn(4))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w, b: x @ w.exp(), "the weight of matmul is computed by exp, and is no parameter"),
        (
            lambda x, w, b: w.t() @ x.t(),
            "matmul (aten.matmul.default) multiplies with it from the left, along other places",
        ),
        (
            lambda x, w, b: torch.addmm(b, x, w, alpha=2),
            "addmm (aten.addmm.default) scales its terms (alpha 2, beta 1)",
        ),
        (lambda x, w, b: nn.functional.linear(x, w.t(), b.exp()), "the bias of linear is computed by exp"),
        (lambda x, w, b: torch.einsum("ij,jk->ik", x, w), "einsum (aten.einsum.default) is an operator that"),
        (lambda x, w, b: x @ w[:, :3], "the weight of matmul is computed by slice_1"),
    ],
)
def test_refusals(function: Any, reason: str) -> None:
    found, (refused,) = find_consumers(capture(Product(function), torch.randn(3, 4)))
    assert not found
    assert refused.tensor == "weight"
    assert refused.reason.startswith(reason)


HEAD = "(double[N,4] x) => (double[N,m] y)"


@pytest.mark.parametrize(
    ("body", "turned", "bias"),
    [
        ("y = MatMul(x, w)", False, None),
        ("z = MatMul(x, w) y = Add(z, b)", False, "b"),
        ("z = MatMul(x, w) y = Add(b, z)", False, "b"),
        ("t = Transpose(w) y = MatMul(x, t)", True, None),
        ("t = Transpose <perm = [1, 0]> (w) z = MatMul(x, t) y = Add(z, b)", True, "b"),
        ("t = Transpose <perm = [0, 1]> (w) y = MatMul(x, t)", False, None),
        ("y = Gemm(x, w, b)", False, "b"),
        ("y = Gemm <transB = 1> (x, w, b)", True, "b"),
        ("y = Gemm <transB = 1> (x, w)", True, None),
        ("t = Transpose(w) y = Gemm <transB = 1> (x, t, b)", False, "b"),
    ],
)
def test_products_of_onnx(body: str, turned: bool, bias: str | None) -> None:
    graph = graph_of(HEAD, body, {"w": (5, 4) if turned else (4, 5), "b": (5,)})
    consumer = checked(graph, torch.randn(3, 4))
    assert (consumer.bias, consumer.outputs, consumer.out_rows) == (bias, 5, turned)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("e = Exp(w) y = MatMul(x, e)", "the weight of {} is computed by {}, and is no parameter"),
        ("t = Transpose(x) s = Transpose(w) y = MatMul(s, t)", "{} (onnx.MatMul) multiplies with it from the left"),
        ("t = Transpose(x) y = Gemm <transA = 1> (t, w)", "{} (onnx.Gemm) reads its input turned, its channels along"),
        ("y = Gemm <alpha = 0.5> (x, w, b)", "{} (onnx.Gemm) scales its terms (alpha 0.5, beta 1)"),
        ("y = Gemm <beta = 0.5> (x, w)", "{} (onnx.Gemm) scales its terms (alpha 1, beta 0.5)"),
        ("c = Exp(b) y = Gemm(x, w, c)", "the bias of {} is computed by {} and is no parameter by itself"),
        ('y = Einsum <equation = "ij,jk->ik"> (x, w)', "{} (onnx.Einsum) is an operator that this pass does not take"),
    ],
)
def test_refusals_of_onnx(body: str, reason: str) -> None:
    found, (refused,) = find_consumers(graph_of(HEAD, body, {"w": (4, 5), "b": (5,)}))
    assert not found
    assert refused.tensor == "w"
    start, _, rest = reason.partition("{}")
    middle, _, end = rest.partition("{}")
    assert refused.reason.startswith(f"{start}{refused.node.name}{middle}")
    assert end in refused.reason


def test_what_a_runtime_fused_in_keeps_a_layer_whole() -> None:
    head = "(float[N,2,5,5] x) => (float[N,3,4,4] y)"
    graph = graph_of(head, 'y = com.microsoft.FusedConv <activation = "Relu"> (x, w)', {"w": (3, 2, 2, 2)})
    found, (refused,) = find_consumers(graph)
    assert not found
    assert refused.reason.endswith("(com.microsoft.FusedConv) applies Relu after the sum")


def of_onnx(body: str) -> Callable[[], Graph]:
    return lambda: graph_of("(float[N,4] x) => (float[N,m] y)", body, {"w": (4, 5)})


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(4, 3, bias=False),
        lambda: Product(lambda x, w, b: x @ w),
        lambda: Product(lambda x, w, b: torch.relu(x @ w)),
        of_onnx("y = MatMul(x, w)"),
        of_onnx("z = MatMul(x, w) y = Relu(z)"),
        of_onnx("y = Gemm(x, w)"),
        lambda: convolution("Conv", (2, 4, 1), (3, 4, 1), {"group": 1}, bias=False),
    ],
)
def test_a_bias_is_given_and_taken(make: Callable[[], nn.Module | Graph]) -> None:
    made = make()
    graph = made if isinstance(made, Graph) else capture(made, torch.randn(2, 4))
    x = torch.ones_like(graph.example_inputs[0][0])
    text, names = graph.text(), set(graph.module.state_dict())
    output = graph.run(x)
    with_bias = only(graph).with_bias(graph)
    graph.module.recompile()
    assert with_bias.bias is not None
    assert set(graph.module.state_dict()) - names == {with_bias.bias}
    assert with_bias.bias.startswith(("bias", "w_bias"))
    assert torch.equal(graph.run(x), output)
    assert only(graph).bias == with_bias.bias
    graph.set_tensor(with_bias.bias, nn.Parameter(torch.ones_like(graph.tensor(with_bias.bias))))
    assert not torch.equal(graph.run(x), output)
    with_bias.without_bias(graph)
    graph.module.recompile()
    assert (graph.text(), set(graph.module.state_dict())) == (text, names)


class Experts(nn.Module):
    """Experts side by side in one weight, each applied to the rows that are sorted to it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 16, 8, dtype=torch.bfloat16))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(x, self.weight, offs=ends)


def test_experts_side_by_side_are_refused() -> None:
    inputs = torch.randn(4, 16, dtype=torch.bfloat16), torch.tensor([2, 4], dtype=torch.int32)
    found, (refused,) = find_consumers(capture(Experts(), inputs))
    assert not found
    assert refused.tensor == "weight"
    assert "is an operator that this pass does not take apart" in refused.reason
