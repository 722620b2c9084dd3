"""Merge parallel branches that are summed into one convolution or linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, fx

from graphopt.aliases import root, source, written
from graphopt.dialects.layers import Norm, norm_of
from graphopt.dialects.onnx.operators import Op
from graphopt.dialects.products import operator_key
from graphopt.editing import add_tensor, insert, read, remove_dead, replace
from graphopt.graph import Call, Graph, Source, Sources, spec_of, tensor_spec
from graphopt.passes.affine import (
    Affine,
    Geometry,
    expanded,
    insert_layer,
    joint_name,
    made_of,
    overwritten,
    read_affine,
    read_layer,
    saving,
    unavailable,
)
from graphopt.pipeline import Context, Pass, PassResult, Preserves, register
from graphopt.report.wording import listing

aten = torch.ops.aten

SUMS: Final = frozenset({aten.add.Tensor, aten.add_.Tensor, "Add"})


@register
@dataclass(frozen=True)
class MergeBranches(Pass):
    """Merge the branches of a sum that read the same input into one convolution, or one linear layer.

    A branch is a convolution; the input itself, a convolution with the kernel ``delta[o, i]`` of extent one; or a batch
    norm of the input, with ``s = weight / sqrt(running_var + eps)`` the kernel ``s[o] delta[o, i]`` and the bias
    ``bias - running_mean s``. Convolutions add up tap by tap:

        sum_j (W_j * x + b_j) = (sum_j W_j) * x + sum_j b_j.

    A kernel with extent k, dilation d and padding p has taps at the offsets ``-p, -p + d, ..., -p + d (k - 1)`` from
    where an output stands. The merged kernel reaches from the smallest to the largest offset of all branches, in steps
    of the greatest common divisor of all distances; where a branch has no tap, it adds 0. All branches yield the same
    places only if their strides are equal and so are their centres, ``2 p - d (k - 1)``: a 1x1 kernel fits the centre
    of a k x k kernel if that pads by ``k // 2``. Groups fall to those all branches have in common; the input itself has
    as many groups as channels. Zero padding pads every branch alike, so borders are right. Exact up to rounding; sums
    are formed in float64.

    Merged where the one operator needs no more multiply-adds and parameters than the branches. Batch norms behind a
    convolution belong into it first (fold-batch-norm).

    Args:
        fold_batch_norms: merge batch norms of the input, too, with their running statistics. In training they would
            use those of the batch, so a model that will be trained keeps them.

    Source: Ding et al. 2021, arXiv:2101.03697 (RepVGG), section 3.3; Ding et al. 2021, arXiv:2103.13425.
    """

    name: ClassVar[str] = "merge-branches"
    preserves: ClassVar[Preserves] = Preserves.EXACT

    fold_batch_norms: bool = True

    def run(self, graph: Graph, context: Context) -> PassResult:
        for node in [node for node in graph.nodes if _is_sum(node) and not _is_inner(node)]:
            _Site(graph, context, node, self.fold_batch_norms).merge()
        remove_dead(graph)
        return PassResult(graph)


# -- sums -------------------------------------------------------------------------------------------------------------


def _is_sum(node: fx.Node) -> bool:
    """Say whether a node adds two values of its own type, and nothing but its readers would miss it."""
    if node.op != "call_function" or operator_key(node) not in SUMS or read_layer(node) is not None:
        return False
    call = Call(node)
    operands = _operands(node)
    if (call.has("alpha") and call["alpha"] != 1) or any(
        not isinstance(n, fx.Node) or spec_of(n) != spec_of(node) for n in operands
    ):
        return False
    return call.out.dtype.is_floating_point and all(_is_last_use(node, target) for target in written(node))


def _operands(node: fx.Node) -> tuple[Any, Any]:
    call = Call(node)
    first, second = ("A", "B") if call.has("A") else ("self", "other")
    return call[first], call[second]


def _adds_nothing(node: fx.Node) -> bool:
    """Say whether a node adds 0 to a value that no one else reads, as a sum over a list begins."""
    if node.target not in SUMS or len(node.users) > 1:  # as ATen has it; an ONNX file's identities are taken out
        return False
    call = Call(node)
    other: Any = call["other"]
    return (
        not isinstance(other, fx.Node)
        and other == 0
        and spec_of(call["self"]) == spec_of(node)
        and len(call["self"].users) == 1
    )


def _is_last_use(node: fx.Node, value: fx.Node) -> bool:
    """Say whether no one reads the memory of ``value`` after ``node``, except as the result of ``node``."""
    start = root(value)
    if start.op != "call_function":
        return False
    waiting = [start]
    while waiting:
        each = waiting.pop()
        for user in each.users:
            if user > node:
                return False
            if user is not node and source(user) is each:
                waiting.append(user)
    return True


def _is_same_kind(affine: Affine, operator: Affine) -> bool:
    return affine.product.target is operator.product.target or (affine.is_linear and operator.is_linear)


def _is_inner(node: fx.Node) -> bool:
    """Say whether a sum is a term of another sum, and nothing else."""
    return len(node.users) == 1 and _is_sum(next(iter(node.users)))


@dataclass(frozen=True)
class _Branch:
    """One term of a sum that is an affine map of the input: a convolution, the input itself, a batch norm of it.

    ``values`` makes its kernel and its bias, in float64; ``weights`` and ``biases`` name the tensors they come from.
    """

    term: fx.Node
    geometry: Geometry
    values: Callable[[], tuple[Tensor, Tensor | None]]
    weights: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    params: int = 0
    affine: Affine | None = None

    @property
    def macs(self) -> int:
        """Multiply-adds; what is no convolution has none."""
        return self.geometry.macs(tensor_spec(self.term)) if self.affine is not None else 0

    @property
    def places(self) -> tuple[Any, ...]:
        """Stride and centre, which branches must share to be one convolution."""
        g = self.geometry
        centre = (a + b - d * (k - 1) for (a, b), d, k in zip(g.padding, g.dilation, g.shape[2:], strict=True))
        return g.stride, tuple(centre)


class _Site:
    """One sum with all its terms."""

    def __init__(self, graph: Graph, context: Context, node: fx.Node, fold_batch_norms: bool) -> None:
        self.graph = graph
        self.context = context
        self.node = node
        self.fold_batch_norms = fold_batch_norms
        self.sums: list[fx.Node] = []
        self.terms: list[fx.Node] = []
        self._collect(node)

    def _collect(self, node: fx.Node) -> None:
        self.sums.append(node)
        for operand in _operands(node):
            while _adds_nothing(operand):
                self.sums.append(operand)
                operand = Call(operand)["self"]
            if _is_sum(operand) and len(operand.users) == 1:
                self._collect(operand)
            else:
                self.terms.append(operand)

    def merge(self) -> None:
        """Merge what can be merged, and say of the rest why it cannot."""
        maps = [each for each in map(read_affine, self.terms) if each is not None]
        taken: list[_Branch] = []
        made: list[fx.Node] = []
        for x in dict.fromkeys(each.input for each in maps):
            operator = next(each for each in maps if each.input is x)
            for branches in self._groups(x, operator):
                taken += branches
                made.append(self._merged(x, operator, branches))
        if not made:
            return
        gone = [branch.term for branch in taken]
        rest = [term for term in self.terms if term not in gone]
        total = (made + rest)[0]
        for term in (made + rest)[1:]:
            add = self.node.target if isinstance(self.node.target, Op) else aten.add.Tensor
            total = insert(self.graph, self.node, add, (total, term), like=self.node)
        replace(self.node, total)
        for each in sorted(self.sums, reverse=True):  # a write into memory that lives on would be kept as needed
            self.graph.module.graph.erase_node(each)

    def _groups(self, x: fx.Node, operator: Affine) -> Iterator[list[_Branch]]:
        """Yield the branches that read ``x`` and can become one operator; account for the others."""
        found: dict[Any, list[_Branch]] = {}
        refused: list[tuple[str, str]] = []
        for term in self.terms:
            branch = self._branch(term, x, operator)
            if isinstance(branch, str):
                refused.append((term.name, branch))
            elif branch is not None:
                found.setdefault(branch.places, []).append(branch)
        if len(refused) + sum(map(len, found.values())) < 2:
            return
        for name, why in refused:
            self.context.skipped(f"{self.node.name}: {name}", why)
        for branches in found.values():
            names = listing([branch.term.name for branch in branches], 8)
            site = f"{self.node.name}: {names}"
            reason = self._obstacle(x, branches, found)
            if reason is not None:
                self.context.skipped(site, reason)
                continue
            if not self.context.allows(site):
                continue
            before, after = self._costs(branches)
            if after[0] > before[0] or after[1] > before[1]:
                self.context.skipped(site, f"one operator would be dearer: {saving(before, after)}")
                continue
            what = f"merged {len(branches)} branches of {x.name}: {saving(before, after)}"
            self.context.applied(site, what, macs=(before[0], after[0]), params=(before[1], after[1]))
            yield branches

    def _obstacle(self, x: fx.Node, branches: Sequence[_Branch], found: Mapping[Any, Sequence[_Branch]]) -> str | None:
        if len(branches) == 1:
            if len(found) == 1:
                return "no other branch can be merged with it"
            stride, centre = branches[0].places
            return f"no other branch has its stride {list(stride)} and centre {list(centre)}"
        for value in (x, *self.terms):
            writer = overwritten(value, self.node)
            if writer is not None and writer not in self.sums:
                return f"{writer.name} writes into {value.name} before the sum is formed"
        return None

    def _costs(self, branches: Sequence[_Branch]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return multiply-adds and parameters of the branches, and of all of them as one operator."""
        geometry = _united([branch.geometry for branch in branches])
        biased = any(branch.biases for branch in branches)
        before = (sum(branch.macs for branch in branches), sum(branch.params for branch in branches))
        return before, (geometry.macs(tensor_spec(self.node)), prod(geometry.shape) + biased * geometry.shape[0])

    # -- reading a branch --

    def _branch(self, term: fx.Node, x: fx.Node, operator: Affine) -> _Branch | str | None:
        """Read a term as a branch of ``x`` to be merged with ``operator``; a reason if it could be but for that."""
        channels, rank = operator.shape[0], len(operator.kernel)
        if term is x:
            return _Branch(term, _point(channels, rank), lambda: (_diagonal(torch.ones(channels), rank), None))
        affine = read_affine(term)
        if affine is not None:
            return self._map(affine) if affine.input is x and _is_same_kind(affine, operator) else None
        norm = norm_of(term)
        if norm is None:
            return None
        normed = norm.input
        before = read_affine(normed)
        if before is not None and before.input is x:
            return f"it is a batch norm of {normed.name}, which belongs into that first (fold-batch-norm)"
        return self._norm(norm, channels, rank) if normed is x else None

    def _map(self, affine: Affine) -> _Branch | str:
        reason = self._private(affine.node, (affine.weight, affine.bias))
        if reason is not None:
            return reason

        def values() -> tuple[Tensor, Tensor | None]:
            return affine.kernel_values(self.graph), affine.bias_values(self.graph)

        biases = () if affine.bias is None else (str(affine.bias.target),)
        return _Branch(
            affine.node, affine.geometry, values, (str(affine.weight.target),), biases, affine.params, affine
        )

    def _norm(self, norm: Norm, channels: int, rank: int) -> _Branch | str:
        """Read a batch norm of the input."""
        term, given = norm.node, norm.statistics
        size = len(tensor_spec(norm.input).shape)
        if size != rank + 2:
            return f"it normalises dimension 1 of {size}, which is not that of the channels"
        reason = self._private(term, given.values())
        if reason is not None:
            return reason
        if norm.training or "running_var" not in given:
            return "it normalises with the statistics of the batch"
        if not self.fold_batch_norms:
            return "it is a batch norm, which behaves otherwise in training (fold_batch_norms=false)"
        held = {name: str(node.target) for name, node in given.items()}

        def values() -> tuple[Tensor, Tensor | None]:
            mean, var = self._tensor(held["running_mean"]), self._tensor(held["running_var"])
            scale = torch.rsqrt(var + norm.eps)
            if "weight" in held:
                scale = scale * self._tensor(held["weight"])
            bias = self._tensor(held["bias"]) if "bias" in held else torch.zeros_like(mean)
            return _diagonal(scale, rank), bias - mean * scale

        weights = (held.get("weight", held["running_var"]),)
        biases = (held.get("bias", held["running_mean"]),)
        params = channels * (("weight" in held) + ("bias" in held))
        return _Branch(term, _point(channels, rank), values, weights, biases, params)

    def _private(self, node: fx.Node, operands: Iterable[fx.Node | None]) -> str | None:
        others = [user.name for user in node.users if user not in self.sums]
        if others:
            return f"{listing(others)} read {node.name}, too"
        return unavailable(self.graph, operands)

    def _tensor(self, name: str) -> Tensor:
        return self.graph.tensor(name).detach().double()

    # -- writing --

    def _merged(self, x: fx.Node, operator: Affine, branches: Sequence[_Branch]) -> fx.Node:
        """Insert the one operator that computes all these branches, and return it."""
        geometry = _united([branch.geometry for branch in branches])
        spec = tensor_spec(self.node)
        kernel: Tensor | None = None
        offset: Tensor | None = None
        for branch in branches:
            weight, bias = branch.values()
            placed = _placed(weight, branch.geometry, geometry)
            kernel = placed if kernel is None else kernel + placed
            if bias is not None:
                offset = bias if offset is None else offset + bias
        assert kernel is not None
        weights = [name for branch in branches for name in branch.weights]
        biases = [name for branch in branches for name in branch.biases]
        stem = _stem(weights, len(weights) < len(branches))
        maps = [branch.affine for branch in branches if branch.affine is not None]
        sources: Sources = {operator.rows: self._rows(branches, maps)}
        if geometry.groups == 1:
            dense = [affine for affine in maps if affine.groups == 1]
            sources[operator.columns] = tuple(
                each for affine in dense for each in self.graph.stands_for(str(affine.weight.target), affine.columns)
            )
        held = kernel.t() if operator.turned else kernel
        weight_name = self._add(f"{stem}.weight", weights, held, sources)
        bias_name = None
        if offset is not None:
            bias_name = self._add(f"{stem}.bias", biases, offset, self._bias_sources(biases))
        weight_node = read(self.graph, weight_name, self.node)
        bias_node = None if bias_name is None else read(self.graph, bias_name, self.node)
        return insert_layer(self.graph, operator, self.node, geometry, (x, weight_node, bias_node), spec=spec)

    def _rows(self, branches: Sequence[_Branch], maps: Sequence[Affine]) -> tuple[Source, ...]:
        """Return what the outputs stand for: those of the maps' weights, and the entries of the batch norms'."""
        dims = {str(affine.weight.target): affine.rows for affine in maps}
        names = [name for branch in branches for name in branch.weights]
        return tuple(each for name in names for each in self.graph.stands_for(name, dims.get(name, 0)))

    def _bias_sources(self, names: Sequence[str]) -> Sources:
        """Return what the entries of vectors stand for, of one number for all nothing."""
        tensors = {name: self.graph.tensor(name) for name in names}
        most = max(tensor.numel() for tensor in tensors.values())
        whole = [name for name, tensor in tensors.items() if tensor.dim() and tensor.numel() == most]
        return {0: tuple(source for name in whole for source in self.graph.stands_for(name, tensors[name].dim() - 1))}

    def _add(self, stem: str, names: Sequence[str], value: Tensor, sources: Sources) -> str:
        parts = [self.graph.tensor(name) for name in names]
        return add_tensor(self.graph, stem, made_of(parts, value), sources=sources)


