"""Say, operator by operator, when a call computes nothing, or nothing that a shorter call does not.

What may live here: rules. A rule looks at one call and at what feeds it, and answers what to read in its place. Whether
memory and training allow that, the pass finds out.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import fx

from graphopt.dialects.aten.common import overloads
from graphopt.graph import MODE, Call, TensorSpec, spec_of
from graphopt.passes.extents import Extents

__all__ = [
    "LAYOUT",
    "RESHAPING",
    "RULES",
    "Facts",
    "Instead",
    "Kept",
    "Rule",
    "Same",
    "holds",
    "permutation",
    "same_elements",
    "same_type",
]

aten = torch.ops.aten


@dataclass(frozen=True)
class Same:
    """Say that the call's value is that of ``value``, and why; ``through`` is a call in between that is skipped, too.

    ``layout`` says that the call may change how the value lies in memory.
    """

    value: fx.Node
    what: str
    through: fx.Node | None = None
    layout: bool = False


@dataclass(frozen=True)
class Instead:
    """Say that another call, of ``target``, computes the same.

    ``args[0]``, or what it lists, is what the call reads in place of ``through``.
    """

    target: Any
    args: tuple[Any, ...]
    what: str
    through: fx.Node
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """Say why a call that computes nothing now must stay."""

    reason: str


@dataclass(frozen=True)
class Facts:
    """What rules need to know besides the call.

    Attributes:
        trainable: Whether training counts.
        one_device: Whether all tensors live on one device.
        constant: Gives the values of a tensor of the model that stay as they are; None for anything else.
        extents: Tells which sizes are equal though they vary.
    """

    trainable: bool
    one_device: bool
    constant: Callable[[Any], torch.Tensor | None] = lambda node: None
    extents: Extents = field(default_factory=Extents)


Rule = Callable[[Call, Facts], Same | Instead | Kept | None]


# -- shapes --


def _spec(value: Any) -> TensorSpec | None:
    spec = spec_of(value) if isinstance(value, fx.Node) else None
    return spec if isinstance(spec, TensorSpec) else None


def same_type(node: fx.Node, value: fx.Node) -> bool:
    """Say whether two values have the same element type and, as far as types tell, the same shape."""
    return _spec(value) is not None and _spec(node) == _spec(value)


def same_elements(node: fx.Node, value: fx.Node) -> bool:
    """Say whether two values of equally many elements have the same shape, whatever the inputs' sizes.

    One dimension that varies follows from the number of elements; two could differ from each other.
    """
    spec = _spec(node)
    return spec is not None and spec == _spec(value) and sum(spec.dynamic) <= 1 and 0 not in spec.shape


def _first(node: fx.Node) -> fx.Node | None:
    value = node.args[0] if node.args else None
    return value if _spec(value) is not None else None  # type: ignore[return-value]


def _is_size(entry: Any, value: fx.Node, dim: int) -> bool:
    """Say whether an argument is the size of ``value`` in ``dim``, asked for at run time."""
    if not isinstance(entry, fx.Node) or entry.target is not aten.sym_size.int:
        return False
    of, which = entry.args
    spec = _spec(value)
    return of is value and spec is not None and bool(which % len(spec.shape) == dim)  # type: ignore[operator]


# -- calls that are there for training, or for the memory --


def _dropout(call: Call, facts: Facts) -> Same | Kept | None:
    """``dropout(x) = x`` in evaluation, and for p = 0."""
    if call["p"] == 0:
        return Same(call["input"], "drops nothing (p=0)")
    if call["train"]:
        return None
    if facts.trainable and MODE in call.node.meta:
        return Kept(f"drops with p={call['p']:g} in training (trainable=false takes it out)")
    return Same(call["input"], "dropout in evaluation")


def _detach(call: Call, facts: Facts) -> Same | Kept:
    if facts.trainable:
        return Kept("stops gradients in training (trainable=false takes it out)")
    return Same(call["self"], "detaches")


def _alias(call: Call, facts: Facts) -> Same:
    return Same(call.node.args[0], "another name of the same value")  # type: ignore[arg-type]


def _copy(call: Call, facts: Facts) -> Same | None:
    wanted = call["memory_format"] if call.has("memory_format") else None
    if wanted in (None, torch.preserve_format):
        return Same(call["self"], "copies")
    return Same(call["self"], "copies", layout=True) if wanted is torch.contiguous_format else None


def _contiguous(call: Call, facts: Facts) -> Same | None:
    if "memory_format" in call.node.kwargs and call["memory_format"] is not torch.contiguous_format:
        return None
    return Same(call["self"], "changes the layout only", layout=True)


# -- types --


def _is_cast(node: Any, facts: Facts) -> bool:
    """Say whether a call changes the element type, or would if it were another, and nothing else."""
    if not isinstance(node, fx.Node) or node.target not in _CASTS or _spec(node) is None:
        return False
    call = Call(node)
    moves = any(call.has(name) and call[name] is not None for name in ("device", "other"))
    formats = call.has("memory_format") and call["memory_format"] not in (None, torch.preserve_format)
    return not formats and (facts.one_device or not moves)


def _cast(call: Call, facts: Facts) -> Same | Instead | None:
    """``to(x, dtype(x)) = x``; ``to(to(x, wide), t) = to(x, t)`` where the wide type holds every value of the other."""
    if not _is_cast(call.node, facts):
        return None
    x = call.node.args[0]
    assert isinstance(x, fx.Node)
    if same_type(call.node, x):
        return Same(x, f"casts to {_dtype(call.out.dtype)}, which it is")
    before = _first(x) if _is_cast(x, facts) else None
    if before is None or not holds(call.spec("self").dtype, Call(x).spec("self").dtype):
        return None
    what = f"casts to {_dtype(call.spec('self').dtype)} on the way, which loses nothing"
    if same_type(call.node, before):
        return Same(before, what, through=x)
    return Instead(aten.to.dtype, (before, call.out.dtype), what, x)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Say whether every value of ``narrow`` is one of ``wide``."""
    if narrow is torch.bool or wide is narrow:
        return True
    if narrow.is_floating_point and wide.is_floating_point:
        a, b = torch.finfo(wide), torch.finfo(narrow)
        return a.eps <= b.eps and a.max >= b.max and a.smallest_normal <= b.smallest_normal
    if not narrow.is_floating_point and not narrow.is_complex and not wide.is_complex and wide is not torch.bool:
        limits = torch.iinfo(narrow)
        if wide.is_floating_point:
            return max(limits.max, -limits.min) <= 1 / torch.finfo(wide).eps
        return torch.iinfo(wide).max >= limits.max and torch.iinfo(wide).min <= limits.min
    return False


