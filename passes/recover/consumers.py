"""Find the layers that multiply their input with a parameter, and see each as rows times a matrix.

What may live here: what the passes of this folder have in common: the layers, what of their inputs and outputs is left,
their bias, and the calibration data. What is done about what was lost is for the passes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from graphopt.dialects import infer
from graphopt.dialects.onnx.operators import Op, op
from graphopt.dialects.products import Product, Windows, operator_key, product_of
from graphopt.editing import add_tensor, find_tensor, insert, read, readers, remove_tensor, replace, replace_tensor
from graphopt.errors import PipelineError
from graphopt.graph import Call, Graph, tensor_spec
from graphopt.importance.calibration import batches
from graphopt.moments import Moments
from graphopt.report.wording import listing
from graphopt.sweep import Inputs, Sweep, lockstep

if TYPE_CHECKING:
    from graphopt.axes.algebra import Indices
    from graphopt.axes.infer import Typing
    from graphopt.pipeline import Context, Reference
    from graphopt.plan import Plan

__all__ = [
    "Consumer",
    "Layer",
    "Refusal",
    "calibration_inputs",
    "find_consumers",
    "paired",
    "relative",
    "rework",
    "sharing",
    "tolerance",
]

aten = torch.ops.aten

_OTHERS: Final = frozenset({aten.einsum.default, aten.bilinear.default, "Einsum"})
_TURNS: Final = frozenset({aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default, "Transpose"})
_SUMS: Final = frozenset({aten.add.Tensor, "Add"})


@dataclass(frozen=True, slots=True)
class Refusal:
    """Say why a layer is none that a pass can work on."""

    node: fx.Node
    tensor: str
    reason: str


@dataclass(frozen=True)
class Consumer:
    """View one layer as ``y = A Mᵀ + b``, group by group.

    With g groups, A is ``(g, samples, inputs/g · taps)`` and M ``(g, outputs/g, inputs/g · taps)``; a linear layer has
    one group and one tap. A sample is one position of the output without its channels: a row of a linear layer's
    input, or an output pixel. Of a convolution, A holds the patch under the kernel, zeros of the padding among it; of
    a transposed one, the patch of the input that was spread out by the stride, with the kernel turned round.

    Attributes:
        product: What the layer's call multiplies.
        weight: The name of its weight.
        turned: Whether what multiplies reads the stored weight with its two dimensions exchanged.
        bias: The name of its bias; None where it has none.
        add: The node that adds the bias, where that is not the call itself.
    """

    product: Product
    weight: str
    turned: bool
    bias: str | None = None
    add: fx.Node | None = None

    @property
    def node(self) -> fx.Node:
        """The call."""
        return self.product.node

    @property
    def windows(self) -> Windows | None:
        """How a convolution slides over places; None for a linear layer."""
        return self.product.windows

    @property
    def is_transposed(self) -> bool:
        """Say whether it is a transposed convolution, whose weight is ``(inputs, outputs/g, taps)``."""
        return self.windows is not None and self.windows.transposed

    @property
    def groups(self) -> int:
        """How many groups the channels are divided into."""
        return self.product.groups

    @property
    def input(self) -> fx.Node:
        """The node whose value is multiplied."""
        return self.product.left

    @property
    def channel(self) -> int:
        """The dimension of input and output that holds the channels, from the end."""
        return -1 - self._extents

    @property
    def outputs(self) -> int:
        """How many channels the output has."""
        return tensor_spec(self.node).shape[self.channel]

    @property
    def unevenness(self) -> str | None:
        """Say where outputs see less of a constant input than elsewhere; None where all see the same."""
        if self.windows is None:
            return None
        if self.is_transposed:
            return "where fewer taps of its kernel meet" if any(n > 1 for n in self.windows.kernel) else None
        places = tensor_spec(self.input).shape[-self._extents :]
        return "where its window reaches into the zero padding" if any(map(any, self.windows.pads(places))) else None

    @property
    def out_rows(self) -> bool:
        """Say whether the stored weight has the outputs in its first dimension."""
        return not self.is_transposed if self.windows is not None else self.turned

    # -- as rows times a matrix --

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the stored weight as ``(g, outputs/g, inputs/g · taps)``."""
        g = self.groups
        if self.is_transposed:
            kernel = weight.unflatten(0, (g, -1)).transpose(1, 2)
            flat: Tensor = kernel.flip(tuple(range(3, kernel.dim()))).flatten(2)
            return flat
        found: Tensor = (weight if self.out_rows else weight.mT).unflatten(0, (g, -1)).flatten(2)
        return found

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Return the weight, in the layout and the type of ``like``, that :meth:`matrix` returns ``matrix`` for."""
        if self.is_transposed:
            kernel = matrix.unflatten(2, (-1, *like.shape[2:]))
            found: Tensor = kernel.flip(tuple(range(3, kernel.dim()))).transpose(1, 2).flatten(0, 1)
        else:
            flat = matrix.flatten(0, 1)
            found = (flat if self.out_rows else flat.mT).reshape(like.shape)
        return found.to(like.dtype).contiguous()

    def patches(self, x: Tensor) -> Tensor:
        """Return the rows of A as a view, ``(…, inputs, *taps)``, the leading dimensions being those of the output."""
        return x if self.windows is None else self.windows.patches(x)

    def take(self, patches: Tensor, picked: Tensor) -> Tensor:
        """Return the rows of A that ``picked`` counts among the samples, ``(g, len(picked), inputs/g · taps)``."""
        lead = patches.shape[: patches.dim() - 1 - self._extents]
        rows = patches[tuple(torch.unravel_index(picked, lead))] if lead else patches[None]
        found: Tensor = rows.unflatten(1, (self.groups, -1)).flatten(2).transpose(0, 1)
        return found

    def samples(self, y: Tensor) -> Tensor:
        """Return an output as ``(samples, outputs)``."""
        last = y.movedim(self.channel, -1)
        return last.reshape(-1, last.shape[-1])

    def grouped(self, samples: Tensor) -> Tensor:
        """Return ``(samples, outputs)`` as ``(g, samples, outputs/g)``."""
        found: Tensor = samples.unflatten(1, (self.groups, -1)).transpose(0, 1)
        return found

    # -- running --

    def results(self, sweep: Sweep) -> Iterator[Tensor]:
        """Yield the layer's output for each batch, bias included; the sweep is at its call."""
        for y in sweep.results(self.node):
            yield y if self.add is None else y + sweep.value(self._added, 0)

    def applied(self, x: Tensor, graph: Graph) -> Tensor:
        """Return the layer's output for another input than the graph's, with the tensors of ``graph``."""
        weight = graph.tensor(self.weight).detach()
        bias = None if self.bias is None else graph.tensor(self.bias).detach()
        if self.windows is None:
            return functional.linear(x, weight if self.out_rows else weight.mT, bias)
        given: dict[fx.Node, Any] = {self.input: x, self.product.right: weight}
        if self.product.bias is not None:
            given[self.product.bias] = bias
        args = fx.node.map_arg(self.node.args, given.__getitem__)
        kwargs = fx.node.map_arg(self.node.kwargs, given.__getitem__)
        found: Tensor = self.node.target(*args, **kwargs)  # type: ignore[operator]  # a call's target can be called
        return found

    # -- the bias --

    def with_bias(self, graph: Graph) -> Consumer:
        """Give the layer a bias of zeros, a new parameter, where it has none."""
        if self.bias is not None:
            return self
        weight = graph.tensor(self.weight)
        size = self.outputs
        zeros = nn.Parameter(torch.zeros(size, dtype=weight.dtype, device=weight.device), weight.requires_grad)
        name = add_tensor(graph, _bias_name(self.weight), zeros, sources={})
        if self.product.slot is not None:
            node = read(graph, name, self.node)
            Call(self.node)[self.product.slot] = node
            return dataclasses.replace(self, product=dataclasses.replace(self.product, bias=node), bias=name)
        following = self.node.next
        target: Any = op("Add") if isinstance(self.node.target, Op) else aten.add.Tensor
        add = insert(graph, following, target, (self.node, read(graph, name, following)), like=self.node)
        replace(self.node, add)
        return dataclasses.replace(self, bias=name, add=add)

    def without_bias(self, graph: Graph) -> None:
        """Take away the bias that :meth:`with_bias` gave."""
        assert self.bias is not None
        if self.add is None:
            assert self.product.slot is not None
            assert self.product.bias is not None
            node = self.product.bias
            Call(self.node).leave_out(self.product.slot)
        else:
            node = self._added
            replace(self.add, self.node)
            graph.module.graph.erase_node(self.add)
        graph.module.graph.erase_node(node)
        remove_tensor(graph, self.bias)

    # -- details --

    @property
    def _added(self) -> fx.Node:
        """The node that reads the bias which a sum of its own adds."""
        assert self.add is not None
        first, second = self.add.args[:2]
        found = second if first is self.node else first
        assert isinstance(found, fx.Node)
        return found

    @property
    def _extents(self) -> int:
        return len(self.windows.kernel) if self.windows is not None else 0


