"""Remove channels that are one number whatever the input is, and channels that nobody reads."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx

from graphopt.axes.algebra import Atom, Indices, index_at, leaves
from graphopt.axes.groups import Group
from graphopt.axes.infer import Typing, atoms_of
from graphopt.dialects import infer
from graphopt.dialects.layers import Affine, layer_with
from graphopt.dialects.products import operator_key
from graphopt.editing import replace_tensor
from graphopt.graph import Graph, tensor_spec
from graphopt.passes.affine import made_of, unavailable
from graphopt.passes.merge.scaling import add_bias, replace_bias
from graphopt.passes.prune.constancy import Constancy, constancy, padded, reads
from graphopt.pipeline import Context, Pass, PassResult, Preserves, Removal, register
from graphopt.report.wording import listing, plural

aten = torch.ops.aten

CONTRACTING: Final = frozenset(
    {
        aten.matmul.default,
        aten.mm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.addmm.default,
        aten.einsum.default,
        aten.scaled_dot_product_attention.default,
        "Attention",
        "DeformConv",
        "Einsum",
        "GRU",
        "Gemm",
        "LSTM",
        "LinearAttention",
        "MatMul",
        "RNN",
        *(
            f"com.microsoft.{name}"
            for name in (
                "Attention",
                "FusedGemm",
                "FusedMatMul",
                "FusedMatMulActivation",
                "GroupQueryAttention",
                "MultiHeadAttention",
                "TransposeMatMul",
            )
        ),
    }
)
"""Operators that may sum over an axis that their result has all the same, from another operand."""

PARTS: Final = frozenset(
    {operator.getitem, aten.slice.Tensor, aten.sym_size.int, aten.sym_numel.default, "Slice", "Split"}
)
"""Operators that take a part, or a size, and leave the rest unread."""


@register
@dataclass(frozen=True)
class RemoveConstantChannels(Pass):
    """Remove the indices of coupling groups that change no output: channels that are constant, or that nobody reads.

    A channel is constant where what makes it is: a batch norm with weight 0 yields its bias, a row of zeros the layer's
    bias; activations, pooling, sums and products of constants are constant. A layer that reads a channel of constant c
    adds ``sum_k W[:, j, k] c`` to its bias, in float64, and its weights ``W[:, j]`` are zero from then on. A channel is
    unread where all layers that read it have zeros there. An index goes if that holds wherever its group is read.

    Removing channels of 0, and unread ones, changes no number; others go exactly up to the rounding of the bias.

    Left as they are: indices that a layer reads beside zero padding, unless they are 0 (at the border the constant
    would be missing); groups that are normalised over, summed over, or multiplied with each other (heads' dimensions);
    parameters that are shared; indices that would leave a count the target does not compute in multiples of.

    Source: constant channels as in Ye et al. 2018, arXiv:1802.00124, section 3.3, there with scales driven to zero.
    """

    name: ClassVar[str] = "remove-constant-channels"
    preserves: ClassVar[Preserves] = Preserves.MASKED

    def run(self, graph: Graph, context: Context) -> PassResult:
        search = _Search(graph, context.channel_multiple)
        found = search.removable([group for group in search.candidates if context.allows(group.name)])
        for group, gone in found.items():
            kept = group.size - len(gone)
            what = f"kept {kept} of {plural(group.size, 'index', 'indices')}"
            context.applied(group.name, what, **search.facts(group, gone))
        for group, reason in search.refused.items():
            if group not in found and search.concerns(group):
                context.skipped(group.name, reason)
        if not found:
            return PassResult(graph)
        search.move_into_biases(found)
        graph.module.recompile()
        typing = infer(graph)
        kept_by = {group.name: np.setdiff1d(np.arange(group.size), gone) for group, gone in found.items()}
        keep = {group.atom: kept_by[group.name] for group in typing.groups if group.name in kept_by}
        return PassResult(graph, Removal(typing, keep))


Mask: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True, eq=False)
class _Reader:
    """A layer that sums over a group: for each column of its weight, the index of the group; -1 for none."""

    layer: Affine
    columns: Indices
    group: Group = field(repr=False)


class _Search:
    """Look for indices that change no output."""

    def __init__(self, graph: Graph, multiple: int) -> None:
        self.graph = graph
        self.multiple = multiple
        self.typing: Typing = infer(graph)
        self.known: Constancy = constancy(graph)
        self.refused: dict[Group, str] = {}
        self.groups = {group.atom: group for group in self.typing.groups}
        self.readers: dict[Group, list[_Reader]] = {group: [] for group in self.typing.groups}
        self._read_graph()

    # -- who reads a group --

    def _read_graph(self) -> None:
        for group in self.typing.groups:
            if group.normalised:
                over = f"{plural(len(group.normalised), 'operator')} normalise over it ({listing(group.normalised)})"
                self.refused[group] = over
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            before = {atom for each in node.all_input_nodes for atom in self._atoms(each)}
            layer = layer_with(node)
            if layer is not None:
                self._read_layer(layer)
                summed = before - self._atoms(node) - self._atoms(layer.weight)
            elif operator_key(node) in CONTRACTING:
                summed = before
            else:
                summed = set() if operator_key(node) in PARTS else before - self._atoms(node)
            for atom in summed:
                self.refused.setdefault(self.groups[atom], f"{node.name} ({node.target}) mixes its indices")

    def _read_layer(self, layer: Affine) -> None:
        """Note the groups that a layer sums over: those in its weight's input channels."""
        axes = self.typing.values[layer.weight]
        assert isinstance(axes, tuple)
        if len(axes) < 2:
            return
        axis = axes[layer.columns]
        for atom in dict.fromkeys(leaves(axis)):
            if atom in self.groups:
                self.readers[self.groups[atom]].append(_Reader(layer, index_at(axis, atom), self.groups[atom]))

    def _atoms(self, node: fx.Node) -> set[Atom]:
        return {atom for atom in atoms_of(self.typing.values[node]) if atom in self.groups}

    # -- what can go --

    @property
    def candidates(self) -> list[Group]:
        """The groups that layers read, and nothing else does."""
        return [group for group in self.typing.groups if group not in self.refused and self.readers[group]]

    def concerns(self, group: Group) -> bool:
        """Say whether some weight or scale of the group is zero at some position: only then a refusal matters."""
        for place in group.places:
            tensor = self.graph.tensor(place.tensor).detach()
            zero = ~tensor.movedim(place.dim, 0).reshape(tensor.shape[place.dim], -1).ne(0).any(1)
            if bool(zero.any()) and not bool(zero.all()):
                return True
        return False

    def removable(self, groups: Sequence[Group]) -> dict[Group, Indices]:
        """Return the indices that change no output, by group.

        What reads a channel may go itself, and leave the channel unread: indices are added until none more goes. Of
        those, some may have to stay, for the count; what was unread but for them is then taken back, and others may go
        in its place.
        """
        gone: dict[Group, Mask] = {group: np.zeros(group.size, dtype=np.bool_) for group in groups}
        for step in (self._grown, self._shrunk, self._filled):
            before = -1
            while before != (before := sum(int(each.sum()) for each in gone.values())):
                for group in gone:
                    gone[group] = step(group, gone)
        return {group: np.flatnonzero(each).astype(np.int64) for group, each in gone.items() if each.any()}

    def _grown(self, group: Group, gone: Mapping[Group, Mask]) -> Mask:
        return gone[group] | self._free_of_all(group, gone)

    def _shrunk(self, group: Group, gone: Mapping[Group, Mask]) -> Mask:
        result: Mask = gone[group] & self._free_of_all(group, gone)
        most = self._most(group, int(result.sum()))
        result[np.flatnonzero(result)[: int(result.sum()) - most]] = False
        return result

    def _filled(self, group: Group, gone: Mapping[Group, Mask]) -> Mask:
        result: Mask = gone[group].copy()
        more = np.flatnonzero(self._free_of_all(group, gone) & ~result)
        count = int(result.sum())
        result[more[: max(self._most(group, count + len(more)) - count, 0)]] = True
        return result

    def _most(self, group: Group, wanted: int) -> int:
        """Return how many of a group's indices may go at most, where ``wanted`` could."""
        stay = max(group.size - wanted, group.least, 1)
        return group.size - min(group.size, -(-stay // self.multiple) * self.multiple)

    def _free_of_all(self, group: Group, gone: Mapping[Group, Mask]) -> Mask:
        free: Mask = np.ones(group.size, dtype=np.bool_)
        for reader in self.readers[group]:
            free &= self._free(reader, gone)
        return free

    def _free(self, reader: _Reader, gone: Mapping[Group, Mask]) -> Mask:
        """Return the indices that a layer does not depend on, or only by a number that its bias can take."""
        used = self._used(reader.layer, gone)
        known, value, blocked = self._constants(reader)
        movable = known & ((value == 0) | (blocked is None))
        free_columns = ~(used & ~movable).any(0)
        if blocked is not None and bool((used & known & (value != 0)).any()):
            self.refused.setdefault(reader.group, blocked)
        free = np.ones(reader.group.size, dtype=np.bool_)
        here = reader.columns >= 0
        np.logical_and.at(free, reader.columns[here], free_columns[here])
        return free

    def _used(self, layer: Affine, gone: Mapping[Group, Mask]) -> Mask:
        """Return which entries ``(row, column)`` of a layer's weight are not zero, among rows that stay."""
        weight, turned = layer.weight, layer.rows == 1
        if weight.op != "get_attr":
            shape = tensor_spec(weight).shape[:2]
            return np.ones(shape[::-1] if turned else shape, dtype=np.bool_)
        tensor = self.graph.tensor(str(weight.target)).detach()
        matrix = (tensor if tensor.dim() == 2 else tensor.flatten(2).ne(0).any(2)) != 0
        used = (matrix.t() if turned else matrix).cpu().numpy().copy()
        axes = self.typing.values[weight]
        assert isinstance(axes, tuple)
        rows = axes[layer.rows]
        for atom in dict.fromkeys(leaves(rows)):
            group = self.groups.get(atom)
            if group is not None and group in gone:
                index = index_at(rows, atom)
                used[(index >= 0) & gone[group][index]] = False
        return used

    def _constants(self, reader: _Reader) -> tuple[Any, Any, str | None]:
        """Return, as ``(row, column)``, which inputs are constant, their values, and why these cannot be moved."""
        layer, groups = reader.layer, reader.layer.groups
        shape = tensor_spec(layer.weight).shape
        rows, columns = (shape[1], shape[0]) if layer.rows == 1 else shape[:2]
        given = self.known[layer.input].get(reads(layer))
        if given is None or (layer.transposed and groups > 1):
            return np.zeros((rows, columns), dtype=np.bool_), np.zeros((rows, columns)), None
        known, value = (
            np.broadcast_to(each.reshape(groups, 1, columns), (groups, rows // groups, columns)).reshape(rows, columns)
            for each in (given.known, given.value)
        )
        return known, value, self._why_not_moved(layer, given.value)

    def _why_not_moved(self, layer: Affine, value: np.ndarray[Any, Any]) -> str | None:
        """Say why a layer's bias cannot take what constant channels add."""
        if padded(layer):
            largest = float(np.abs(value).max())
            return (
                f"{layer.product.name} reads it beside zero padding, where its constant (up to {largest:.3g}) would be "
                "missing"
            )
        if layer.bias is None and layer.slot is None:
            return f"{layer.product.name} has no bias that could take what its constants add up to"
        return unavailable(self.graph, (layer.weight, layer.bias))

    def facts(self, group: Group, gone: Indices) -> dict[str, Any]:
        """Return what the report says of a group whose indices go."""
        constant = np.zeros(group.size, dtype=np.bool_)
        for reader in self.readers[group]:
            known, value, _ = self._constants(reader)
            here = reader.columns >= 0
            np.logical_or.at(constant, reader.columns[here], (known & (value != 0)).any(0)[here])
        return {
            "size": group.size,
            "kept": group.size - len(gone),
            "places": [str(place) for place in group.places],
            "constant": int(constant[gone].sum()),
        }

    # -- the edit --

    def move_into_biases(self, found: Mapping[Group, Indices]) -> None:
        """Add to biases what the constant channels that go contribute, and put zeros in their columns."""
        goes: dict[Group, Mask] = {group: np.zeros(group.size, dtype=np.bool_) for group in found}
        masks: dict[Affine, Mask] = {}
        values: dict[Affine, np.ndarray[Any, np.dtype[np.float64]]] = {}
        for group, gone in found.items():
            goes[group][gone] = True
        for group in found:
            for reader in self.readers[group]:
                known, value, _ = self._constants(reader)
                columns = (reader.columns >= 0) & goes[group][reader.columns]
                mask = known & (value != 0) & columns & self._used(reader.layer, goes)
                masks[reader.layer] = mask | masks.get(reader.layer, False)
                values[reader.layer] = value
        for layer, mask in masks.items():
            if mask.any():
                _move(self.graph, layer, torch.from_numpy(mask), torch.from_numpy(values[layer].copy()))


def _move(graph: Graph, layer: Affine, mask: Tensor, value: Tensor) -> None:
    """Add ``W[mask] c`` to the bias of a layer, and put zeros where ``mask`` says so."""
    name = str(layer.weight.target)
    weight = graph.tensor(name)
    old = weight.detach().double()
    turned = layer.rows == 1
    spread = (...,) + (None,) * (old.dim() - 2)
    part = old * (mask.t() if turned else mask).to(old)[spread]
    added = part * (value.t() if turned else value).to(old)[spread]
    added = added.sum([dim for dim in range(old.dim()) if dim != layer.rows]) * layer.scale / layer.bias_scale
    replace_tensor(graph, name, made_of([weight], old - part))
    if layer.bias is not None:
        replace_bias(graph, layer, graph.tensor(str(layer.bias.target)).detach().double() + added)
    else:
        add_bias(graph, layer, added, graph.stands_for(name, layer.rows))