# -- arithmetic --


def _neutral(call: Call, facts: Facts, *, argument: str, value: float, words: str) -> Same | None:
    other = call[argument]
    if isinstance(other, bool) or not isinstance(other, int | float) or other != value:
        return None
    if call.has("rounding_mode") and call["rounding_mode"] is not None:
        return None
    x = call.node.args[0]
    return Same(x, words) if isinstance(x, fx.Node) and same_type(call.node, x) else None


def _repeated(call: Call, facts: Facts) -> Same | None:
    """``f(f(x)) = f(x)`` for a projection f."""
    x = call.node.args[0]
    if not isinstance(x, fx.Node) or not isinstance(x.target, torch._ops.OpOverload) or MODE in call.node.meta:
        return None
    same = _functional(call.node.target) == _functional(x.target)
    if not same or call.node.args[1:] != x.args[1:] or call.node.kwargs != x.kwargs or not same_type(call.node, x):
        return None
    return Same(x, f"repeats {x.name}", through=x)


def _functional(target: Any) -> str:
    name: str = target._schema.name
    return name.removesuffix("_")


# -- parts, and wholes of one part --


def _whole_slice(call: Call, facts: Facts) -> Same | None:
    x = call["self"]
    spec = _spec(x)
    if spec is None or call["step"] != 1 or call["start"] not in (None, 0):
        return None
    dim, end = call["dim"] % len(spec.shape), call["end"]
    whole = end is None or _is_size(end, x, dim)
    if isinstance(end, int):
        whole = end == sys.maxsize or (not spec.dynamic[dim] and end >= spec.shape[dim])
    return Same(x, f"takes all of dimension {dim}") if whole else None


def _no_padding(call: Call, facts: Facts) -> Same | None:
    if any(isinstance(n, fx.Node) or n != 0 for n in call["pad"]):
        return None
    return Same(call.node.args[0], "pads nothing")  # type: ignore[arg-type]


def _one_part(call: Call, facts: Facts) -> Same | Instead | None:
    """``cat([x]) = x``; ``stack([x])`` adds a dimension."""
    (x, *others) = call["tensors"]
    if others or not isinstance(x, fx.Node):
        return None
    return Same(x, "joins one tensor") if same_type(call.node, x) else None


def _nothing_rolled(call: Call, facts: Facts) -> Same | None:
    name = "shifts" if call.has("shifts") else "dims"
    amounts = call[name]
    if (name == "dims" and amounts) or any(isinstance(n, fx.Node) or n != 0 for n in amounts):
        return None
    return Same(call["self"], "moves nothing")


def _no_repeats(call: Call, facts: Facts) -> Same | None:
    counts = call["repeats"] if call.has("repeats") else call["dims"]
    if any(isinstance(n, fx.Node) or n != 1 for n in counts) or not same_type(call.node, call["self"]):
        return None
    return Same(call["self"], "repeats once")


