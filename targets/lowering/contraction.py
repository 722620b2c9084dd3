"""Translate operators that multiply and sum: linear layers, convolutions, products, einsum, attention, experts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from graphopt.dialects.aten.common import overloads
from graphopt.errors import UnsupportedOperatorError
from graphopt.graph import Call, TensorSpec, tensor_spec
from graphopt.targets.lowering.elementwise import Translation, result
from graphopt.targets.lowering.emitter import Emitter, Value, out_spec

aten = torch.ops.aten


# -- linear layers and matrix products --


def _linear(e: Emitter, call: Call) -> Value:
    """Translate ``x w^T + b``: one ``Gemm`` for two dimensions, else ``MatMul`` on the transposed weight."""
    x, weight, bias = e[call["input"]], e[call["weight"]], e.optional(call["bias"])
    if len(call.spec("input").shape) == 2 and len(call.spec("weight").shape) == 2:
        return e("Gemm", x, weight, bias, transB=1)
    if len(call.spec("weight").shape) == 1:
        found = e("MatMul", x, weight)
    else:
        found = e("MatMul", x, transposed(e, call["weight"]))
    return found if bias is None else e("Add", found, bias)


def transposed(e: Emitter, weight: fx.Node) -> str:
    """Return a matrix transposed.

    A weight that nothing else reads is stored so; one that is shared (a tied embedding) is transposed by a node, which
    runtimes fold when they load the file, so that it is stored once.
    """
    name = e[weight]
    known = e.known(name)
    if known is None or not _only_transposed(weight):
        return e("Transpose", name, perm=[1, 0])
    return e.derived(name, ".T", lambda tensor: tensor.t())


def _only_transposed(weight: fx.Node) -> bool:
    def of_three(user: fx.Node) -> bool:
        if user.target is not aten.linear.default:
            return False
        call = Call(user)
        return call["weight"] is weight and call["bias"] is not weight and len(call.spec("input").shape) != 2

    return all(of_three(user) for user in weight.users)


def _matmul(e: Emitter, call: Call) -> Value:
    a, b = call.node.args[:2]
    return e("MatMul", e[a], e[b])


def _addmm(e: Emitter, call: Call) -> Value:
    """Translate ``beta * c + alpha * a b``."""
    c, a, b = (e[n] for n in call.node.args[:3])
    alpha, beta = call["alpha"], call["beta"]
    spec = out_spec(call.node)
    if len(spec.shape) == 2 and len(tensor_spec(call.node.args[0]).shape) <= 2 and spec.dtype.is_floating_point:
        return e("Gemm", a, b, c, alpha=float(alpha), beta=float(beta))
    product = e("MatMul", a, b)
    if alpha != 1:
        product = e("Mul", product, e.constant(alpha, spec.dtype))
    if beta == 0:
        return product
    return e("Add", c if beta == 1 else e("Mul", c, e.constant(beta, spec.dtype)), product)


def _outer(e: Emitter, call: Call) -> Value:
    a, b = call.node.args[:2]
    return e("Mul", e.unsqueeze(e[a], 1), e[b])


def _einsum(e: Emitter, call: Call) -> Value:
    equation = call["equation"].replace(" ", "")
    return e("Einsum", *(e[n] for n in call["tensors"]), equation=equation)


# -- convolutions --


def _convolution(e: Emitter, call: Call) -> Value:
    spec, weight = call.spec("input"), call.spec("weight")
    spatial = len(weight.shape) - 2
    transposed_ = bool(call["transposed"]) if call.has("transposed") else "transpose" in call.name
    x = e[call["input"]]
    batched = len(spec.shape) == spatial + 2
    x = x if batched else e.unsqueeze(x, 0)
    padding = call["padding"]
    attributes: dict[str, Any] = {
        "dilations": _each(call["dilation"], spatial),
        "group": call["groups"],
        "kernel_shape": list(weight.shape[2:]),
        "strides": _each(call["stride"], spatial),
    }
    if isinstance(padding, str):
        attributes["pads"] = _named_padding(padding, weight.shape[2:], attributes["dilations"])
    else:
        attributes["pads"] = _each(padding, spatial) * 2
    if transposed_:
        attributes["output_padding"] = _each(call["output_padding"], spatial)
    found = e("ConvTranspose" if transposed_ else "Conv", x, e[call["weight"]], e.optional(call["bias"]), **attributes)
    return found if batched else e.squeeze(found, 0)


def _each(value: Any, count: int) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return values * count if len(values) == 1 else values


def _named_padding(name: str, kernel: tuple[int, ...], dilation: list[int]) -> list[int]:
    """Return begins, then ends. "same" puts the odd one at the end."""
    if name == "valid":
        return [0] * (2 * len(kernel))
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return [t // 2 for t in totals] + [t - t // 2 for t in totals]


# -- attention --


def _attention(e: Emitter, call: Call) -> Value:
    """Translate ``softmax(scale * q k^T + mask) v`` to matrix products and a softmax, for any number of dimensions.

    Plain products are what every runtime optimises; ONNX Runtime's own kernel for the operator ``Attention`` of later
    opsets is no faster. With ``enable_gqa`` the queries of one key head are laid one after another, ``(…, kv heads,
    queries per head * length, width)``, so that keys and values are not repeated. A row that the mask leaves nothing
    yields zeros, as in torch.
    """
    q, k, v = (call.spec(name) for name in ("query", "key", "value"))
    query, key, value = (e[call[name]] for name in ("query", "key", "value"))
    rank, dtype = len(q.shape), q.dtype
    scale = call["scale"]
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    query = e("Mul", query, e.operand(scale, dtype))
    grouped = bool(call["enable_gqa"]) and q.shape[-3] != k.shape[-3]
    lengths = [e.extent(e[call["query"]], q, -2), e.extent(e[call["key"]], k, -2)]
    if grouped:
        lead = e.shape(e[call["query"]], q)[:-3]
        per_head = q.shape[-3] // k.shape[-3]
        merged = [*lead, k.shape[-3], _times(e, per_head, lengths[0]), q.shape[-1]]
        query = e.reshape(query, q, merged)
    order = [*range(len(k.shape) - 2), len(k.shape) - 1, len(k.shape) - 2]
    scores = e("MatMul", query, e.transpose(key, order))
    if grouped:
        whole = TensorSpec((*q.shape[:-1], k.shape[-2]), dtype, (*q.dynamic[:-1], k.dynamic[-2]))
        scores = e.reshape(scores, whole, [*lead, q.shape[-3], *lengths])
    weights = _softmax_under_mask(e, call, scores, lengths, dtype, rank)
    if grouped:
        weights = e.reshape(weights, whole, [*lead, k.shape[-3], _times(e, per_head, lengths[0]), lengths[1]])
    found = e("MatMul", weights, value)
    if grouped:
        result_spec = out_spec(call.node)
        found = e.reshape(found, result_spec, [*lead, q.shape[-3], lengths[0], v.shape[-1]])
    return found


def _times(e: Emitter, factor: int, size: int | str) -> int | str:
    return factor * size if isinstance(size, int) else e("Mul", size, e.constant([factor], torch.int64))


def _softmax_under_mask(
    e: Emitter, call: Call, scores: str, lengths: list[int | str], dtype: torch.dtype, rank: int
) -> str:
    mask = call["attn_mask"]
    if mask is None and not call["is_causal"]:
        return e("Softmax", scores, axis=rank - 1)
    if mask is None:
        return e("Softmax", _causal(e, scores, lengths, dtype), axis=rank - 1)
    spec, name = tensor_spec(mask), e[mask]
    known = e.known(name)
    if spec.dtype is torch.bool:
        if known is not None:
            full = bool(known.any(-1).all())
            added = e.derived(name, ".added", lambda m: torch.zeros(m.shape, dtype=dtype).masked_fill(~m, -math.inf))
            if full:
                return e("Softmax", e("Add", scores, added), axis=rank - 1)
        lowest = e.constant(torch.finfo(dtype).min, dtype)
        weights = e("Softmax", e("Where", name, scores, lowest), axis=rank - 1)
        return e("Where", name, weights, e.zero(dtype))
    weights = e("Softmax", e("Add", scores, e.cast(name, spec.dtype, dtype)), axis=rank - 1)
    if known is not None and bool((known > -math.inf).any(-1).all()):
        return weights
    return e("Where", e("IsNaN", weights), e.zero(dtype), weights)


def _causal(e: Emitter, scores: str, lengths: list[int | str], dtype: torch.dtype) -> str:
    """Leave each query the keys up to its own position, counted from the first of both."""
    rows, columns = lengths
    if isinstance(rows, int) and isinstance(columns, int):
        mask = torch.zeros(rows, columns, dtype=dtype).masked_fill(torch.ones(rows, columns).triu(1) > 0, -math.inf)
        return e("Add", scores, e.constant(mask))
    zero, one = e.constant(0, torch.int64), e.constant(1, torch.int64)
    first = e("Range", zero, e.squeeze(e.size(rows), 0), one)
    second = e("Range", zero, e.squeeze(e.size(columns), 0), one)
    seen = e("GreaterOrEqual", e.unsqueeze(first, 1), second)
    return e("Where", seen, scores, e.constant(-math.inf, dtype))


# -- experts --


def _grouped_mm(e: Emitter, call: Call) -> Value:
    """Translate rows, sorted by expert, times each its expert's matrix: ``(s, k), (experts, k, n) -> (s, n)``.

    The rows are split where ``offsets``, the running count of rows, says, and each part is multiplied with one
    expert's matrix. That is exact for any number of rows, empty parts included, and costs the multiply-adds of the
    original; the file has one product an expert. Rows after the last offset belong to no expert and yield zeros.
    """
    x, weight, offsets = (n for n in call.node.args if isinstance(n, fx.Node))
    rows, matrices = tensor_spec(x), tensor_spec(weight)
    if len(rows.shape) != 2 or len(matrices.shape) != 3:
        raise UnsupportedOperatorError(
            f"a grouped product of shapes {list(rows.shape)} and {list(matrices.shape)}; only rows times a stack of "
            "matrices is supported"
        )
    experts = matrices.shape[0]
    ends = e.cast(e[offsets], tensor_spec(offsets).dtype, torch.int64)
    total = e.size(e.extent(e[x], rows, 0))
    edges = e("Concat", e.constant([0], torch.int64), ends, total, axis=0)
    counts = e("Sub", e.slice(edges, 0, 1, experts + 2), e.slice(edges, 0, 0, experts + 1))
    parts = e.several("Split", experts + 1, e[x], counts, axis=0)
    products = [e("MatMul", part, each) for part, each in zip(parts, _matrices(e, weight, experts), strict=False)]
    rest = e.expand(e.zero(rows.dtype), [e.size(e.slice(counts, 0, experts, experts + 1)), matrices.shape[2]])
    return result(e, call, e("Concat", *products, rest, axis=0), rows.dtype)


def _matrices(e: Emitter, weight: fx.Node, experts: int) -> list[str]:
    """Return one matrix an expert: constants of their own where the stack is one, seen through a transposition."""
    source, swapped = weight, False
    if weight.op == "call_function" and weight.target is aten.transpose.int:
        call = Call(weight)
        if {call["dim0"] % 3, call["dim1"] % 3} == {1, 2} and e.known(e[call["self"]]) is not None:
            source, swapped = call["self"], True
    name = e[source]
    if e.known(name) is None:
        return [e.squeeze(e.slice(name, 0, i, i + 1), 0) for i in range(experts)]

    def matrix(i: int) -> str:
        return e.derived(name, f".{i}", lambda stack: stack[i].t() if swapped else stack[i])

    return [matrix(i) for i in range(experts)]


def _table(translation: Translation, *names: str) -> dict[Any, Translation]:
    return dict.fromkeys(overloads(*names), translation)


TRANSLATIONS: dict[Any, Translation] = {
    aten.linear.default: _linear,
    **_table(_matmul, "matmul.default", "mm.default", "bmm.default", "mv.default", "dot.default", "vdot.default"),
    **_table(_matmul, "linalg_matmul.default"),
    **_table(_addmm, "addmm.default", "baddbmm.default", "addmv.default"),
    **_table(_outer, "outer.default", "ger.default"),
    aten.einsum.default: _einsum,
    **_table(_convolution, "conv1d", "conv2d", "conv3d", "convolution.default"),
    **_table(_convolution, "conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input"),
    aten.scaled_dot_product_attention.default: _attention,
}


def late_translations() -> dict[Any, Translation]:
    """Return entries for custom operators of libraries that happen to be imported."""
    found: dict[Any, Translation] = {}
    for namespace, name in (("transformers", "grouped_mm_fallback"), ("aten", "_grouped_mm")):
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if packet is not None:
            found[packet.default] = _grouped_mm
    return found
