"""Hold what all dialects share: reading arguments, the commonest entries, and what follows from axes alone.

What may live here: functions that entries of several dialects are made of. They know calls and axes, and no operator.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import fx

from graphopt.axes.algebra import ONE, Axis, concat, leaves
from graphopt.axes.infer import NO_FACES, Atoms, Axes, Faces, Operator, Positions, Resizer, Typer, Value, Zeros
from graphopt.axes.rules import Contraction, Window, broadcast, einsum, is_boundary
from graphopt.graph import SPEC, Call, TensorSpec, hint, spec_of

# -- reading arguments -----------------------------------------------------------------------------------------------


def optional(t: Typer, value: Any) -> Axes | None:
    """Return the axes of an operand that may be absent."""
    return t[value] if isinstance(value, fx.Node) else None


def operands(call: Call) -> list[fx.Node]:
    """Return the tensor arguments, in the order of the schema, those in lists among them."""
    return list(_tensors((*call.node.args, *call.node.kwargs.values())))


def _tensors(values: Iterable[Any]) -> Iterator[fx.Node]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _tensors(value)
        elif is_tensor(value):
            yield value


def is_tensor(value: Any) -> bool:
    """Say whether an argument is a tensor-valued node, and not a symbolic number."""
    return isinstance(value, fx.Node) and not isinstance(value.meta.get(SPEC), int | float | bool | None)


def dims_of(value: Any, rank: int) -> list[int]:
    """Return a ``dim`` argument as a list of non-negative dimensions; absent or empty means all."""
    if value is None or (isinstance(value, list | tuple) and not value):
        return list(range(rank))
    return [d % rank for d in (value if isinstance(value, list | tuple) else [value])]


def hints(values: Iterable[Any]) -> list[int]:
    """Return sizes by their example values."""
    return [hint(v) for v in values]


def specs_of(call: Call) -> list[TensorSpec]:
    """Return the types of the tensors that an operator with several results yields."""
    spec = spec_of(call.node)
    return [s for s in spec if isinstance(s, TensorSpec)] if isinstance(spec, tuple) else []


def are_used(call: Call, result: int) -> bool:
    """Say whether one of several results is read."""
    return any(user.target is operator.getitem and user.args[1] == result and user.users for user in call.node.users)


# -- the commonest entries -------------------------------------------------------------------------------------------


def opaque(t: Typer, call: Call, why: str) -> Value:
    """Type every result with new frozen axes."""
    if isinstance(spec_of(call.node), tuple):
        return [t.opaque(s.shape, why) for s in specs_of(call)]
    return t.opaque(t.shape(), why)


def frozen(why: str) -> Operator:
    """Make an operator of which nothing can be said: results and operands are frozen."""

    def type_(t: Typer, call: Call) -> Value:
        freeze_operands(t, call, why)
        return opaque(t, call, why)

    return Operator(type_)


def freeze_operands(t: Typer, call: Call, why: str) -> None:
    """Freeze every axis of every tensor argument."""
    for node in operands(call):
        for axis in t[node]:
            t.freeze(axis, why)


def same(t: Typer, call: Call) -> Value:
    """Type an operator whose result has the axes of its first argument."""
    return t[call.node.args[0]]


def zeros_of_first(z: Zeros, call: Call) -> Atoms:
    """Pass on the zeros of the first argument: f(0) = 0."""
    return z[call.node.args[0]]


def zeros_everywhere(z: Zeros, call: Call) -> Atoms:
    """Find the result zero whatever is removed: all of its entries are."""
    return z.atoms(call.node)


def elementwise(t: Typer, call: Call) -> Value:
    """Type an operator that broadcasts all of its tensor arguments."""
    return broadcast(t, *(t[n] for n in operands(call)))


def frozen_dims(dims: Sequence[int], x: Axes, t: Typer, why: str) -> None:
    """Freeze some dimensions of a value."""
    for d in dims:
        t.freeze(x[d], why)


def uniform(t: Typer, call: Call) -> Value:
    """Type a tensor of equal (or equally distributed) entries: a static axis follows whatever it meets."""
    spec = call.out
    return tuple(
        t.fixed(n, "a dynamic size") if dynamic else t.fresh(n)
        for n, dynamic in zip(spec.shape, spec.dynamic, strict=True)
    )


def no_value(t: Typer, call: Call) -> Value:
    """Type an operator that yields no tensor: a size, or nothing."""
    return None


def item(t: Typer, call: Call) -> Value:
    """Take one result of several."""
    source, index = call.node.args
    assert isinstance(source, fx.Node)
    assert isinstance(index, int)
    value = t.values[source]
    return value[index] if isinstance(value, list) else None


def resize_shape(name: str) -> Callable[[Resizer, Call], None]:
    """Return a resizer for an argument that holds the shape of the result, entry by entry."""

    def resize(r: Resizer, call: Call) -> None:
        axes = r.axes(call.node)
        call[name] = r.entries(call, call[name], axes)

    return resize


# -- entries that are positions of an axis ---------------------------------------------------------------------------


def same_positions(t: Typer, call: Call) -> Positions:
    """Type a result whose entries are some of the first argument's."""
    source = call.node.args[0]
    return t.positions.get(source) if isinstance(source, fx.Node) else None