def _no_expansion(call: Call, facts: Facts) -> Same | None:
    x, sizes = call["self"], call["size"]
    spec = _spec(x)
    if spec is None or not same_type(call.node, x):
        return None
    for dim, entry in enumerate(sizes):
        known = entry == -1 if isinstance(entry, int) else _is_size(entry, x, dim)
        if spec.dynamic[dim] and not known:
            return None  # a size of 1 would be expanded
    return Same(x, "expands to the shape it has")


def _no_expansion_as(call: Call, facts: Facts) -> Same | None:
    x = call["self"]
    spec = _spec(x)
    if spec is None or any(spec.dynamic) or not same_type(call.node, x):
        return None
    return Same(x, "expands to the shape it has")


def _one_split(node: fx.Node) -> Same | None:
    """``split(x)[0] = x`` where there is one part."""
    parts, index = node.args
    if not isinstance(parts, fx.Node) or parts.target not in _SPLITS or index not in (0, -1):
        return None
    spec = spec_of(parts)
    if not isinstance(spec, tuple) or len(spec) != 1:
        return None
    x = parts.args[0]
    return Same(x, "splits into one part", through=parts) if isinstance(x, fx.Node) and same_type(node, x) else None


# -- resampling --


def _same_size(call: Call, facts: Facts) -> Same | None:
    """Resampling at scale 1 reads every pixel at its own place, in every mode."""
    x = call.node.args[0]
    scales = [call[name] for name in ("scale_factors", "scales", "scales_h", "scales_w", "scales_d") if call.has(name)]
    flat = [s for scale in scales for s in (scale if isinstance(scale, list | tuple) else [scale]) if s is not None]
    spec = _spec(x)
    if spec is None or any(isinstance(s, fx.Node) or s != 1 for s in flat) or not same_type(call.node, x):  # type: ignore[arg-type]
        return None
    known = bool(flat) or not any(spec.dynamic[2:])
    return Same(x, "resamples to the size it has") if known else None  # type: ignore[arg-type]


def _one_pixel(call: Call, facts: Facts) -> Same | None:
    """Pooling over one pixel."""
    x = call["self"]
    if call.has("output_size"):
        spec = _spec(x)
        done = spec is not None and not any(spec.dynamic[-_rank(call) :])
    else:
        kernel, stride, padding = (_flat(call[name]) for name in ("kernel_size", "stride", "padding"))
        done = set(kernel) == {1} and set(stride) <= {1} and set(padding) <= {0}
    return Same(x, "pools over one pixel") if done and same_type(call.node, x) else None


def _rank(call: Call) -> int:
    return int(next(c for c in call.name if c.isdigit()))


