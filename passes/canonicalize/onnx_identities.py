"""Say, for operators of ONNX, when a call computes nothing, or nothing that a shorter call does not.

What may live here: rules, as in ``identities``, which holds those of ATen. A rule is found by the operator's key, so
that the table needs no onnx.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from functools import partial
from math import inf
from typing import Any, Final

from torch import fx

from graphopt.dialects.onnx.operators import Op, op
from graphopt.graph import Call, TensorSpec, spec_of
from graphopt.passes.canonicalize.identities import Facts, Instead, Kept, Rule, Same, holds, same_elements, same_type
from graphopt.passes.extents import BINARY, SYM_SIZE, Extent
from graphopt.passes.onnx_calls import is_call, order_of, tensor_type

__all__ = ["ONNX_RULES", "rule_of"]

END: Final = 2**31 - 1
"""Ends of slices from here on stand for "to the end"."""


def rule_of(node: fx.Node) -> Rule | None:
    """Return the rule of an operator of ONNX, or of a part of its result."""
    if node.op != "call_function":
        return None
    if isinstance(node.target, Op):
        return ONNX_RULES.get(node.target.key)
    if node.target is SYM_SIZE:
        return _size
    return _part if node.target is operator.getitem and is_call(node.args[0]) else None


def _operand(call: Call) -> fx.Node | None:
    value = call.node.args[0] if call.node.args else None
    return value if tensor_type(value) is not None else None  # type: ignore[return-value]


# -- calls that are there for training --


def _identity(call: Call, facts: Facts) -> Same | None:
    x = _operand(call)
    return None if x is None else Same(x, "another name of the same value")


def _dropout(call: Call, facts: Facts) -> Same | None:
    """Return the data; a mask that is asked for besides is the reason why a call yields a tuple."""
    x = _operand(call)
    if x is None or tensor_type(call.node) is None or (call["training_mode"] not in (None, False, 0)):
        return None
    return Same(x, "dropout in inference")


def _part(call: Call, facts: Facts) -> Same | None:
    """``Split(x)[0] = x`` where there is one part, and a Dropout's data."""
    parts, index = call.node.args
    if not isinstance(parts, fx.Node) or not isinstance(index, int):
        return None
    spec, x = spec_of(parts), parts.args[0] if parts.args else None
    if not isinstance(spec, tuple) or not isinstance(x, fx.Node) or not same_type(call.node, x):
        return None
    if is_call(parts, "Split") and len(spec) == 1:
        return Same(x, "splits into one part", through=parts)
    if is_call(parts, "Dropout") and index == 0 and Call(parts)["training_mode"] in (None, False, 0):
        return Same(x, "dropout in inference", through=parts)
    return None


# -- types --


def _cast(call: Call, facts: Facts) -> Same | Instead | None:
    """``Cast(x, type(x)) = x``; ``Cast(Cast(x, wide), t) = Cast(x, t)`` where the wide type holds every value."""
    x, wanted = _operand(call), tensor_type(call.node)
    if x is None or wanted is None:
        return None
    if call.spec("input").dtype is wanted.dtype:
        return Same(x, f"casts to {_word(wanted)}, which it is")
    before = _operand(Call(x)) if is_call(x, "Cast") else None
    if before is None or not holds(tensor_type(x).dtype, tensor_type(before).dtype):  # type: ignore[union-attr]
        return None
    what = f"casts to {_word(tensor_type(x))} on the way, which loses nothing"
    if tensor_type(before).dtype is wanted.dtype:  # type: ignore[union-attr]
        return Same(before, what, through=x)
    return Instead(op("Cast"), (before,), what, x, dict(call.node.kwargs))


def _word(spec: TensorSpec | None) -> str:
    return "" if spec is None else str(spec.dtype).removeprefix("torch.")


# -- arithmetic --


def _neutral(call: Call, facts: Facts, *, value: float, sides: Sequence[int], words: str) -> Same | None:
    """``x + 0 = x`` and its like, where the neutral operand makes nothing larger."""
    for side in sides:
        x, other = call.node.args[1 - side], call.node.args[side]
        known = facts.constant(other)
        if known is None or not isinstance(x, fx.Node) or not same_type(call.node, x):
            continue
        if known.numel() and bool((known == value).all()):
            return Same(x, words)
    return None


