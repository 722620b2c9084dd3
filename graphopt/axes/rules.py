"""The typing rules: what each family of operators ties, in terms of axes alone.

What may live here: pure statements about axis lists, each made once. Rules read no argument lists and know no
framework; a dialect entry reads its operator's arguments and names the rule that applies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from graphopt.axes.algebra import ONE, Axis, Concat, Product, concat, is_frozen, product, resolve
from graphopt.axes.infer import KERNEL, Axes, Typer


def broadcast(t: Typer, *operands: Axes) -> Axes:
    """Tie aligned dimensions, counted from the last; a single position matches anything."""
    rank = max(map(len, operands), default=0)
    out: list[Axis] = []
    for i in range(rank, 0, -1):
        aligned = [o[-i] for o in operands if len(o) >= i and o[-i].size != 1]
        for other in aligned[1:]:
            t.unify(aligned[0], other)
        out.append(aligned[0] if aligned else ONE)
    return tuple(out)


def linear(t: Typer, x: Axes, weight: Axes, bias: Axes | None) -> Axes:
    """``x @ weight.T + bias``: contract the last axis of ``x`` with ``weight[1]``, yield ``weight[0]``."""
    t.unify(x[-1], weight[-1])
    if len(weight) == 1:
        return x[:-1]
    if bias is not None:
        broadcast(t, bias, (weight[0],))
    t.multiply(*x[:-1], weight[0], weight[1])
    return (*x[:-1], weight[0])


def matmul(t: Typer, a: Axes, b: Axes) -> tuple[Axes, Axis]:
    """Batched matrix product; also returns the contracted axis."""
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else ()
    inner = t.unify(a[-1], b[-2] if len(b) > 1 else b[-1])
    batch = broadcast(t, a[:-2], b[:-2]) if a[:-2] or b[:-2] else ()
    t.multiply(*batch, *rows, *columns, inner)
    return (*batch, *rows, *columns), inner


@dataclass(frozen=True, slots=True)
class Contraction:
    """An einsum: one subscript string an operand, and that of the result; an ellipsis is spelled out."""

    terms: tuple[str, ...]
    result: str

    @classmethod
    def parse(cls, equation: str, ranks: Sequence[int]) -> Contraction:
        """Read an equation; give the dimensions of an ellipsis letters of their own, aligned from the last."""
        left, arrow, right = equation.replace(" ", "").partition("->")
        terms = left.split(",")
        spare = [c for c in (chr(i) for i in range(192, 400)) if c not in equation]
        longest = max(
            (r - len(t.replace("...", "")) for t, r in zip(terms, ranks, strict=True) if "..." in t), default=0
        )
        dots = "".join(spare[:longest])

        def spell(term: str, rank: int) -> str:
            return term.replace("...", dots[longest - (rank - len(term.replace("...", ""))) :])

        spelled = tuple(spell(t, r) for t, r in zip(terms, ranks, strict=True))
        letters = "".join(spelled)
        free = "".join(sorted(c for c in set(letters) - set(dots) if letters.count(c) == 1))
        return cls(spelled, right.replace("...", dots) if arrow else dots + free)


def einsum(t: Typer, contraction: Contraction, operands: Sequence[Axes]) -> tuple[Axes, list[tuple[Axis, list[int]]]]:
    """Tie equal letters; also returns the contracted axes with the operands that have them.

    Multiply-adds are counted pair by pair from the left, as the operator is computed. A letter that occurs twice in
    one operand takes a diagonal and is frozen.
    """
    axes: dict[str, Axis] = {}
    for term, operand in zip(contraction.terms, operands, strict=True):
        for letter, axis in zip(term, operand, strict=True):
            if term.count(letter) > 1:
                t.freeze(axis, "a diagonal is taken")
            if letter not in axes or axes[letter].size == 1:
                axes[letter] = axis
            elif axis.size != 1:
                t.unify(axes[letter], axis)
    alive = contraction.terms[0]
    for i, term in enumerate(contraction.terms[1:], start=2):
        later = "".join(contraction.terms[i:]) + contraction.result
        both = dict.fromkeys(alive + term)
        if any(letter not in later for letter in both):
            t.multiply(*(axes[letter] for letter in both))
        alive = "".join(letter for letter in both if letter in later)
    summed = [
        (
            axis,
            [i for i, term in enumerate(contraction.terms) if letter in term and _size(operands[i], term, letter) > 1],
        )
        for letter, axis in axes.items()
        if letter not in contraction.result and axis.size > 1
    ]
    return tuple(axes[letter] for letter in contraction.result), summed


def _size(operand: Axes, term: str, letter: str) -> int:
    return operand[term.index(letter)].size


def attention(t: Typer, q: Axes, k: Axes, v: Axes, mask: Axes | None, *, grouped: bool) -> Axes:
    """``softmax(q k^T) v`` with ``q (…, h, l, e)``, ``k (…, h, s, e)``, ``v (…, h, s, f)``, result ``(…, h, l, f)``.

    Grouped queries repeat every key head: query heads are ``kv heads x queries per kv head``.
    """
    t.unify(q[-1], k[-1])
    t.unify(k[-2], v[-2])
    t.freeze(k[-2], "softmax over it")
    kv = broadcast(t, k[:-2], v[:-2])
    if grouped and q[-3].size != kv[-1].size:
        batch = broadcast(t, q[:-3], kv[:-1])
        outer, _ = t.split(q[-3], kv[-1].size)
        t.unify(outer, kv[-1])
        batch = (*batch, q[-3])
    else:
        batch = broadcast(t, q[:-2], kv)
    if len(q) > 3:
        _mark_heads(t, q[-3])
    if mask is not None:
        broadcast(t, mask, (*batch, q[-2], k[-2]))
    t.mark(q[-1], "qk dim")
    t.mark(v[-1], "v dim")
    t.multiply(*batch, q[-2], k[-2], q[-1])
    t.multiply(*batch, q[-2], k[-2], v[-1])
    return (*batch, q[-2], v[-1])


def _mark_heads(t: Typer, heads: Axis) -> None:
    """Query heads that share key heads are ``kv heads x queries of each``, however the sharing was written."""
    found = resolve(heads)
    if isinstance(found, Product) and len(found.factors) == 2:
        t.mark(found.factors[0], "kv heads")
        t.mark(found.factors[1], "query heads per kv head")
    else:
        t.mark(found, "heads")


@dataclass(frozen=True, slots=True)
class ConvAxes:
    """Axes of a convolution: its result, that whose size is the operator's ``groups``, and that summed over in each."""

    out: Axes
    groups: Axis
    summed: Axis