# -- finding --------------------------------------------------------------------------------------------------------


def find_consumers(graph: Graph) -> tuple[dict[str, Consumer], list[Refusal]]:
    """Return the layers of a graph by the name of their node, in order, and what multiplies in a way not known here."""
    found: dict[str, Consumer] = {}
    refused: list[Refusal] = []
    origins: dict[fx.Node, str | None] = {}
    for node in graph.nodes:
        origins[node] = _origin(graph, node, origins)
        if node.op != "call_function" or (operand := _weight_operand(node, origins)) is None:
            continue
        each = _read(graph, node, operand, str(origins[operand]))
        if isinstance(each, Consumer):
            found[node.name] = each
        elif each is not None:
            refused.append(each)
    return found, refused


def _origin(graph: Graph, node: fx.Node, origins: Mapping[fx.Node, str | None]) -> str | None:
    """Return the parameter that a node follows from; None where it follows from an input, or from no parameter."""
    if node.op == "get_attr":
        found = find_tensor(graph, str(node.target))
        return str(node.target) if isinstance(found, nn.Parameter) else None
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    before = [origins[n] for n in node.all_input_nodes]
    return before[0] if all(before) else None


def _weight_operand(node: fx.Node, origins: Mapping[fx.Node, str | None]) -> fx.Node | None:
    """Return the operand that stands where a weight stands, if it follows from a parameter."""
    if _is_other(node):
        return next((n for n in node.all_input_nodes if origins[n] is not None), None)
    product = product_of(node)
    if product is None:
        return None
    from_right = product.is_linear or origins[product.right] is not None
    found = product.right if from_right else product.left
    return found if origins[found] is not None else None