# -- kernels ----------------------------------------------------------------------------------------------------------


def _point(channels: int, rank: int) -> Geometry:
    """Return the geometry of a map that takes every channel at its own place to itself."""
    ones = (1,) * rank
    return Geometry((channels, 1, *ones), ones, ((0, 0),) * rank, ones, channels)


def _diagonal(scale: Tensor, rank: int) -> Tensor:
    return scale.double().reshape(-1, 1, *(1,) * rank)


def _united(parts: Sequence[Geometry]) -> Geometry:
    """Return the geometry of one convolution with the taps of several that share stride and centre."""
    groups = gcd(*(part.groups for part in parts))
    extents, paddings, dilations = [], [], []
    for dim in range(len(parts[0].stride)):
        taps = [tap for part in parts for tap in _taps(part, dim)]
        first, last = min(taps), max(taps)
        step = gcd(*(tap - first for tap in taps)) or 1
        extents.append((last - first) // step + 1)
        (before, after), reach = parts[0].padding[dim], parts[0].dilation[dim] * (parts[0].shape[2 + dim] - 1)
        paddings.append((-first, before + after - reach + last))
        dilations.append(step)
    widest = max(parts, key=lambda part: part.shape[1] * part.groups)
    shape = (parts[0].shape[0], widest.shape[1] * widest.groups // groups, *extents)
    return Geometry(shape, parts[0].stride, tuple(paddings), tuple(dilations), groups)


def _taps(part: Geometry, dim: int) -> list[int]:
    """Return the offsets at which a kernel reads its input, from where an output stands."""
    return [part.dilation[dim] * i - part.padding[dim][0] for i in range(part.shape[2 + dim])]


def _placed(weight: Tensor, part: Geometry, whole: Geometry) -> Tensor:
    """Write a kernel with the groups and the taps of a larger one, filling in zeros."""
    weight = expanded(weight, part.groups, whole.groups)
    for dim in range(len(whole.stride)):
        positions = [(tap + whole.padding[dim][0]) // whole.dilation[dim] for tap in _taps(part, dim)]
        shape = list(weight.shape)
        shape[2 + dim] = whole.shape[2 + dim]
        weight = weight.new_zeros(shape).index_copy(2 + dim, torch.tensor(positions, device=weight.device), weight)
    return weight


def _stem(weights: Sequence[str], with_input: bool) -> str:
    """Name the module of merged tensors after those of the branches."""
    names = list(weights)
    if with_input:
        path = names[0].split(".")
        names.append(".".join([*path[:-2], "identity", path[-1]]))
    joint = joint_name(names)
    return joint.rpartition(".")[0] or joint