def no_positions(t: Typer, call: Call) -> Positions:
    """Type a result that holds no positions, of an operator that knows what to do with those it is given."""
    return None


def positions_of_each(t: Typer, call: Call) -> Positions:
    """Type several results whose entries are some of the first argument's."""
    held = same_positions(t, call)
    return None if held is None else [held for _ in specs_of(call)]


def positions_of_item(t: Typer, call: Call) -> Positions:
    """Type one result of several."""
    source, index = call.node.args
    held = t.positions.get(source) if isinstance(source, fx.Node) else None
    return held[index] if isinstance(held, list) and isinstance(index, int) else None


PASS = Operator(same, zeros_of_first)
"""First argument's axes, and zero where it is zero."""

MOVE = Operator(same, zeros_of_first, positions=same_positions)
"""First argument's axes and entries."""

LIKE = Operator(same, zeros_of_first, positions=no_positions)
"""First argument's axes; its entries are not looked at."""

LOSE = Operator(same)
"""First argument's axes; removed entries do not stay zero."""

ITEM = Operator(item, zeros_of_first, positions=positions_of_item)
"""One result of several."""

NUMBER = Operator(no_value, positions=no_positions)
"""A size of a tensor, or a number computed from sizes."""

# -- products --------------------------------------------------------------------------------------------------------


def faces_of_matmul(z: Zeros, node: fx.Node, first: fx.Node, second: fx.Node) -> Faces:
    """Return where a matrix product is zero: at the rows of its first operand and the columns of its second."""
    rank, left, right = len(z.axes(node)), len(z.axes(first)), len(z.axes(second))
    batch = rank - (left > 1) - (right > 1)
    rows = (*range(batch - max(left - 2, 0), batch), *([batch] if left > 1 else []), None)
    columns = (*range(batch - max(right - 2, 0), batch), None, *([rank - 1] if right > 1 else []))
    return z.at(node, first, rows) | z.at(node, second, columns)


def mark_attention(t: Typer, first: fx.Node, second: fx.Node, out: Axes, inner: Axis) -> None:
    """Name the axes of attention that is written out: scores contract the query width, and then yield the value width.

    A product of values that both have a batch is one, unless an operand is a parameter.
    """
    if len(t[first]) > 2 and len(t[second]) > 2 and "get_attr" not in (first.op, second.op):
        t.mark(out[-3], "heads")
        t.mark(inner, "qk dim")
        t.mark(out[-1], "v dim")


# -- normalisation ---------------------------------------------------------------------------------------------------

REACH = 8
"""How many operators of one shape may stand between a softmax and what takes its largest entries."""


def is_routed(node: fx.Node, dim: int, chosen: Callable[[fx.Node], int | None]) -> bool:
    """Say whether the largest entries along ``dim`` are taken later, as a router takes experts.

    ``chosen`` says along which dimension an operator takes the largest entries, if it does.
    """
    shape = _shape(node)
    reached, pending = {node}, [node]
    while pending:
        for user in pending.pop().users:
            if chosen(user) in (dim, dim - len(shape or ())):
                return True
            if user not in reached and len(reached) < REACH and _shape(user) == shape:
                reached.add(user)
                pending.append(user)
    return False


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    spec = spec_of(node)
    return spec.shape if isinstance(spec, TensorSpec) and node.op == "call_function" else None


def faces_outside(z: Zeros, node: fx.Node, operand: fx.Node, dims: Iterable[int]) -> Faces:
    """Return where an operand is zero, but for the atoms of the dimensions that are normalised over."""
    axes = z.axes(operand)
    measured = {leaf for d in dims for leaf in leaves(axes[d])}
    return frozenset(face for face in z.at(node, operand) if face[0] not in measured)


def atoms_inside(channels: Axis, groups: int) -> Atoms:
    """Return the atoms that one group normalises over: those inside the outermost ``groups`` rows."""
    if groups == channels.size:
        return frozenset()
    outer = 1
    factors = getattr(channels, "factors", None)
    if groups == 1 or factors is None:
        return frozenset(leaves(channels))
    inside: set[Any] = set()
    for factor in factors:
        if outer >= groups:
            inside.update(leaves(factor))
        outer *= factor.size
    return frozenset(inside)


# -- shapes ----------------------------------------------------------------------------------------------------------


def new_shape(r: Resizer, call: Call, old: Sequence[Any], axes: Sequence[Axis]) -> list[Any]:
    """Return the shape of a view; a single dynamic entry that shrinks is left to be found from the others."""
    shrinking = [i for i, (o, a) in enumerate(zip(old, axes, strict=True)) if isinstance(o, fx.Node) and r.changed(a)]
    if len(shrinking) == 1 and not any(isinstance(o, int) and o == -1 for o in old):
        old = [-1 if i in shrinking else o for i, o in enumerate(old)]
    return r.entries(call, old, axes)