def _read(graph: Graph, node: fx.Node, operand: fx.Node, origin: str) -> Consumer | Refusal:
    """Return the layer that ``node`` is, whose weight is ``operand`` and follows from the parameter ``origin``."""
    product = product_of(node)
    rank = len(tensor_spec(operand).shape)
    if product is None or _is_other(node):
        return Refusal(node, origin, f"{_words(node)} is an operator that this pass does not take apart")
    traced = _stored(operand)
    if traced is None:
        return Refusal(node, origin, f"the weight of {node.name} is computed by {operand.name}, and is no parameter")
    weight, turned = traced
    reason = _unlike_a_layer(product, operand, rank)
    if reason is not None:
        return Refusal(node, weight, f"{_words(node)} {reason}")
    found = Consumer(product, weight, turned != product.turned[1])
    if product.bias is None:
        return found if product.slot is not None else _with_attached_bias(graph, found)
    name = _plain(graph, product.bias)
    if name is None:
        return Refusal(
            node, weight, f"the bias of {node.name} is computed by {product.bias.name} and is no parameter by itself"
        )
    return dataclasses.replace(found, bias=name)


def _unlike_a_layer(product: Product, weight: fx.Node, rank: int) -> str | None:
    """Say why a product with a parameter is no layer; None if it is one."""
    if weight is product.left:
        return "multiplies with it from the left, along other places than channels"
    if product.windows is None and rank != 2:
        return f"has a weight of {rank} dimensions; a linear layer's has 2"
    if product.turned[0]:
        return "reads its input turned, its channels along the rows"
    if product.then is not None:
        return f"{product.then} after the sum"
    if product.scale != 1 or product.bias_scale != 1:
        return f"scales its terms (alpha {product.scale:g}, beta {product.bias_scale:g})"
    return None