def convolution(
    t: Typer,
    x: Axes,
    weight: Axes,
    bias: Axes | None,
    out_shape: Sequence[int],
    *,
    groups: int,
    transposed: bool,
    moves: bool,
) -> ConvAxes:
    """Convolve ``x (n, c, …)`` with ``weight (o, c/groups, …)``, or ``(c, o/groups, …)`` when transposed.

    Input and output channels of a grouped convolution are ``groups x channels of a group``: a group goes whole, or
    every group loses the same channels. Where the convolution ``moves`` (by a stride or padding) no place is kept.
    """
    spatial = len(weight) - 2
    batch, channels = x[: -spatial - 1], x[-spatial - 1]
    for kernel in weight[2:]:
        t.freeze(kernel, KERNEL)
    count: Axis = ONE
    if groups == 1:
        inner, out = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
        t.unify(channels, inner)
    else:
        count, inner = t.split(channels, groups)
        if transposed:
            t.unify(channels, weight[0])
            out = product((count, weight[1]))
        else:
            rows, _ = t.split(weight[0], groups)
            t.unify(count, rows)
            t.unify(inner, weight[1])
            out = weight[0]
        t.mark(count, "channels" if inner is ONE and weight[1] is ONE else "conv groups")
        t.mark(inner, "channels in each conv group")
        t.mark(weight[0], "channels in each conv group")
    if bias is not None:
        t.unify(bias[0], out)
    places = [_place(t, *each, moves) for each in zip(x[-spatial:], weight[2:], out_shape[-spatial:], strict=True)]
    t.multiply(*batch, *(x[-spatial:] if transposed else places), *weight)
    return ConvAxes((*batch, out, *places), count, inner)


