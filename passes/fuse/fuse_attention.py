"""Write attention that is spelled out as the one operator that computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from graphopt.dialects.onnx.facts import is_onnx
from graphopt.dialects.onnx.operators import op
from graphopt.editing import insert, remove_dead, replace
from graphopt.graph import Call, Graph, TensorSpec
from graphopt.passes.canonicalize.orders import Order, composed, inverse, is_plain, reordered
from graphopt.passes.extents import Extents
from graphopt.passes.fuse.opsets import SINCE, offers, require
from graphopt.passes.onnx_calls import is_call, number, only_reader, order_of, tensor_type
from graphopt.pipeline import Context, Pass, PassResult, Preserves, register

SWAPPED: Order = (0, 1, 3, 2)


@register
@dataclass(frozen=True)
class FuseAttention(Pass):
    """Make one operator of scaled dot-product attention that is spelled out, ``softmax(c Q K' + M) V``.

    Queries, keys and values are of shape (batch, heads, positions, channels); the scale c, as a product or a quotient,
    and the mask M, which is added, may be absent. That keys are transposed for the product, together with whatever
    other order of dimensions they come in, is taken off them, and put back where it was not there. Exact up to
    rounding: the operator multiplies queries and keys by √c each.

    Not among the passes that run by default: ONNX Runtime fuses what is spelled out as well, and few runtimes take
    the operator, which is of opset 23.

    Left as they are: products that broadcast batches or heads, masks that do not reach over all keys, and scores or
    probabilities that others read.

    Args:
        raise_opset: let the file declare the least version that has the operator.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1.
    """

    name: ClassVar[str] = "fuse-attention"
    preserves: ClassVar[Preserves] = Preserves.EXACT

    raise_opset: bool = False

    def run(self, graph: Graph, context: Context) -> PassResult:
        if not is_onnx(graph):
            return PassResult(graph)
        for node in list(graph.nodes):
            if not is_call(node, "MatMul") or not is_call(node.args[0], "Softmax"):
                continue
            found = _read(graph, node)
            if isinstance(found, str):
                context.skipped(node.name, found)
            elif not offers(graph, "Attention", raise_opset=self.raise_opset):
                context.skipped(node.name, f"Attention is there from opset {SINCE['Attention']} on (raise_opset)")
            elif context.allows(node.name):
                require(graph, "Attention")
                _fuse(graph, node, found)
                context.applied(node.name, f"attention of {found.query.name} to {found.keys.name}", scale=found.scale)
        remove_dead(graph)
        graph.module.recompile()
        return PassResult(graph)


@dataclass(frozen=True)
class _Found:
    """Queries, transposed keys, values, the mask and the scale of an attention."""

    query: fx.Node
    keys: fx.Node
    value: fx.Node
    mask: fx.Node | None
    scale: float


def _read(graph: Graph, end: fx.Node) -> _Found | str:
    """Return the attention that a product with values ends, or why it is none that the operator computes."""
    weights, value = end.args[:2]
    spec = tensor_type(weights)
    if spec is None or not isinstance(weights, fx.Node) or not isinstance(value, fx.Node):
        return "its operands are no tensors"
    if len(spec.shape) != 4 or Call(weights)["axis"] not in (-1, 3):
        return f"{weights.name} is not over the last of four dimensions"
    scores, mask, inner = weights.args[0], None, [weights]
    if is_call(scores, "Add"):
        inner.append(scores)  # type: ignore[arg-type]
        scores, mask = _with_mask(graph, scores)  # type: ignore[arg-type]
    scale = 1.0
    if (scaled := _scaled(graph, scores)) is not None:
        inner.append(scores)  # type: ignore[arg-type]
        scores, scale = scaled
    if not is_call(scores, "MatMul"):
        return f"{getattr(scores, 'name', scores)} is no product of queries and keys"
    inner.append(scores)  # type: ignore[arg-type]
    read = next((each for each in inner if not only_reader(each, {end, *inner})), None)
    if read is not None:
        return f"others read {read.name}"
    if scale <= 0:
        return f"a scale of {scale:g} has no root"
    query: Any = scores.args[0]  # type: ignore[union-attr]
    keys: Any = scores.args[1]  # type: ignore[union-attr]
    why = _why_not(query, keys, value, mask, scores)
    return why if why is not None else _Found(query, keys, value, mask, scale)


def _with_mask(graph: Graph, total: fx.Node) -> tuple[Any, Any]:
    """Return scores and mask of a sum."""
    for scores, mask in (total.args[:2], total.args[1::-1]):
        if is_call(scores, "MatMul") or _scaled(graph, scores) is not None:
            return scores, mask
    return total, None


def _scaled(graph: Graph, value: Any) -> tuple[fx.Node, float] | None:
    """Return which product a value is how many times."""
    if is_call(value, "Div"):
        factor = number(graph, value.args[1])
        return (value.args[0], 1 / factor) if factor and is_call(value.args[0], "MatMul") else None
    if not is_call(value, "Mul"):
        return None
    for product, other in (value.args[:2], value.args[1::-1]):
        factor = number(graph, other)
        if factor is not None and is_call(product, "MatMul"):
            return product, factor
    return None


def _why_not(query: Any, keys: Any, value: Any, mask: Any, scores: Any) -> str | None:
    specs = [tensor_type(each) for each in (query, keys, value)]
    if any(spec is None or len(spec.shape) != 4 for spec in specs):
        return "queries, keys or values are not of four dimensions"
    extents = Extents()
    sizes = [extents.shape(each) for each in (query, keys, value)]
    if len({size[:2] for size in sizes}) != 1:
        return f"batches or heads of {query.name}, {keys.name} and {value.name} differ"
    if mask is None:
        return None
    held, whole = tensor_type(mask), tensor_type(scores)
    if held is None or whole is None or held.dtype is not whole.dtype or len(held.shape) not in (2, 3, 4):
        return f"{getattr(mask, 'name', mask)} is no mask of as many dimensions"
    if extents(mask, -1) != extents(scores, -1):
        return f"{mask.name} does not reach over all keys"
    return None


def _fuse(graph: Graph, end: fx.Node, found: _Found) -> None:
    operands = [found.query, _keys(graph, found.keys, end), found.value]
    if found.mask is not None:
        operands.append(found.mask)
    new = insert(graph, end, op("Attention"), tuple(operands), {"scale": found.scale}, like=end)
    replace(end, new)


def _keys(graph: Graph, transposed: fx.Node, before: fx.Node) -> fx.Node:
    """Return the keys as the operator reads them, positions before channels."""
    order, source = order_of(transposed), transposed
    joined = SWAPPED
    if order is not None:
        joined, source = composed(order, SWAPPED), transposed.args[0]  # type: ignore[assignment]
    if is_plain(joined):
        return source
    spec = tensor_type(source)
    assert isinstance(spec, TensorSpec)
    made = reordered(spec, inverse(joined))
    return insert(graph, before, op("Transpose"), (source,), {"perm": list(joined)}, like=source, spec=made)