def _undone(call: Call, facts: Facts) -> Same | None:
    """``f(f(x)) = x`` for an f that is its own inverse."""
    x = _operand(call)
    if x is None or not is_call(x, call.node.target.key):  # type: ignore[union-attr]
        return None
    return Same(x.args[0], f"undoes {x.name}", through=x)  # type: ignore[arg-type]


def _repeated(call: Call, facts: Facts) -> Same | None:
    """``f(f(x)) = f(x)`` for a projection f."""
    x = _operand(call)
    if x is None or not is_call(x, call.node.target.key) or x.kwargs != call.node.kwargs:  # type: ignore[union-attr]
        return None
    return Same(x, f"repeats {x.name}", through=x)


_AT_LEAST_ZERO: Final = frozenset(
    {"Abs", "Exp", "HardSigmoid", "ReduceL1", "ReduceL2", "ReduceSumSquare", "Relu", "Sigmoid", "Softmax", "Softplus"}
    | {"Sqrt"}
)


def _relu(call: Call, facts: Facts) -> Same | Instead | None:
    """``Relu(x) = x`` for x that is nowhere negative."""
    x = _operand(call)
    if x is None or not is_call(x):
        return None
    lowest, _ = _bounds(Call(x)) or (-inf, inf)
    if is_call(x, *_AT_LEAST_ZERO) or lowest >= 0:
        return Same(x, f"{x.name} is nowhere negative")
    return None


def _clip(call: Call, facts: Facts) -> Same | Instead | None:
    """``Clip(x)`` without bounds is x; of two in a row, or a Relu and one, the narrower bounds."""
    x, bounds = _operand(call), _bounds(call)
    if x is None or bounds is None:
        return None
    if bounds == (-inf, inf):
        return Same(x, "has no bounds")
    inner = (0.0, inf) if is_call(x, "Relu") else _bounds(Call(x)) if is_call(x, "Clip") else None
    if inner is None or bounds[0] > bounds[1] or inner[0] > inner[1]:
        return None
    low, high = (min(max(each, bounds[0]), bounds[1]) for each in inner)
    if (low, high) == inner:
        return Same(x, f"{x.name} is within these bounds")
    if len(x.users) > 1:
        return None
    limits = (None if low == -inf else low, None if high == inf else high)
    return Instead(op("Clip"), (x.args[0], *_typed(call, limits)), f"holds the bounds of {x.name}, too", x)


def _typed(call: Call, limits: Sequence[float | None]) -> tuple[float | int | None, ...]:
    floating = call.out.dtype.is_floating_point
    return tuple(n if n is None or floating else int(n) for n in limits)


def _bounds(call: Call) -> tuple[float, float] | None:
    """Return the bounds of a Clip; None where they are computed, or the call is another."""
    if not is_call(call.node, "Clip"):
        return None
    low, high = call["min"], call["max"]
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return None
    return (-inf if low is None else float(low)), (inf if high is None else float(high))


def _one_operand(call: Call, facts: Facts) -> Same | None:
    values: Any = call.node.args[0]
    return Same(values[0], "has one operand") if len(values) == 1 else None


def _where(call: Call, facts: Facts) -> Same | Kept | None:
    """``Where(true, x, y) = x``, ``Where(c, x, x) = x``."""
    condition, x, y = call.node.args[:3]
    known = facts.constant(condition)
    chosen: Any = None
    if x is y:
        chosen = x
    elif known is not None and known.numel():
        chosen = x if bool(known.all()) else None if bool(known.any()) else y
    if isinstance(chosen, fx.Node) and same_type(call.node, chosen):
        return Same(chosen, "chooses the same everywhere")
    if is_call(condition, "IsNaN") and condition.args[0] is y and is_call(y, "Softmax"):  # type: ignore[union-attr]
        unknown = _may_be_infinite(y.args[0], facts)  # type: ignore[union-attr]
        if unknown is None and isinstance(y, fx.Node) and same_type(call.node, y):
            return Same(y, "a softmax of finite numbers is a number", through=condition)  # type: ignore[arg-type]
        return Kept(f"a row that {unknown} masks entirely is not a number after {y.name}")  # type: ignore[union-attr]
    return None