def _place(t: Typer, before: Axis, kernel: Axis, size: int, moves: bool) -> Axis:
    """Pass a spatial axis through a kernel of extent one that stays in place; any other mixes its positions."""
    if kernel is ONE and not moves:
        return before
    t.freeze(before, "a spatial dimension")
    return t.fixed(size, "a spatial dimension")


def reshape(t: Typer, x: Axes, sizes: Sequence[int]) -> Axes:
    """Flatten row-major and cut anew, within the smallest runs of dimensions that have as many positions."""
    if prod(sizes) == 0:
        return _rigid(t, x, sizes, "an empty tensor")
    sources = [a for a in reversed(x) if a is not ONE]
    wanted = [n for n in reversed(sizes) if n != 1]
    made: list[Axis] = []
    while sources:
        run, parts = [sources.pop()], [wanted.pop()]
        have, want = run[0].size, parts[0]
        while have != want:
            if have < want:
                run.append(sources.pop())
                have *= run[-1].size
            else:
                parts.append(wanted.pop())
                want *= parts[-1]
        made.extend(_regroup(t, run, parts))
    rest = iter(made)
    return tuple(ONE if n == 1 else next(rest) for n in sizes)


def _regroup(t: Typer, run: Sequence[Axis], sizes: Sequence[int]) -> Axes:
    """Take factors from the left until each new dimension is full."""
    pending = list(reversed(run))
    out: list[Axis] = []
    for size in sizes:
        taken: list[Axis] = []
        missing = size
        while missing > 1:
            factor = pending.pop()
            if max(factor.size, missing) % min(factor.size, missing):
                # e.g. (4, 9) -> (6, 6): 4 does not divide 6
                return _rigid(t, run, sizes, "a reshape mixes it with its neighbours")
            if factor.size > missing:
                factor, inner = t.split(factor, missing)
                pending.append(inner)
            taken.append(factor)
            missing //= factor.size
        out.append(product(taken))
    return tuple(out)


def _rigid(t: Typer, x: Sequence[Axis], sizes: Sequence[int], why: str) -> Axes:
    for axis in x:
        t.freeze(axis, why)
    return t.opaque(sizes, why)


def permute(x: Axes, order: Sequence[int]) -> Axes:
    """Reorder dimensions."""
    return tuple(x[d] for d in order)


def join(t: Typer, operands: Sequence[Axes], dim: int) -> Axes:
    """Concatenate along ``dim``; tie the other dimensions."""
    rank = len(operands[0])
    dim %= rank
    first = list(operands[0])
    for d in range(rank):
        if d == dim:
            first[d] = concat([o[d] for o in operands])
        else:
            for other in operands[1:]:
                t.unify(first[d], other[d])
    return tuple(first)


def sections(t: Typer, x: Axes, dim: int, sizes: Sequence[int]) -> list[Axes]:
    """Cut ``dim`` into parts of these sizes."""
    dim %= len(x)
    parts: list[Axes] = []
    rest = x[dim]
    for size in sizes[:-1]:
        part, rest = t.cut(rest, size)
        parts.append((*x[:dim], part, *x[dim + 1 :]))
    parts.append((*x[:dim], rest, *x[dim + 1 :]))
    return parts


