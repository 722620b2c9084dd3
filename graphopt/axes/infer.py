"""Infer the axes of every value of a graph, as a type checker infers types.

What may live here: the walk over the graph, the context that rules write into (:class:`Typer`), its result
(:class:`Typing`), and the two analyses that follow from it: which zeros survive, and what is normalised over.
Which rule an operator follows stands in a dialect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import add, floordiv, mul, neg, sub
from typing import Any

import torch
from torch import fx

from graphopt.axes import algebra
from graphopt.axes.algebra import ONE, Atom, Axis, AxisError, Concat, Product, Reason, leaves
from graphopt.axes.groups import Group, Place
from graphopt.graph import SPEC, Call, Graph, TensorSpec, get_attribute, spec_of, without_collection

Axes = tuple[Axis, ...]
Value = Axes | list["Value"] | None
Atoms = frozenset[Atom]

Positions = Axis | list["Positions"] | None
"""Of which axis the entries of a tensor of numbers are positions; for an operator of several results, of each."""

Faces = frozenset[tuple[Atom, int]]
"""An atom and a dimension: the entries of a value whose index of that atom, in that dimension, is removed."""

NO_ATOMS: Atoms = frozenset()
NO_FACES: Faces = frozenset()
KERNEL = "a kernel's extent"


@dataclass(frozen=True, slots=True)
class Operator:
    """What the compiler knows of one operator; a dialect maps operators to these.

    ``type`` gives the axes of the result and unifies those of the arguments. ``zeros`` gives the atoms whose removed
    indices are zero in the result when their parameters are set to zero; without it none is. ``resize`` rewrites the
    size-bearing arguments after a pruning; without it there are none. ``positions`` says of which axis the entries of
    the result are positions, and that the operator may be given such entries: when the axis loses indices, they are
    counted anew among those that stay. Without it, an axis whose positions the operator is given stays whole.
    """

    type: Callable[[Typer, Call], Value]
    zeros: Callable[[Zeros, Call], Atoms] | None = None
    resize: Callable[[Resizer, Call], None] | None = None
    positions: Callable[[Typer, Call], Positions] | None = None


@dataclass(slots=True)
class Typing:
    """The solved axes of a graph.

    ``tensors`` and ``values`` give the axes of parameters and of nodes; ``macs`` the multiply-adds of a node, as the
    sum over its entries of the product of their sizes; ``groups`` the free groups in graph order; ``unknown`` the
    nodes whose operator has no entry in the dialect; ``normalising`` the atoms that a node renormalises over;
    ``positions`` of which axis a node's entries are positions.
    """

    graph: Graph
    tensors: dict[str, Axes]
    values: dict[fx.Node, Value]
    macs: dict[fx.Node, list[Axes]]
    facts: dict[fx.Node, Any]
    groups: list[Group]
    unknown: list[fx.Node]
    normalising: dict[fx.Node, Atoms]
    operators: Mapping[Any, Operator]
    positions: dict[fx.Node, Positions] = field(default_factory=dict)

    def frozen(self) -> list[tuple[Place, Reason]]:
        """Return every parameter dimension of which some position cannot go, with the first reason.

        A product is not among them while one of its factors is free: ``heads x head_dim`` can lose heads. Kernel
        extents and single positions are left out.
        """
        found: list[tuple[Place, Reason]] = []
        for name, axes in self.tensors.items():
            if isinstance(get_attribute(self.graph.module, name), torch.nn.Parameter):
                for dim, axis in enumerate(axes):
                    reason = _rigid(axis)
                    if reason is not None and reason.text != KERNEL:
                        found.append((Place(name, dim, axis), reason))
        return found

    def axes(self, node: fx.Node) -> Axes:
        """Return the axes of a node that yields one tensor."""
        value = self.values[node]
        if not isinstance(value, tuple):
            raise TypeError(f"{node} does not yield one tensor")
        return value


class Typer:
    """The context that rules write into: fresh axes, unification, and what they noticed on the way."""

    def __init__(self, graph: Graph) -> None:
        """Start on ``graph`` with nothing known."""
        self.graph = graph
        self.node: fx.Node = next(iter(graph.nodes))
        self.tensors: dict[str, Axes] = {}
        self.values: dict[fx.Node, Value] = {}
        self.macs: dict[fx.Node, list[Axes]] = {}
        self.facts: dict[fx.Node, Any] = {}
        self.unknown: list[fx.Node] = []
        self.normalised: list[tuple[fx.Node, Axis]] = []
        self.contracted: list[tuple[fx.Node, tuple[fx.Node, ...], Axis]] = []
        self.roles: list[tuple[Axis, str]] = []
        self.positions: dict[fx.Node, Positions] = {}
        self.floors: list[tuple[Axis, int]] = []

    # -- reading --

    def __getitem__(self, node: Any) -> Axes:
        """Return the axes of a tensor operand."""
        value = self.values[node]
        if not isinstance(value, tuple):
            raise TypeError(f"{node} does not yield one tensor")
        return value

    def shape(self) -> tuple[int, ...]:
        """Return the sizes of the current node's result."""
        spec = spec_of(self.node)
        if not isinstance(spec, TensorSpec):
            raise TypeError(f"{self.node} does not yield one tensor")
        return spec.shape

    # -- making --

    def fresh(self, size: int) -> Axis:
        """Return a new free axis."""
        return algebra.atom(size)

    def fixed(self, size: int, why: str) -> Axis:
        """Return a new frozen axis."""
        return algebra.atom(size, Reason(why, self.node.name))

    def opaque(self, shape: Iterable[int], why: str) -> Axes:
        """Return new frozen axes of these sizes."""
        reason = Reason(why, self.node.name)
        return tuple(algebra.atom(n, reason) for n in shape)

    # -- tying --

    def unify(self, a: Axis, b: Axis) -> Axis:
        """Tie two axes and return one of them; axes that cannot be tied are frozen instead."""
        try:
            algebra.unify(a, b)
        except AxisError as error:
            for axis in error.clash:
                self.freeze(axis, "its structure does not fit that of its partner")
        return a

    def split(self, axis: Axis, outer_size: int) -> tuple[Axis, Axis]:
        """Refine an axis to rows; where that is impossible both factors are frozen, and the axis with them."""
        try:
            return algebra.split(axis, outer_size)
        except AxisError as error:
            why = f"it has no {outer_size} equal rows"
            if error.factors is not None:
                for part in error.clash:
                    self.freeze(part, why)
                return error.factors
            self.freeze(axis, why)
            return self.fixed(outer_size, why), self.fixed(axis.size // outer_size, why)

    def cut(self, axis: Axis, position: int) -> tuple[Axis, Axis]:
        """Refine an axis to two parts; where that is impossible both parts are frozen, and the axis with them."""
        if position <= 0:
            return self.fixed(0, "empty"), axis
        if position >= axis.size:
            return axis, self.fixed(0, "empty")
        try:
            return algebra.cut(axis, position)
        except AxisError:
            why = f"a cut at {position} falls inside its structure"
            self.freeze(axis, why)
            return self.fixed(position, why), self.fixed(axis.size - position, why)

    def freeze(self, axis: Axis, why: str) -> None:
        """Forbid that ``axis`` loses indices, and keep the reason."""
        algebra.freeze(axis, Reason(why, self.node.name))

    # -- noticing --

    def multiply(self, *axes: Axis) -> None:
        """Count as many multiply-adds as the product of the axes' sizes, for the current node."""
        self.macs.setdefault(self.node, []).append(axes)

    def normalise(self, axis: Axis) -> None:
        """Note that the current node normalises over ``axis``: removing an index changes the others' results."""
        if axis is not ONE:
            self.normalised.append((self.node, axis))

    def contract(self, axis: Axis, *operands: Any) -> None:
        """Note that the current node sums over ``axis``; exact where one operand's removed entries are zero.

        Those of a parameter are, by definition.
        """
        nodes = tuple(o for o in operands if isinstance(o, fx.Node))
        if axis is not ONE and not any(_is_parameter(self.graph, n) for n in nodes):
            self.contracted.append((self.node, nodes, axis))

    def choose(self, axis: Axis, count: int) -> None:
        """Note that the current node takes ``count`` positions of ``axis`` by their values: so many must stay.

        Which ones it takes depends on all that are there.
        """
        self.normalise(axis)
        self.floors.append((axis, count))
        self.mark(axis, "experts")

    def is_chosen(self, axis: Axis) -> bool:
        """Say whether positions of ``axis`` were taken by their values before, and it may lose some."""
        chosen = {leaf for each, _ in self.floors for leaf in leaves(each)}
        return not algebra.is_frozen(axis) and chosen.issuperset(leaves(axis))

    def address(self, axis: Axis, indices: Any, why: str) -> None:
        """Tie ``axis``, whose positions are looked up, with the axis that ``indices`` holds positions of."""
        held = self.positions.get(indices)
        if isinstance(held, Axis) and held.size == axis.size:
            self.unify(axis, held)
            return
        for each in _axes_of_positions(held):
            self.freeze(each, why)
        self.freeze(axis, why)

    def mark(self, axis: Axis, role: str) -> None:
        """Note what the indices of ``axis`` are, in the field's words."""
        self.roles.append((axis, role))


class Zeros:
    """Answer which atoms' removed indices are zero in a value once their parameters are zero.

    An atom may stand in several dimensions of a value. It *vanishes* where the value is zero as soon as the index in
    one of them is removed; an outer product of a vector that vanishes with one that does not is zero at one *face*.

    A weightless sum (attention scores, a channel sum) is exact under removal only where the summed entries vanish;
    where they do not, the sum renormalises. The answer is sound, not complete.
    """

    def __init__(self, typing_values: Mapping[fx.Node, Value], free: Atoms) -> None:
        """Analyse lazily: nothing is computed until a contraction asks."""
        self._values = typing_values
        self._free = free
        self._known: dict[fx.Node, Atoms] = {}

    def axes(self, node: Any) -> Axes:
        """Return the axes of a node that yields one tensor."""
        value = self._values[node]
        assert isinstance(value, tuple)
        return value

    def atoms(self, node: Any) -> Atoms:
        """Return the free atoms of a node's axes."""
        return atoms_of(self._values.get(node)) & self._free

    def __getitem__(self, node: Any) -> Atoms:
        """Return the atoms that vanish in an operand; a number or an absent operand has none."""
        return self._known.get(node, NO_ATOMS) if isinstance(node, fx.Node) else NO_ATOMS

    def set(self, node: fx.Node, atoms: Atoms) -> None:
        """Record an answer."""
        self._known[node] = atoms & self.atoms(node)

    def forget(self, node: fx.Node, atoms: Atoms) -> None:
        """Take back that these atoms vanish in a value: a later node wrote into its memory."""
        self._known[node] = self[node] - atoms

    def at(self, node: fx.Node, operand: Any, dims: Sequence[int | None] | None = None) -> Faces:
        """Return at which faces of ``node`` an operand is zero; a number or an absent operand is at none.

        ``dims`` says where each dimension of the operand stands in the result, None where it is summed over; without it
        dimensions are aligned from the last.
        """
        atoms = self[operand]
        if not atoms:
            return NO_FACES
        source, result = self.axes(operand), self.axes(node)
        if dims is None:
            dims = range(len(result) - len(source), len(result))
        return frozenset(
            (leaf, d)
            for axis, d in zip(source, dims, strict=True)
            if d is not None
            for leaf in dict.fromkeys(leaves(axis))
            if leaf in atoms and _as_often(leaf, axis, result[d])
        )

    def where(self, node: fx.Node, faces: Faces) -> Atoms:
        """Return the atoms that vanish in ``node`` when it is zero at these faces: those it is at all faces of."""
        axes = self.axes(node)
        found = {leaf for leaf, _ in faces}
        return frozenset(found - {leaf for d, a in enumerate(axes) for leaf in leaves(a) if (leaf, d) not in faces})

    def every(self, node: fx.Node, *operands: Any) -> Atoms:
        """Combine as a broadcast sum does: zero where every operand is; absent operands do not count."""
        present = [self.at(node, o) for o in operands if o is not None]
        return self.where(node, frozenset.intersection(*present)) if present else NO_ATOMS

    def some(self, node: fx.Node, *operands: Any) -> Atoms:
        """Combine as a broadcast product does: zero where any operand is."""
        return self.where(node, NO_FACES.union(*(self.at(node, o) for o in operands)))

    def joined(self, operands: Sequence[Any]) -> Atoms:
        """Combine as concatenations do: zero where every operand that has the atom is."""
        atoms = NO_ATOMS.union(*(self.atoms(o) for o in operands))
        return frozenset(a for a in atoms if all(a in self[o] for o in operands if a in self.atoms(o)))


def _as_often(leaf: Atom, axis: Axis, other: Axis) -> bool:
    return axis is other or algebra.multiplicity(axis, leaf) == algebra.multiplicity(other, leaf)


@dataclass(slots=True)
class Resizer:
    """Give the new sizes to an operator whose size-bearing arguments must follow a pruning.

    ``keep`` says which indices each pruned atom keeps; ``graph`` is the graph being rewritten; ``values`` maps the
    arguments of the rewritten node to their (old) axes.
    """

    keep: Mapping[Atom, algebra.Indices]
    axes_of: Callable[[fx.Node], Value]
    fact: Any
    sizes: dict[Atom, int] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = {a: len(k) for a, k in self.keep.items()}

    def axes(self, node: Any) -> Axes:
        """Return the axes, as inferred, of a node of the graph being rewritten."""
        value = self.axes_of(node)
        assert isinstance(value, tuple)
        return value

    def changed(self, axis: Axis) -> bool:
        """Say whether ``axis`` loses indices."""
        return any(leaf in self.sizes for leaf in leaves(axis))

    def size(self, axis: Axis) -> int:
        """Return the new size of ``axis``."""
        return algebra.size_of(axis, self.sizes)

    def entry(self, call: Call, old: Any, axis: Axis) -> Any:
        """Return a shape entry for ``axis`` in place of ``old``, which may be symbolic; ``-1`` stays."""
        if not self.changed(axis) or (isinstance(old, int) and old == -1):
            return old
        if not isinstance(old, fx.Node):
            return self.size(axis)
        with call.node.graph.inserting_before(call.node):
            return self._follow(old, axis)

    def entries(self, call: Call, old: Sequence[Any], axes: Sequence[Axis]) -> list[Any]:
        """Return a shape for ``axes`` in place of ``old``, entry by entry."""
        return [self.entry(call, o, a) for o, a in zip(old, axes, strict=True)]

    def _follow(self, old: fx.Node, axis: Axis) -> fx.Node:
        """Compute the new size of a dynamic ``axis`` from its old one, unless that one follows of itself.

        A product scales: what varies is one factor, what shrinks another. A concatenation loses positions from some of
        its parts, whatever the size of the others; where every part shrinks, what varies is a factor of all of them.
        """
        axis, size, now = algebra.resolve(axis), self.size(axis), self._now(old)
        if now == size:
            return old
        if isinstance(axis, algebra.Concat) and not all(map(self.changed, axis.parts)):
            return _computed(sub, old, now - size)
        return _computed(floordiv, _computed(mul, old, size), now)

    def _now(self, entry: Any) -> int:
        """Return what a computed size comes to on the example's sizes once tensors have shrunk, which it may read."""
        if not isinstance(entry, fx.Node):
            return int(entry)
        if entry.target is torch.ops.aten.sym_size.int:
            tensor, dim = entry.args
            return self.size(self.axes(tensor)[dim])  # type: ignore[index]
        if entry.target in _ARITHMETIC:
            return int(entry.target(*map(self._now, entry.args)))
        return int(entry.meta[SPEC])


_ARITHMETIC = frozenset({add, floordiv, mul, neg, sub})


def _computed(function: Callable[[int, int], int], symbol: fx.Node, number: int) -> fx.Node:
    made = symbol.graph.call_function(function, (symbol, number))
    made.meta[SPEC] = function(symbol.meta[SPEC], number)
    return made


def _rigid(axis: Axis) -> Reason | None:
    """Return why some position of a solved axis cannot go, or None where all of them can."""
    if isinstance(axis, Atom):
        return axis.frozen
    if isinstance(axis, Product):
        reasons = [_rigid(f) for f in axis.factors]
        return None if None in reasons else next(iter(reasons), None)
    assert isinstance(axis, Concat)
    return next((r for r in map(_rigid, axis.parts) if r is not None), None)


@without_collection()
def infer(graph: Graph, operators: Mapping[Any, Operator]) -> Typing:
    """Infer the axes of every value of ``graph`` with the rules of a dialect.

    Never raises for what it does not understand: an operator without an entry freezes what it touches and is listed
    in ``Typing.unknown``.
    """
    typer = Typer(graph)
    for node in graph.nodes:
        typer.node = node
        typer.values[node] = _type(typer, node, operators)
    return _solve(typer, operators)


def _type(typer: Typer, node: fx.Node, operators: Mapping[Any, Operator]) -> Value:
    if node.op == "placeholder":
        return _freeze_all(typer, spec_of(node), "a dimension of the model's input")
    if node.op == "get_attr":
        return _tensor(typer, str(node.target))
    if node.op == "output":
        for value in _tensor_nodes(node):
            for axis in _axes_in(typer.values[value]):
                typer.freeze(axis, "a dimension of the model's output")
        _give_up_positions(typer, node, "its positions are the model's output")
        return None
    operator = operators.get(node.target)
    if operator is None or operator.positions is None:
        _give_up_positions(typer, node, f"{node.target} uses positions of it")
    if operator is None:
        if spec_of(node) is None or isinstance(spec_of(node), int | float | bool):
            return None
        return _unknown(typer, node, f"{node.target} has no axis rule")
    typed = operator.type(typer, Call(node))
    if not _fits(typed, spec_of(node)):
        _give_up_positions(typer, node, f"{node.target} uses positions of it")
        return _unknown(typer, node, f"the axis rule of {node.target} does not fit this call")
    if operator.positions is not None:
        typer.positions[node] = operator.positions(typer, Call(node))
    return typed


def _give_up_positions(typer: Typer, node: fx.Node, why: str) -> None:
    for operand in _tensor_nodes(node):
        for axis in _axes_of_positions(typer.positions.get(operand)):
            typer.freeze(axis, why)


def _axes_of_positions(held: Positions) -> Iterable[Axis]:
    if isinstance(held, list):
        for each in held:
            yield from _axes_of_positions(each)
    elif held is not None:
        yield held


def _unknown(typer: Typer, node: fx.Node, why: str) -> Value:
    typer.unknown.append(node)
    for operand in _tensor_nodes(node):
        for axis in _axes_in(typer.values.get(operand)):
            typer.freeze(axis, why)
    return _freeze_all(typer, spec_of(node), why)


def _tensor(typer: Typer, name: str) -> Value:
    if name not in typer.tensors:
        tensor = get_attribute(typer.graph.module, name)
        if not isinstance(tensor, torch.Tensor):
            return None
        typer.tensors[name] = tuple(algebra.atom(n) for n in tensor.shape)
    return typer.tensors[name]


def _is_parameter(graph: Graph, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(get_attribute(graph.module, str(node.target)), torch.nn.Parameter)


def _tensor_nodes(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if n.op != "output"]


def _axes_in(value: Value) -> Iterable[Axis]:
    if isinstance(value, tuple):
        yield from value
    elif isinstance(value, list):
        for each in value:
            yield from _axes_in(each)


def _freeze_all(typer: Typer, spec: Any, why: str) -> Value:
    if isinstance(spec, TensorSpec):
        return typer.opaque(spec.shape, why)
    if isinstance(spec, tuple):
        return [_freeze_all(typer, s, why) for s in spec]
    return None


def _fits(value: Value, spec: Any) -> bool:
    if isinstance(spec, TensorSpec):
        return isinstance(value, tuple) and tuple(a.size for a in value) == spec.shape
    if isinstance(spec, tuple):
        return isinstance(value, list) and len(value) == len(spec) and all(map(_fits, value, spec))
    return value is None


def atoms_of(value: Value) -> Atoms:
    """Return the atoms that occur in the axes of a value."""
    return frozenset(leaf for axis in _axes_in(value) for leaf in leaves(axis))


def _solve(typer: Typer, operators: Mapping[Any, Operator]) -> Typing:
    solved: dict[int, Axis] = {}

    def final(value: Value) -> Value:
        if isinstance(value, tuple):
            return tuple(solve(axis) for axis in value)
        return [final(v) for v in value] if isinstance(value, list) else None

    def solve(axis: Axis) -> Axis:
        found = solved.get(id(axis))
        if found is None:
            found = solved[id(axis)] = algebra.resolve(axis)
        return found

    def placed(held: Positions) -> Positions:
        if isinstance(held, list):
            return [placed(each) for each in held]
        return None if held is None else solve(held)

    tensors = {name: tuple(solve(a) for a in axes) for name, axes in typer.tensors.items()}
    positions = {node: placed(held) for node, held in typer.positions.items() if held is not None}
    values = {node: final(value) for node, value in typer.values.items()}
    macs = {node: [tuple(solve(a) for a in term) for term in terms] for node, terms in typer.macs.items()}
    groups = _groups(typer, tensors)
    free = frozenset(g.atom for g in groups)
    normalising = _normalising(typer, operators, values, free)
    names: dict[Atom, list[str]] = {}
    for node, atoms in normalising.items():
        for each in atoms:
            names.setdefault(each, []).append(node.name)
    _name(groups, typer.roles)
    floors: dict[Atom, int] = {}
    for axis, count in typer.floors:
        for atom, least in _least(algebra.resolve(axis), count):
            floors[atom] = max(floors.get(atom, 1), least)
    for group in groups:
        group.normalised = tuple(names.get(group.atom, ()))
        group.least = floors.get(group.atom, 1)
    return Typing(
        typer.graph, tensors, values, macs, typer.facts, groups, typer.unknown, normalising, operators, positions
    )


def _least(axis: Axis, count: int) -> Iterable[tuple[Atom, int]]:
    """Yield how many indices of each atom suffice that ``axis`` keeps ``count`` positions.

    Of a product one factor shrinks, the largest that may; of a concatenation the largest part must stay first.
    """
    if isinstance(axis, Atom):
        yield axis, count
    elif isinstance(axis, Product) and axis.factors:
        able = [factor for factor in axis.factors if not algebra.is_frozen(factor)]
        largest = max(able or axis.factors, key=lambda factor: factor.size)
        yield from _least(largest, -(-count * largest.size // axis.size))
        for factor in axis.factors:
            if factor is not largest:
                yield from _least(factor, factor.size)
    elif isinstance(axis, Concat):
        for part in sorted(axis.parts, key=lambda part: -part.size):
            yield from _least(part, min(count, part.size))
            count -= min(count, part.size)


def _groups(typer: Typer, tensors: Mapping[str, Axes]) -> list[Group]:
    """Collect, for each free atom, the places where it occurs; atoms without a parameter are nobody's to prune."""
    places: dict[Atom, list[Place]] = {}
    owned: set[Atom] = set()
    for name, axes in tensors.items():
        for axis in axes:
            for leaf in algebra.paired(axis):
                algebra.freeze(leaf, Reason("an index is paired with itself", name))
    for name, axes in tensors.items():
        is_parameter = isinstance(get_attribute(typer.graph.module, name), torch.nn.Parameter)
        for dim, axis in enumerate(axes):
            for leaf in dict.fromkeys(leaves(axis)):
                if leaf.frozen is None:
                    places.setdefault(leaf, []).append(Place(name, dim, axis))
                    if is_parameter:
                        owned.add(leaf)
    return [Group(str(found[0]), a, a.size, tuple(found)) for a, found in places.items() if a in owned]


def _name(groups: Sequence[Group], marks: Sequence[tuple[Axis, str]]) -> None:
    """Give each group its role, and a name of its own where several groups share their first place."""
    roles: dict[Atom, dict[str, None]] = {}
    for axis, role in marks:
        for leaf in leaves(axis):
            roles.setdefault(leaf, {})[role] = None
    sharing: dict[str, list[Group]] = {}
    for group in groups:
        found = list(roles.get(group.atom, ()))
        group.role = "head dim" if {"qk dim", "v dim"} <= set(found) else found[0] if found else group.role
        sharing.setdefault(group.name, []).append(group)
    for name, several in sharing.items():
        if len(several) > 1:
            for number, group in enumerate(several):
                twins = [g for g in several if g.role == group.role]
                group.name = f"{name} {group.role}" + (f" {number}" if len(twins) > 1 else "")


def _normalising(
    typer: Typer, operators: Mapping[Any, Operator], values: Mapping[fx.Node, Value], free: Atoms
) -> dict[fx.Node, Atoms]:
    found: dict[fx.Node, Atoms] = {}
    for node, axis in typer.normalised:
        atoms = frozenset(leaves(axis)) & free
        if atoms:
            found[node] = found.get(node, NO_ATOMS) | atoms
    sums = [(n, o, frozenset(leaves(a)) & free) for n, o, a in typer.contracted]
    sums = [s for s in sums if s[2]]
    if sums:
        zeros = _zeros(typer, operators, values, free)
        for node, operands, atoms in sums:
            exposed = atoms.difference(*(zeros[o] for o in operands))
            if exposed:
                found[node] = found.get(node, NO_ATOMS) | exposed
    return found


def _zeros(typer: Typer, operators: Mapping[Any, Operator], values: Mapping[fx.Node, Value], free: Atoms) -> Zeros:
    zeros = Zeros(values, free)
    memory: dict[fx.Node, list[fx.Node]] = {}
    for node in typer.graph.nodes:
        if _is_parameter(typer.graph, node):
            zeros.set(node, zeros.atoms(node))
        elif node.op == "call_function":
            operator = operators.get(node.target)
            if operator is not None and operator.zeros is not None:
                zeros.set(node, operator.zeros(zeros, Call(node)))
        _share(node, memory)
        if _writes(node):
            for each in memory[node]:
                zeros.forget(each, zeros.atoms(node) - zeros[node])
    return zeros


def _share(node: fx.Node, memory: dict[fx.Node, list[fx.Node]]) -> None:
    """Add ``node`` to the values whose memory it may share: those of its first argument, or none.

    A dropout that does nothing returns its argument, though its schema does not say so.
    """
    source = node.args[0] if node.op == "call_function" and node.args else None
    schema = getattr(node.target, "_schema", None)
    shares = schema is None or "dropout" in schema.name or any(a.alias_info is not None for a in schema.arguments)
    memory[node] = memory[source] if shares and isinstance(source, fx.Node) else []
    memory[node].append(node)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)