_WEIGHTED: Final = ("Conv", "Einsum", "Gemm", "LayerNormalization", "MatMul", "RMSNormalization")
"""Operators whose results are finite where a model works at all; a mask is none of them."""
_PASSING: Final = ("Cast", "Expand", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze")
MOST: Final = 32
"""How many calls are followed back to where a value comes from."""


def _may_be_infinite(value: Any, facts: Facts) -> str | None:
    """Return the name of what may give infinite entries to a sum of scores and masks; None where nothing does."""
    waiting, seen = [value], set()
    while waiting:
        each = waiting.pop()
        if each in seen or is_call(each, *_WEIGHTED):
            continue
        seen.add(each)
        known = facts.constant(each)
        if known is not None and bool(known.isfinite().all()):
            continue
        if is_call(each, "Where") and len(seen) < MOST:
            waiting += each.args[1:3]
        elif is_call(each, "Add", "Div", *_PASSING) and len(seen) < MOST:
            waiting += [each.args[0], *(each.args[1:2] if is_call(each, "Add", "Div", "Mul", "Sub") else ())]
        else:
            return str(getattr(each, "name", each))
    return None


# -- parts, and wholes of one part --


def _slice(call: Call, facts: Facts) -> Same | Instead | None:
    x, cuts = _operand(call), _cuts(call)
    if x is None or cuts is None:
        return None
    needed = {axis: cut for axis, cut in cuts.items() if not _takes_all(x, axis, cut, facts)}
    if not needed:
        return Same(x, "takes everything")
    if is_call(x, "Slice") and len(x.users) == 1 and (inner := _cuts(Call(x))) is not None:
        joined = _joined(inner, needed)
        if joined is not None:
            return Instead(op("Slice"), (x.args[0], *_lists(joined)), f"cuts what {x.name} cuts, too", x)
    return None


Cut = tuple[Any, Any, int]
"""Where a slice of one axis starts, where it ends, and its step."""


def _cuts(call: Call) -> dict[int, Cut] | None:
    """Return what a Slice takes of each axis that it names; None where that is not written in the call."""
    spec = tensor_type(call.node.args[0])
    starts, ends, axes, steps = (call[name] for name in ("starts", "ends", "axes", "steps"))
    if spec is None or not isinstance(starts, list | tuple) or not isinstance(ends, list | tuple):
        return None
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    if any(not isinstance(n, int) for n in (*axes, *steps)):
        return None
    found = zip(axes, starts, ends, steps, strict=True)
    return {axis % len(spec.shape): (start, end, step) for axis, start, end, step in found}


def _takes_all(x: fx.Node, axis: int, cut: Cut, facts: Facts) -> bool:
    start, end, step = cut
    if step != 1 or isinstance(start, fx.Node) or start != 0:
        return False
    spec = tensor_type(x)
    if isinstance(end, int) and (
        end >= END or (spec is not None and not spec.dynamic[axis] and end >= spec.shape[axis])
    ):
        return True
    return facts.extents.size(end) == facts.extents(x, axis)


def _joined(inner: dict[int, Cut], outer: dict[int, Cut]) -> dict[int, Cut] | None:
    """``x[a:b][c:d] = x[a + c : min(b, a + d)]``, where all count from the start and go forward."""
    joined = dict(inner)
    for axis, cut in outer.items():
        if axis not in joined:
            joined[axis] = cut
            continue
        (a, b, one), (c, d, two) = joined[axis], cut
        if any(not isinstance(n, int) or n < 0 for n in (a, b, c, d)) or one != 1 or two != 1:
            return None
        joined[axis] = (a + c, min(b, a + d), 1)
    return joined


def _lists(cuts: dict[int, Cut]) -> tuple[list[Any], ...]:
    axes = sorted(cuts)
    starts, ends, steps = ([cuts[axis][i] for axis in axes] for i in range(3))
    return (starts, ends, axes) if set(steps) == {1} else (starts, ends, axes, steps)


def _no_padding(call: Call, facts: Facts) -> Same | None:
    x, pads = _operand(call), call["pads"]
    if x is None or not isinstance(pads, list | tuple) or any(isinstance(n, fx.Node) or n != 0 for n in pads):
        return None
    return Same(x, "pads nothing")


def _concat(call: Call, facts: Facts) -> Same | Instead | None:
    """``Concat([x]) = x``; the parts of a Split in their order are what was split; Concats along one axis are one."""
    values, out = call["inputs"], tensor_type(call.node)
    if out is None or not values:
        return None
    if len(values) == 1:
        return Same(values[0], "joins one tensor") if same_type(call.node, values[0]) else None
    axis = call["axis"] % len(out.shape)
    whole = _split_of(values, axis)
    if whole is not None:
        return Same(whole, "joins what a Split took apart")
    for i, value in enumerate(values):
        if is_call(value, "Concat") and len(value.users) == 1 and value.kwargs["axis"] % len(out.shape) == axis:
            parts = [*values[:i], *value.args[0], *values[i + 1 :]]
            return Instead(op("Concat"), (parts,), f"joins what {value.name} joins, too", value, {"axis": axis})
    return None


def _split_of(values: Sequence[fx.Node], axis: int) -> fx.Node | None:
    """Return what was split along ``axis`` into just these parts."""
    if any(value.target is not operator.getitem for value in values):
        return None
    parts = values[0].args[0]
    spec = spec_of(parts) if is_call(parts, "Split") else None  # type: ignore[arg-type]
    if not isinstance(parts, fx.Node) or not isinstance(spec, tuple) or len(spec) != len(values):
        return None
    if any(value.args != (parts, i) for i, value in enumerate(values)):
        return None
    x = parts.args[0]
    at = tensor_type(x)
    return x if at is not None and Call(parts)["axis"] % len(at.shape) == axis else None  # type: ignore[return-value]


def _no_repeats(call: Call, facts: Facts) -> Same | None:
    x, counts = _operand(call), call["repeats"]
    if x is None or not isinstance(counts, list | tuple) or any(isinstance(n, fx.Node) or n != 1 for n in counts):
        return None
    return Same(x, "repeats once")


def _expand(call: Call, facts: Facts) -> Same | Instead | None:
    """Expand to what a value is: nothing; by sizes it has: 1 in their place says the same, and need not be computed."""
    x, sizes = _operand(call), call["shape"]
    if x is None or not isinstance(sizes, list | tuple):
        return None
    own = facts.extents.shape(x)
    own = (1,) * (len(sizes) - len(own)) + own[max(len(own) - len(sizes), 0) :]
    # A size of 1 leaves a dimension as it is.
    wanted = [1 if facts.extents.size(n) == extent else n for n, extent in zip(sizes, own, strict=True)]
    if all(isinstance(n, int) and n == 1 for n in wanted) and same_type(call.node, x):
        return Same(x, "expands to the shape it has")
    if any(isinstance(n, fx.Node) and n is not m for n, m in zip(sizes, wanted, strict=True)):
        return Instead(op("Expand"), (x, wanted), "needs no size that is there", x)
    return None


def _size(call: Call, facts: Facts) -> Instead | None:
    """Ask for a size where it comes from: the same size of two values is then the same call."""
    of, dim = call.node.args
    found = facts.extents(of, dim)  # type: ignore[arg-type]
    if isinstance(found, int) or found == (of, dim):
        return None
    return Instead(SYM_SIZE, found, f"a size that {of} has from {found[0].name}", of)  # type: ignore[arg-type]


# -- resampling --


def _resize(call: Call, facts: Facts) -> Same | None:
    """Resampling at scale 1 reads every pixel at its own place, in every mode but that which crops."""
    x = _operand(call)
    if x is None or not same_type(call.node, x) or call["coordinate_transformation_mode"] == "tf_crop_and_resize":
        return None
    scales, sizes = call["scales"], call["sizes"]
    if isinstance(scales, list | tuple) and scales:
        known = all(not isinstance(n, fx.Node) and n == 1 for n in scales)
    elif isinstance(sizes, list | tuple):
        own = [facts.extents(x, axis) for axis in (call["axes"] or range(len(sizes)))]
        known = [facts.extents.size(n) for n in sizes] == own
    else:
        return None
    return Same(x, "resamples to the size it has") if known else None


def _pool(call: Call, facts: Facts) -> Same | None:
    """Pooling over one pixel."""
    x = _operand(call)
    if x is None or tensor_type(call.node) is None or not same_type(call.node, x):
        return None
    kernel, strides, pads = call["kernel_shape"], call["strides"] or (1,), call["pads"] or (0,)
    if set(kernel) != {1} or set(strides) != {1} or set(pads) != {0} or call["auto_pad"] not in (None, "NOTSET"):
        return None
    return Same(x, "pools over one pixel")


# -- shapes and orders --

RESHAPING: Final = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
"""Operators that keep all elements, in row-major order, and change the shape."""


def _reshape(call: Call, facts: Facts) -> Same | Instead | None:
    """Keep the last of several shapes: row-major flattening does not depend on what came before."""
    node, x = call.node, _operand(call)
    if x is None or _squeezes_varying(node):
        return None
    before: fx.Node | None = x
    through: fx.Node | None = None
    while before is not None:
        if same_elements(node, before) or facts.extents.same(node, before):
            return Same(before, f"undoes {through.name}" if through is not None else "keeps the shape", through=through)
        through = before
        before = _operand(Call(before)) if is_call(before, *RESHAPING) and not _squeezes_varying(before) else None
    inner = _operand(Call(x)) if is_call(x, *RESHAPING) and len(x.users) == 1 and not _squeezes_varying(x) else None
    if inner is not None and (sizes := _sizes(call, inner)) is not None:
        what = f"the last shape after {x.name}"
        return Instead(op("Reshape"), (inner, sizes), what, x)
    if is_call(node, "Reshape") and (plain := _inferred(call)) is not None:
        return Instead(op("Reshape"), (x, plain), "infers the size that varies", x)
    return None


def _sizes(call: Call, x: fx.Node) -> list[Any] | None:
    """Return the shape of a Reshape of ``x`` to what the call yields."""
    spec = tensor_type(call.node)
    if spec is None or 0 in spec.shape:
        return None
    if sum(spec.dynamic) <= 1:
        return [-1 if varies else size for size, varies in zip(spec.shape, spec.dynamic, strict=True)]
    entries = call["shape"] if is_call(call.node, "Reshape") else None
    return list(entries) if isinstance(entries, list | tuple) and 0 not in entries else None


def _inferred(call: Call) -> list[Any] | None:
    """Return the sizes of a Reshape with -1 for the one that is computed; None where there is no such one."""
    entries = call["shape"]
    if not isinstance(entries, list | tuple) or any(entry in (0, -1) for entry in entries if isinstance(entry, int)):
        return None
    computed = [i for i, entry in enumerate(entries) if isinstance(entry, fx.Node)]
    if len(computed) != 1:
        return None
    return [-1 if i in computed else entry for i, entry in enumerate(entries)]


def _squeezes_varying(node: fx.Node) -> bool:
    """Say whether a Squeeze would drop a dimension only for inputs of some sizes."""
    spec = tensor_type(node.args[0])
    if not is_call(node, "Squeeze") or spec is None:
        return False
    axes = Call(node)["axes"]
    return any(spec.dynamic) if axes is None else any(spec.dynamic[axis] for axis in axes)


def _transpose(call: Call, facts: Facts) -> Same | Instead | None:
    """Join two orders of dimensions to one, or to none; what moves only dimensions of size 1 is a Reshape."""
    order, x = order_of(call.node), _operand(call)
    if order is None or x is None:
        return None
    if order == tuple(range(len(order))):
        return Same(x, "keeps the order of dimensions")
    inner = order_of(x)
    if inner is not None:
        before = x.args[0]
        joined = tuple(inner[dim] for dim in order)
        if joined == tuple(range(len(joined))):
            return Same(before, f"undoes {x.name}", through=x)  # type: ignore[arg-type]
        what = f"one order of dimensions with {x.name}"
        return Instead(op("Transpose"), (before,), what, x, {"perm": list(joined)})
    spec, out = tensor_type(x), tensor_type(call.node)
    if spec is None or out is None or sum(out.dynamic) > 1 or 0 in out.shape:
        return None
    moved = [dim for dim in order if spec.dynamic[dim] or spec.shape[dim] != 1]
    if moved != sorted(moved):
        return None
    sizes = [-1 if varies else size for size, varies in zip(out.shape, out.dynamic, strict=True)]
    return Instead(op("Reshape"), (x, sizes), "moves dimensions of size 1 only", x)


# -- operands that are made larger for nothing --


def _broadcast(call: Call, facts: Facts) -> Instead | None:
    """Read ``x`` in place of ``Expand(x)`` where the other operands make the result as large."""
    node = call.node
    out = tensor_type(node)
    for value in node.all_input_nodes:
        if out is None or not is_call(value, "Expand"):
            continue
        x = value.args[0]
        others = [each for each in node.all_input_nodes if each is not value and tensor_type(each) is not None]
        places = range(1, len(out.shape) + 1)
        if all(_extent(x, n, facts) == _extent(value, n, facts) or _reached(node, others, n, facts) for n in places):
            return Instead(
                node.target, _with(node.args, value, x), f"broadcasts without {value.name}", value, dict(node.kwargs)
            )
    return None


def _with(args: Any, old: fx.Node, new: Any) -> Any:
    return fx.map_arg(args, lambda each: new if each is old else each)


def _extent(value: Any, place: int, facts: Facts) -> Extent:
    """Return a size, counted from the end; 1 ahead of the first dimension."""
    spec = tensor_type(value)
    return 1 if spec is None or place > len(spec.shape) else facts.extents(value, -place)


def _reached(node: fx.Node, others: Sequence[fx.Node], place: int, facts: Facts) -> bool:
    """Say whether operands alone are as large as the result in one dimension."""
    return _extent(node, place, facts) in {_extent(each, place, facts) for each in others}


def _first_of(*rules: Rule) -> Rule:
    def rule(call: Call, facts: Facts) -> Same | Instead | Kept | None:
        found = (each(call, facts) for each in rules)
        return next((each for each in found if each is not None), None)

    return rule


# -- the table --


def _table(rule: Rule, names: str) -> Iterable[tuple[str, Rule]]:
    return ((name, rule) for name in names.split())


_OWN: Final[dict[str, Rule]] = dict(
    (
        *_table(_identity, "Identity"),
        *_table(_dropout, "Dropout"),
        *_table(_cast, "Cast"),
        *_table(partial(_neutral, value=0, sides=(0, 1), words="adds 0"), "Add"),
        *_table(partial(_neutral, value=0, sides=(1,), words="takes 0 off"), "Sub"),
        *_table(partial(_neutral, value=1, sides=(0, 1), words="multiplies by 1"), "Mul"),
        *_table(partial(_neutral, value=1, sides=(1,), words="divides by 1"), "Div"),
        *_table(partial(_neutral, value=1, sides=(1,), words="power 1"), "Pow"),
        *_table(partial(_neutral, value=1, sides=(0, 1), words="and true"), "And"),
        *_table(partial(_neutral, value=0, sides=(0, 1), words="or false"), "Or"),
        *_table(_undone, "Neg Not Reciprocal BitwiseNot"),
        *_table(_repeated, "Abs Ceil Floor Round Sign"),
        *_table(_relu, "Relu"),
        *_table(_clip, "Clip"),
        *_table(_one_operand, "Max Mean Min Sum"),
        *_table(_where, "Where"),
        *_table(_slice, "Slice"),
        *_table(_no_padding, "Pad"),
        *_table(_concat, "Concat"),
        *_table(_no_repeats, "Tile"),
        *_table(_expand, "Expand"),
        *_table(_resize, "Resize"),
        *_table(_pool, "AveragePool LpPool MaxPool"),
        *_table(_reshape, " ".join(RESHAPING)),
        *_table(_transpose, "Transpose"),
    )
)

ONNX_RULES: Final[dict[str, Rule]] = {
    **_OWN,
    **{name: _first_of(_OWN[name], _broadcast) if name in _OWN else _broadcast for name in sorted(BINARY)},
}
"""The rule of every operator that may compute nothing, by its key."""