def is_boundary(axis: Axis, position: int) -> bool:
    """Say whether the structure of ``axis`` has a boundary at ``position``, so that a cut there refines nothing."""
    axis = resolve(axis)
    if position in (0, axis.size):
        return True
    if isinstance(axis, Product):
        inner = product(axis.factors[1:])
        return position % inner.size == 0 and is_boundary(axis.factors[0], position // inner.size)
    if isinstance(axis, Concat):
        for part in axis.parts:
            if position <= part.size:
                return is_boundary(part, position)
            position -= part.size
    return False


@dataclass(frozen=True, slots=True)
class Window:
    """A slice of an axis: what stands before it, what it takes, and what stands after."""

    before: Axis
    taken: Axis
    after: Axis


def window(t: Typer, axis: Axis, start: int, stop: int, step: int) -> Window:
    """Take positions ``start``, ``start + step`` … below ``stop`` (all within the axis) of an axis.

    A stride that divides a free axis takes one column of its rows; any other stride freezes it.
    """
    if step == 1 and not is_frozen(axis):
        head, rest = t.cut(axis, start)
        taken, tail = t.cut(rest, stop - start)
        return Window(head, taken, tail)
    length = max(0, -(-(stop - start) // step))
    if not is_frozen(axis):
        whole = stop == axis.size and start < step and axis.size % step == 0
        if whole:
            rows, column = t.split(axis, axis.size // step)
            t.freeze(column, "a stride takes one position of it")
            return Window(t.fixed(0, "empty"), rows, t.fixed(0, "empty"))
        t.freeze(axis, "a slice with a stride")
    return Window(t.fixed(0, "empty"), t.fixed(length, "part of a frozen axis"), t.fixed(0, "empty"))


def spread(t: Typer, x: Axes, sizes: Sequence[int], dynamic: Sequence[bool]) -> Axes:
    """Expand single positions to ``sizes`` (leading dimensions are new); others must match.

    An expanded static axis is free: its entries are equal, so it follows whatever it meets.
    """
    padded = (ONE,) * (len(sizes) - len(x)) + x
    return tuple(
        a if a.size == n else t.fixed(n, "a dynamic size") if d else t.fresh(n)
        for a, n, d in zip(padded, sizes, dynamic, strict=True)
    )


def tile(t: Typer, x: Axes, repeats: Sequence[int]) -> tuple[Axes, Axes]:
    """Repeat whole axes: ``repeats x axis``; also returns the axes of the repetitions."""
    padded = (ONE,) * (len(repeats) - len(x)) + x
    counts = tuple(t.fresh(n) for n in repeats)
    return tuple(product((c, a)) for c, a in zip(counts, padded, strict=True)), counts


def one_hot(t: Typer, indices: Axes, held: Axis | None, classes: int) -> Axes | None:
    """Spread positions out over the axis they are positions of; None where they are of no axis of this size."""
    return (*indices, held) if held is not None and held.size == classes else None


def drop(x: Axes, dims: Sequence[int], *, keepdim: bool) -> Axes:
    """Remove dimensions, or leave a single position in their place."""
    gone = {d % len(x) for d in dims} if x else set()
    return tuple(ONE if d in gone else a for d, a in enumerate(x) if keepdim or d not in gone)


def pad(t: Typer, x: Axes, widths: Sequence[int], sizes: Sequence[int], *, constant: bool) -> Axes:
    """Pad dimensions from the last, ``widths`` = (before, after) of each in turn.

    Constants around a free axis are a concatenation; any other padding of it, or cropping, freezes it.
    """
    out = list(x)
    for i in range(len(widths) // 2):
        before, after = widths[2 * i], widths[2 * i + 1]
        dim = len(x) - 1 - i
        if before == after == 0:
            continue
        if not is_frozen(x[dim]) and constant and before >= 0 and after >= 0:
            out[dim] = concat((t.fixed(before, "padding"), x[dim], t.fixed(after, "padding")))
        else:
            t.freeze(x[dim], "padding mixes its indices" if not constant else "padding crops it")
            out[dim] = t.fixed(sizes[dim], "a padded dimension")
    return tuple(out)