def _is_other(node: fx.Node) -> bool:
    """Say whether a node multiplies in another way than a layer: a contraction of its own, or experts side by side."""
    return operator_key(node) in _OTHERS or "grouped_mm" in str(node.target)


def _stored(node: fx.Node) -> tuple[str, bool] | None:
    """Return the tensor that a node reads, and whether its two dimensions are exchanged; None for anything else."""
    turned = False
    while node.op == "call_function":
        if operator_key(node) not in _TURNS or len(tensor_spec(node).shape) != 2:
            return None
        call = Call(node)
        dims = (1, 0)
        if node.target is aten.permute.default:
            dims = call["dims"]
        elif node.target is aten.transpose.int:
            dims = (1, 0) if (call["dim0"] - call["dim1"]) % 2 else (0, 1)
        elif isinstance(node.target, Op):
            dims = call["perm"] or dims
        turned ^= [d % 2 for d in dims] == [1, 0]
        node = node.args[0]  # type: ignore[assignment]  # what is turned is a node
    return (str(node.target), turned) if node.op == "get_attr" else None


def _plain(graph: Graph, node: Any) -> str | None:
    """Return the name of a parameter with one dimension that ``node`` reads as it is."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    tensor = graph.tensor(str(node.target))
    return str(node.target) if isinstance(tensor, nn.Parameter) and tensor.dim() == 1 else None


def _with_attached_bias(graph: Graph, consumer: Consumer) -> Consumer:
    """Take the sum that follows a product for its bias, where one of its terms is a parameter of the output's width."""
    node = consumer.node
    user = next(iter(node.users), None)
    if len(node.users) != 1 or user is None or operator_key(user) not in _SUMS or user.kwargs.get("alpha", 1) != 1:
        return consumer
    other = user.args[1] if user.args[0] is node else user.args[0]
    name = _plain(graph, other)
    if name is None or graph.tensor(name).shape[0] != tensor_spec(node).shape[-1]:
        return consumer
    return dataclasses.replace(consumer, bias=name, add=user)


def _words(node: fx.Node) -> str:
    return f"{node.name} ({node.target})"


def _bias_name(weight: str) -> str:
    """Return the name of a layer's bias after that of its weight."""
    *path, last = weight.split(".")
    return ".".join([*path, last.replace("weight", "bias") if "weight" in last else f"{last}_bias"])


# -- before and after pruning -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """Pair a layer with what it was before indices were removed.

    Attributes:
        name: What reports call it: its weight, and its node where the weight has several readers.
        dense: The layer in the reference.
        pruned: The layer in the graph.
        inputs: The positions of the dense input's channels that are left; None for all.
        outputs: The same of the output's channels.
        kept: The positions of the dense weight that are left, by dimension.
        rows: Of the dense input's and of the dense output's other dimensions, the positions that are left: a layer that
            mixes tokens is applied once a channel, and channels may be gone.
    """

    name: str
    dense: Consumer
    pruned: Consumer
    inputs: Tensor | None
    outputs: Tensor | None
    kept: Mapping[int, Indices]
    rows: tuple[Mapping[int, Tensor], Mapping[int, Tensor]] = ({}, {})

    @property
    def width(self) -> int:
        """How many outputs are left."""
        return self.pruned.outputs

    def weight_before(self, reference: Reference) -> Tensor:
        """Return what is left of the weight that the layer had in the reference."""
        found = reference.graph.tensor(self.dense.weight).detach()
        for dim, indices in self.kept.items():
            found = found.index_select(dim, torch.from_numpy(indices).to(found.device))
        return found

    def with_bias(self, graph: Graph) -> Layer:
        """Give the pruned layer a bias of zeros, where it has none."""
        return dataclasses.replace(self, pruned=self.pruned.with_bias(graph))

    def residuals(self, left: Sweep, right: Sweep | None, graph: Graph) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each batch what the dense layer computes in the outputs that are left, and what of it is missing.

        Args:
            left: the walk over the reference, which is at the layer.
            right: the walk over the pruned graph, at the same layer; without it the pruned layer is given the dense
                layer's input, less the channels that it lost.
            graph: the pruned graph.

        Yields:
            Two tensors ``(samples, outputs)``: the dense output, and the dense less the pruned output.
        """
        if right is None:
            inputs = (self._left(x, self.inputs, self.rows[0]) for x in left.values(self.dense.input))
            found: Iterator[Tensor] = (self.pruned.applied(x, graph) for x in inputs)
        else:
            found = self.pruned.results(right)
        for y, less in zip(self.dense.results(left), found, strict=True):
            expected = self.dense.samples(self._left(y, self.outputs, self.rows[1]))
            yield expected, expected - self.pruned.samples(less)

    def _left(self, value: Tensor, channels: Tensor | None, rows: Mapping[int, Tensor]) -> Tensor:
        """Return what pruning left of a value that the dense layer reads or yields."""
        for dim, kept in rows.items():
            value = _select(value, dim, kept)
        return _select(value, self.dense.channel, channels)