def check_cuts(t: Typer, spec: TensorSpec, axis: Axis, dim: int, positions: Iterable[int]) -> None:
    """Freeze a dynamic dimension that is cut elsewhere than where it was joined.

    Where such a cut falls among the indices is known for the example's sizes alone.
    """
    if spec.dynamic[dim] and not all(is_boundary(axis, p) for p in positions):
        t.freeze(axis, "a dynamic dimension is cut")


def part_sizes(call: Call, dim: int) -> list[int]:
    """Return the sizes of the parts that a split yields."""
    return [part.shape[dim] for part in specs_of(call)]


def parts_of(r: Resizer, call: Call, dim: int) -> list[Axis]:
    """Return the axes of the parts that a split yields."""
    parts = r.axes_of(call.node)
    assert isinstance(parts, list)
    return [part[dim] for part in parts if isinstance(part, tuple)]


def bounds(start: Any, end: Any, size: int) -> tuple[int, int]:
    """Return the first position of a slice with a positive step, and the one behind its last."""

    def clip(value: Any, default: int) -> int:
        if value is None:
            return default
        number = hint(value)
        return min(max(number + size if number < 0 else number, 0), size)

    first = clip(start, 0)
    return first, max(first, clip(end, size))


def moved_bounds(r: Resizer, call: Call, part: Window, start: Any, end: Any, step: int) -> tuple[Any, Any]:
    """Return the bounds of a slice anew.

    One that lies at or beyond the end, as an open one does, still does when the axis shrinks.
    """
    if step == 1:
        start = _moved(r, call, start, [part.before], [part.taken, part.after])
        return start, _moved(r, call, end, [part.before, part.taken], [part.after])
    return start, hint(start or 0) + r.size(part.taken) * step if r.changed(part.taken) else end


def _moved(r: Resizer, call: Call, bound: Any, below: list[Axis], above: list[Axis]) -> Any:
    """Return a slice's bound, which may count from the end, when ``below`` and ``above`` it stand these axes."""
    if bound is not None and hint(bound) < 0:
        if not any(map(r.changed, above)):
            return bound
        return _negated(call, r.entry(call, _negated(call, bound), concat(above)))
    if bound is None or (isinstance(bound, int) and not any(a.size for a in above)):
        return bound
    return r.entry(call, bound, concat(below))


def _negated(call: Call, number: Any) -> Any:
    if not isinstance(number, fx.Node):
        return -number
    with call.node.graph.inserting_before(call.node):
        made = call.node.graph.call_function(operator.neg, (number,))
    made.meta[SPEC] = -number.meta[SPEC]
    return made


def fixed_space(t: Typer, x: Axes, rank: int) -> Axes:
    """Freeze the last ``rank`` dimensions, which are places."""
    frozen_dims(range(len(x) - rank, len(x)), x, t, "a spatial dimension")
    return x


def over_space(t: Typer, call: Call, x: Axes, rank: int) -> Value:
    """Type an operator on places: keep all but the last ``rank`` dimensions, which are new and frozen."""
    fixed_space(t, x, rank)
    kept = x[: len(x) - rank]

    def result(spec: TensorSpec) -> Axes:
        return (*kept, *t.opaque(spec.shape[len(kept) :], "a spatial dimension"))

    return [result(s) for s in specs_of(call)] if isinstance(spec_of(call.node), tuple) else result(call.out)


def repeated(t: Typer, call: Call, out: Axes, counts: Axes, given: int) -> Axes:
    """Note the numbers of repetitions, the last ``given`` of which an operator is told; freeze what is dynamic."""
    for count, dynamic in zip(counts, call.out.dynamic, strict=True):
        if dynamic and count is not ONE:
            t.freeze(count, "a dynamic size")
    t.facts[call.node] = counts[len(counts) - given :]
    return out


# -- sums by letters, and entries by data -----------------------------------------------------------------------------


def einsum_of(operands: str) -> Operator:
    """Return the entry of an einsum whose argument of this name lists the tensors."""

    def type_(t: Typer, call: Call) -> Value:
        tensors = call[operands]
        axes = [t[n] for n in tensors]
        out, summed = einsum(t, Contraction.parse(call["equation"], [len(a) for a in axes]), axes)
        for axis, holders in summed:
            t.contract(axis, *(tensors[i] for i in holders))
        return out

    def zeros(z: Zeros, call: Call) -> Atoms:
        tensors = call[operands]
        contraction = Contraction.parse(call["equation"], [len(z.axes(n)) for n in tensors])
        found = NO_FACES
        for tensor, term in zip(tensors, contraction.terms, strict=True):
            places = (contraction.result.find(letter) for letter in term)
            found |= z.at(call.node, tensor, [place if place >= 0 else None for place in places])
        return z.where(call.node, found)

    return Operator(type_, zeros)


def gather_along(t: Typer, source: Any, indices: Any, dim: int, why: str) -> Axes:
    """Type entries that move along ``dim``; along the others index and source must agree where they are whole."""
    x, index = t[source], t[indices]
    dim %= len(x)
    t.address(x[dim], indices, why)
    for d, (a, b) in enumerate(zip(x, index, strict=True)):
        if d != dim and a.size == b.size:
            t.unify(a, b)
        elif d != dim:
            t.freeze(a, why)
            t.freeze(b, why)
    t.freeze(index[dim], why)
    return index