def _flat(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


# -- shapes and orders --


def _reshape(call: Call, facts: Facts) -> Same | Instead | None:
    """Keep the last of several shapes: row-major flattening does not depend on what came before."""
    node, x = call.node, _first(call.node)
    if x is None or _squeezes_dynamic(node):
        return None
    if same_elements(node, x):
        return Same(x, "keeps the shape")
    before = _first(x) if x.target in RESHAPING and not _squeezes_dynamic(x) else None
    if before is None or _spec(x).dtype is not _spec(before).dtype:  # type: ignore[union-attr]
        return None
    if same_elements(node, before):
        return Same(before, f"undoes {x.name}", through=x)
    if node.target not in _EXPLICIT or (len(x.users) > 1 and x.target not in _VIEWING):
        return None
    target = aten.reshape_as.default if node.target is aten.view_as.default else node.target
    target = aten.reshape.default if target is aten.view.default else target
    return Instead(target, (before, *node.args[1:]), f"the last shape after {x.name}", x)


def _squeezes_dynamic(node: fx.Node) -> bool:
    """Say whether a squeeze would drop a dimension only for inputs of some sizes."""
    spec = _spec(node.args[0])
    if node.target not in _SQUEEZES or spec is None:
        return False
    if node.target is aten.squeeze.default:
        return any(spec.dynamic)
    return any(spec.dynamic[dim] for dim in _flat(node.args[1]))


def permutation(node: fx.Node) -> tuple[int, ...] | None:
    """Return which dimension of its argument each dimension of the result is; None if the call does something else."""
    spec = _spec(node.args[0]) if node.args else None
    if node.target not in _PERMUTING or spec is None:
        return None
    rank = len(spec.shape)
    order = list(range(rank))
    call = Call(node)
    if node.target is aten.permute.default:
        return tuple(dim % rank for dim in call["dims"])
    if node.target in (aten.t.default, aten.numpy_T.default):
        return tuple(reversed(order))
    first, second = (-2, -1) if node.target is aten.mT.default else (node.args[1], node.args[2])
    order[first], order[second] = order[second], order[first]  # type: ignore[index]
    return tuple(order)


def _permute(call: Call, facts: Facts) -> Same | Instead | None:
    """Join two orders of dimensions to one, or to none."""
    order, x = permutation(call.node), _first(call.node)
    if order is None or x is None:
        return None
    if order == tuple(range(len(order))):
        return Same(x, "keeps the order of dimensions")
    inner, before = permutation(x), _first(x)
    if inner is None or before is None:
        return None
    joined = tuple(inner[dim] for dim in order)
    if joined == tuple(range(len(joined))):
        return Same(before, f"undoes {x.name}", through=x)
    return Instead(aten.permute.default, (before, list(joined)), f"one order of dimensions with {x.name}", x)


# -- the tables --


def _present(*names: str) -> list[Any]:
    """Return operators by name; those that this version of torch does not have are left out."""
    found = []
    for name in names:
        packet, _, overload = name.partition(".")
        each = getattr(aten, packet, None)
        if each is not None and (not overload or overload in each.overloads()):
            found += overloads(name)
    return found


_EXPLICIT: Final = frozenset({aten.view.default, aten.reshape.default, aten.view_as.default, aten.reshape_as.default})
_SQUEEZES: Final = frozenset({aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims})
_VIEWING: Final = frozenset({aten.view.default, aten.unsqueeze.default, aten.view_as.default, *_SQUEEZES})
RESHAPING: Final = frozenset({*_EXPLICIT, *_VIEWING, aten.flatten.using_ints, aten.unflatten.int})
"""Operators that keep all elements, in row-major order, and change the shape."""
_PERMUTING: Final = frozenset(
    {aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.mT.default}
)
_SPLITS: Final = frozenset(
    {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.tensor_split.sections}
)
_CASTS: Final = frozenset(
    {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default}
)

_PROJECTIONS: Final = (
    "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp.default", "clamp_.default", "clamp_min.default",
    "clamp_max.default", "abs", "floor.default", "ceil.default", "round.default", "trunc.default", "sign.default",
)  # fmt: skip


def _table(rule: Rule, targets: Iterable[Any]) -> dict[Any, Rule]:
    return dict.fromkeys(targets, rule)


def _item(call: Call, facts: Facts) -> Same | None:
    return _one_split(call.node)


RULES: Final[dict[Any, Rule]] = {
    **_table(_dropout, _present("dropout", "dropout_", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")),
    **_table(_detach, _present("detach", "detach_")),
    **_table(_alias, _present("alias", "lift_fresh", "positive", "resolve_conj", "resolve_neg")),
    **_table(_copy, _present("clone", "lift_fresh_copy")),
    **_table(_contiguous, _present("contiguous")),
    **_table(_cast, _CASTS),
    **_table(
        partial(_neutral, argument="other", value=0, words="adds 0"),
        _present("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar"),
    ),
    **_table(
        partial(_neutral, argument="other", value=1, words="multiplies by 1"),
        _present("mul.Tensor", "mul.Scalar", "div.Tensor", "div.Scalar", "div.Tensor_mode"),
    ),
    **_table(partial(_neutral, argument="exponent", value=1, words="power 1"), _present("pow.Tensor_Scalar")),
    **_table(_repeated, _present(*_PROJECTIONS)),
    **_table(_whole_slice, _present("slice.Tensor")),
    **_table(
        _no_padding,
        _present(
            "pad.default",
            "constant_pad_nd",
            *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
        ),
    ),
    **_table(_one_part, _present("cat.default", "concat.default")),
    **_table(_nothing_rolled, _present("roll", "flip")),
    **_table(_no_repeats, _present("repeat.default", "tile.default")),
    **_table(_no_expansion, _present("expand.default")),
    **_table(_no_expansion_as, _present("expand_as.default")),
    **_table(
        _same_size,
        _present(
            *(
                f"upsample_{kind}.{form}"
                for kind in (
                    "nearest1d",
                    "nearest2d",
                    "nearest3d",
                    "linear1d",
                    "bilinear2d",
                    "bicubic2d",
                    "trilinear3d",
                )
                for form in ("vec", "default")
            )
        ),
    ),
    **_table(
        _one_pixel,
        _present(*(f"{kind}{n}d.default" for kind in ("avg_pool", "max_pool", "adaptive_avg_pool") for n in (1, 2, 3))),
    ),
    **_table(_reshape, RESHAPING),
    **_table(_permute, _PERMUTING),
    operator.getitem: _item,
}
"""The rule of every operator that may compute nothing."""

LAYOUT: Final = frozenset({aten.as_strided.default, aten.view_as_complex.default, aten.view.dtype})
"""Operators that read how a value lies in memory, and fail, or differ, where it lies otherwise."""