def paired(graph: Graph, reference: Reference) -> tuple[dict[str, Layer], list[Refusal]]:
    """Return the layers by the name of their node, in order, and those that lost indices but cannot be worked on."""
    before, _ = find_consumers(reference.graph)
    after, refused = find_consumers(graph)
    lost = reference.plan.keep
    refused = [each for each in refused if each.tensor in lost]
    reads = Counter(each.weight for each in after.values())
    layers: dict[str, Layer] = {}
    typing = infer(reference.graph)
    for name, pruned in after.items():
        dense = before.get(name)
        if dense is None or dense.weight != pruned.weight or dense.node.target is not pruned.node.target:
            if pruned.weight in lost:
                refused.append(Refusal(pruned.node, pruned.weight, f"before pruning, {name} was another layer"))
            continue
        inputs, outputs = _kept(dense, reference.plan)
        sizes = _width(dense, inputs, outputs), _width(pruned, None, None)
        if sizes[0] != sizes[1]:
            why = f"pruning should leave {name} with {sizes[0]} inputs and outputs, and left it with {sizes[1]}"
            refused.append(Refusal(pruned.node, pruned.weight, why))
            continue
        rows = tuple(
            _rows_left(reference, typing, *pair, dense.channel)
            for pair in ((dense.input, pruned.input), (dense.node, pruned.node))
        )
        if rows[0] is None or rows[1] is None:
            why = f"indices along which {name} is applied were removed, and not as those of a single parameter"
            refused.append(Refusal(pruned.node, pruned.weight, why))
            continue
        label = pruned.weight if reads[pruned.weight] == 1 else f"{pruned.weight} in {name}"
        layers[name] = Layer(label, dense, pruned, inputs, outputs, lost.get(dense.weight, {}), (rows[0], rows[1]))
    return layers, refused


def _width(layer: Consumer, inputs: Tensor | None, outputs: Tensor | None) -> tuple[int, int]:
    """Return how many input and output channels a layer has, or has left."""
    nodes = (layer.input, layer.node)
    first, second = (
        tensor_spec(node).shape[layer.channel] if kept is None else len(kept)
        for node, kept in zip(nodes, (inputs, outputs), strict=True)
    )
    return first, second


def _rows_left(
    reference: Reference, typing: Typing, dense: fx.Node, pruned: fx.Node, channel: int
) -> dict[int, Tensor] | None:
    """Return the positions left of the dimensions other than the channels that lost some; None where none can tell.

    Such a dimension has the axis of the parameter that made it, and that parameter's positions are in the plan.
    """
    before, after = tensor_spec(dense).shape, tensor_spec(pruned).shape
    found: dict[int, Tensor] = {}
    for dim, (size, left) in enumerate(zip(before, after, strict=True)):
        if dim == channel % len(before) or size == left:
            continue
        places = (
            reference.plan.keep[name][d]
            for name, axes in typing.tensors.items()
            for d, axis in enumerate(axes)
            if axis == typing.axes(dense)[dim] and d in reference.plan.keep.get(name, {})
        )
        kept = next(places, None)
        if kept is None or len(kept) != left:
            return None
        found[dim] = torch.from_numpy(kept)
    return found


def _kept(dense: Consumer, plan: Plan) -> tuple[Tensor | None, Tensor | None]:
    """Return what the plan left of a layer's input and output channels."""
    dims = plan.keep.get(dense.weight, {})
    if not dims:
        return None, None
    first, second = (None if d not in dims else torch.from_numpy(dims[d]) for d in (0, 1))
    if dense.groups > 1:
        rows, columns = (size // n for size, n in zip(plan.shapes[dense.weight], (dense.groups, 1), strict=False))
        groups = torch.arange(dense.groups) if first is None else torch.unique(first // rows)
        inside = torch.arange(columns) if second is None else second
        second = (groups[:, None] * columns + inside).flatten()
    return (second, first) if dense.out_rows else (first, second)


def _select(value: Tensor, dim: int, kept: Tensor | None) -> Tensor:
    return value if kept is None else value.index_select(dim, kept.to(value.device))


def rework(
    graph: Graph,
    reference: Reference,
    inputs: list[Inputs],
    chosen: Mapping[str, Layer],
    change: Callable[[Layer, Sweep, Sweep], Mapping[str, Tensor] | None],
    *,
    give_bias: bool = True,
) -> None:
    """Walk the reference and the graph at once, and put new tensors in place of those of the chosen layers.

    Args:
        graph: the pruned graph; it is changed.
        reference: what it was before.
        inputs: the calibration inputs.
        chosen: the layers, by the name of their node.
        change: is called with each layer when both walks have reached it, and what comes before has been changed;
            returns the new tensors by name, or None to leave the layer as it is. It may use :meth:`Layer.residuals`
            again after it told the walk over the graph of a new tensor.
        give_bias: give layers without a bias one of zeros, which stays where it is changed.
    """
    layers = {name: layer.with_bias(graph) if give_bias else layer for name, layer in chosen.items()}
    given = {
        name for name, layer in chosen.items() if layer.pruned.bias is None and layers[name].pruned.bias is not None
    }
    left, right = Sweep(reference.graph, inputs), Sweep(graph, inputs)
    for dense, pruned in lockstep(left, right):
        if dense is None or pruned is None or pruned.name not in layers:
            continue
        layer = layers[pruned.name]
        new = change(layer, left, right)
        for name, tensor in (new or {}).items():
            replace_tensor(graph, name, tensor)
            right.replace(name, tensor)
            if name == layer.pruned.bias:
                given.discard(pruned.name)
    for name in given:
        layers[name].pruned.without_bias(graph)
    graph.module.recompile()


def sharing(graph: Graph, name: str) -> str | None:
    """Say who shares a tensor, so that it cannot be changed for one reader alone; None where nobody does."""
    users = [node.name for node in readers(graph, name)] + graph.names(name)[1:]
    return f"{name} is shared, by {listing(users)}" if len(users) > 1 else None


def relative(squares: Tensor, expected: Moments) -> float:
    """Return the root of mean squares of each output in units of the spread of all outputs: 1 for the mean alone."""
    spread = expected.variance.sum()
    spread = spread if spread > 0 else expected.mean_square.sum()
    return float((squares.sum() / spread).sqrt()) if spread > 0 else float(squares.sum().sqrt())


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative error that counts as round-off in a model of this precision: 2e-5 in float32."""
    return float(torch.finfo(dtype).eps ** (2 / 3))


# -- calibration ------------------------------------------------------------------------------------------------------


def calibration_inputs(name: str, graph: Graph, context: Context) -> list[Inputs]:
    """Return the inputs of every calibration batch.

    Raises:
        PipelineError: there are none.
    """
    found = [] if context.calibration is None else list(batches(context.calibration, graph))
    if not found:
        what = "was given" if context.calibration is None else "holds no batch"
        raise PipelineError(
            f"{name} compares what layers compute before and after pruning, and no calibration data {what}: pass "
            "calibration=[inputs, …] to the call, a few dozen typical inputs; labels are not needed"
        )
    return [(batch.args, batch.kwargs) for batch in found]
