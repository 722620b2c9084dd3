"""Attention as one operator, with heads split off the channels; rotary positions; embeddings with a norm."""

from __future__ import annotations

from math import sqrt
from typing import Any

from graphopt.axes.algebra import ONE, Axis, concat, product
from graphopt.axes.infer import Axes, Operator, Resizer, Typer, Value
from graphopt.axes.rules import attention, broadcast
from graphopt.dialects.common import freeze_operands, no_positions, opaque, optional
from graphopt.dialects.onnx.common import microsoft, results
from graphopt.graph import Call

_SEQUENCE = "attention over it"


def _heads(t: Typer, x: Axes, count: int) -> Axes:
    """Split the heads off the channels: ``(n, l, h e) -> (n, h, l, e)``."""
    heads, width = t.split(x[2], count)
    return (x[0], heads, x[1], width)


def _merged(x: Axes) -> Axes:
    """Put the heads back: ``(n, h, l, e) -> (n, l, h e)``."""
    return (x[0], x[2], product((x[1], x[3])))


def _past(t: Typer, past: Any, new: Axes, total: int) -> Axes:
    """Chain a cache ``(n, h, p, e)`` and what is new; the sequence is fixed."""
    t.freeze(new[2], _SEQUENCE)
    before = optional(t, past)
    if before is not None:
        t.freeze(before[2], _SEQUENCE)
        for d in (0, 1, 3):
            t.unify(before[d], new[d])
    return (*new[:2], t.fixed(total, _SEQUENCE), new[3])


def _attend(t: Typer, call: Call, q: Axes, k: Axes, v: Axes, mask: Any) -> Axes:
    """Compute attention of separate heads; what the call has to follow is noted: heads and the query width."""
    t.freeze(q[2], _SEQUENCE)
    rank = len(q)
    out = attention(t, q, k, v, None, grouped=True)
    given = optional(t, mask)
    if given is not None:
        _mask(t, given, (*out[: rank - 1], k[2]))
    t.facts[call.node] = (q[1], k[1], q[3])
    return out


def _mask(t: Typer, mask: Axes, scores: Axes) -> None:
    """Tie a mask with the scores ``(n, h, l, s)``, from the last; one that is shorter than the sequence is padded."""
    for axis, score in zip(reversed(mask), reversed(scores), strict=False):
        if axis.size == score.size:
            t.unify(axis, score)
        else:
            t.freeze(axis, _SEQUENCE)


def _fix_batch(t: Typer, call: Call, batch: Axis, *names: str) -> None:
    """Freeze the batch where some operand says of each of its entries how long the sequence is."""
    for name in names:
        given = optional(t, call[name])
        if given is not None:
            for axis in (*given, batch):
                t.freeze(axis, "each entry of a batch has a length of its own")


def _follow(r: Resizer, call: Call, queries: str, keys: str, default: float | None) -> None:
    """Let the numbers of heads follow, and make the scale explicit: the default would follow the pruned width."""
    if r.fact is None:
        return
    heads, kv_heads, width = r.fact
    if call[queries] is not None and r.changed(heads):
        call[queries] = r.size(heads)
    if call.has(keys) and call[keys] is not None and r.changed(kv_heads):
        call[keys] = r.size(kv_heads)
    if r.changed(width) and call["scale"] == default:
        call["scale"] = 1 / sqrt(width.size)


# -- of the standard -------------------------------------------------------------------------------------------------


def _attention(t: Typer, call: Call) -> Value:
    """``q (n, hq, l, e)``, ``k (n, hk, s, e)``, ``v (n, hk, s, f)``, or each with its heads among the channels."""
    q, k, v = (t[call[name]] for name in "QKV")
    t.contract(q[-1], call["Q"], call["K"])
    flat = len(q) == 3
    if flat:
        q, k, v = (
            _heads(t, q, call["q_num_heads"]),
            _heads(t, k, call["kv_num_heads"]),
            _heads(t, v, call["kv_num_heads"]),
        )
    total = k[2].size + (t[call["past_key"]][2].size if call["past_key"] is not None else 0)
    keys, values = _past(t, call["past_key"], k, total), _past(t, call["past_value"], v, total)
    t.unify(keys[2], values[2])
    _fix_batch(t, call, q[0], "nonpad_kv_seqlen")
    out = _attend(t, call, q, keys, values, call["attn_mask"])
    scores = (q[0], q[1], q[2], keys[2])
    return results(call, _merged(out) if flat else out, keys, values, scores)


def _resize_attention(r: Resizer, call: Call) -> None:
    _follow(r, call, "q_num_heads", "kv_num_heads", None)


# -- of ONNX Runtime -------------------------------------------------------------------------------------------------


def _multi_head(t: Typer, call: Call) -> Value:
    """Attention of queries ``(n, l, h e)`` with keys and values, each in its form; a bias holds those of all three."""
    heads = call["num_heads"]
    query = t[call["query"]]
    if len(query) == 5 or call["key"] is None or call["value"] is None:
        return _rigid(t, call, "queries, keys and values are packed")
    key, value = t[call["key"]], t[call["value"]]
    bias = optional(t, call["bias"])
    if bias is not None:
        first, rest = t.cut(bias[0], query[2].size)
        t.unify(first, query[2])
        second, third = t.cut(rest, query[2].size)
        for part, given in ((second, key), (third, value)):
            if len(given) != 3 or part.size != given[2].size:
                return _rigid(t, call, "a bias of other widths")
            t.unify(part, given[2])
    t.contract(query[2], call["query"], call["key"])
    q = _heads(t, query, heads)
    k, v = (x if len(x) == 4 else _heads(t, x, heads) for x in (key, value))
    past = t[call["past_key"]][2].size if call["past_key"] is not None else 0
    keys = _past(t, call["past_key"], k, k[2].size + past)
    values = _past(t, call["past_value"], v, k[2].size + past)
    t.unify(keys[2], values[2])
    _fix_batch(t, call, q[0], "key_padding_mask", "past_sequence_length", "cache_indirection")
    out = _attend(t, call, q, keys, values, call["attention_bias"])
    return results(call, _merged(out), keys, values, (*q[:3], keys[2]))


def _resize_multi_head(r: Resizer, call: Call) -> None:
    _follow(r, call, "num_heads", "kv_num_heads", 0.0)


def _rigid(t: Typer, call: Call, why: str) -> Value:
    freeze_operands(t, call, why)
    return opaque(t, call, why)


def _grouped(t: Typer, call: Call) -> Value:
    """Attention of grouped queries, with a cache of keys and values, and rotated where the call says so."""
    if call["key"] is None or call["value"] is None:
        return _rigid(t, call, "queries, keys and values are packed")
    query, key, value = (t[call[name]] for name in ("query", "key", "value"))
    t.contract(query[2], call["query"], call["key"])
    q, k, v = (
        _heads(t, query, call["num_heads"]),
        _heads(t, key, call["kv_num_heads"]),
        _heads(t, value, call["kv_num_heads"]),
    )
    if call["do_rotary"]:
        for each in (q, k):
            _rotate(t, call, each[3])
        for name in ("cos_cache", "sin_cache"):
            t.freeze(t[call[name]][0], "addressed by data")
    _fix_batch(t, call, q[0], "seqlens_k", "total_sequence_length", "position_ids")
    specs = call.node.meta["spec"]
    total = specs[1].shape[2] if isinstance(specs, tuple) and len(specs) > 1 else k[2].size
    keys, values = _past(t, call["past_key"], k, total), _past(t, call["past_value"], v, total)
    t.unify(keys[2], values[2])
    out = _attend(t, call, q, keys, values, call["attention_bias"])
    sink = optional(t, call["head_sink"])
    if sink is not None:
        broadcast(t, sink, (q[1],))
    return results(call, _merged(out), keys, values, (*q[:3], keys[2]))


def _resize_grouped(r: Resizer, call: Call) -> None:
    _follow(r, call, "num_heads", "kv_num_heads", 0.0)


def _packed(t: Typer, call: Call) -> Value:
    """Project ``x (n, l, c)`` with ``weights (c, h e | h e | h f)`` and attend."""
    x, weights = t[call["input"]], t[call["weights"]]
    if call["past"] is not None or call["mask_index"] is not None or call["do_rotary"]:
        return _rigid(t, call, "a packed cache, mask or rotation")
    sizes = call["qkv_hidden_sizes"] or [weights[1].size // 3] * 3
    t.unify(x[2], weights[0])
    t.contract(x[2], call["input"], call["weights"])
    first, rest = t.cut(weights[1], sizes[0])
    second, third = t.cut(rest, sizes[1])
    bias = optional(t, call["bias"])
    if bias is not None:
        t.unify(bias[0], concat((first, second, third)))
    t.multiply(x[0], x[1], x[2], weights[1])
    q, k, v = (_heads(t, (x[0], x[1], part), call["num_heads"]) for part in (first, second, third))
    t.normalise(q[3])
    keys, values = _past(t, None, k, k[2].size), _past(t, None, v, v[2].size)
    t.unify(keys[2], values[2])
    out = _attend(t, call, q, keys, values, call["attention_bias"])
    heads, kv_heads, width = t.facts[call.node]
    t.facts[call.node] = (heads, kv_heads, width, (first, second, third))
    made = _merged(out)
    shapes = call.node.meta["spec"]
    return [made, *(t.opaque(s.shape, _SEQUENCE) for s in shapes[1:])] if isinstance(shapes, tuple) else made


def _resize_packed(r: Resizer, call: Call) -> None:
    if r.fact is None:
        return
    heads, _, width, parts = r.fact
    if r.changed(heads):
        call["num_heads"] = r.size(heads)
    if r.changed(width) and call["scale"] == 0.0:
        call["scale"] = 1 / sqrt(width.size)
    if any(map(r.changed, parts)):
        call["qkv_hidden_sizes"] = [r.size(part) for part in parts]


# -- rotary positions ------------------------------------------------------------------------------------------------


def _rotate(t: Typer, call: Call, width: Axis) -> None:
    """Tie the halves that are rotated into each other with the tables of angles ``(…, half)``.

    Where neighbours are, they go by pairs. Entries beyond the rotated ones are not touched.
    """
    half = t.unify(t[call["cos_cache"]][-1], t[call["sin_cache"]][-1])
    rotated, _ = t.cut(width, 2 * half.size) if width.size > 2 * half.size else (width, ONE)
    if call["rotary_interleaved"] if call.has("rotary_interleaved") else call["interleaved"]:
        pairs, both = t.split(rotated, half.size)
        t.freeze(both, "a pair that is rotated")
        t.unify(pairs, half)
    else:
        first, second = t.cut(rotated, half.size)
        t.unify(first, second)
        t.unify(first, half)


def _rotary(t: Typer, call: Call) -> Value:
    """Rotate ``x (n, h, l, e)``, or ``(n, l, h e)`` with the number of heads given or found from the table."""
    x = t[call["X" if call.has("X") else "input"]]
    width = call["rotary_embedding_dim"] or 2 * t[call["cos_cache"]][-1].size
    if len(x) == 3:
        heads, own = t.split(x[2], call["num_heads"] or x[2].size // width)
    else:
        heads, own = x[1], x[3]
    _rotate(t, call, own)
    _turn_by_place(t, call, (x[0], x[-2] if len(x) == 4 else x[1]))
    t.facts[call.node] = (heads, own)
    return x


def _turn_by_place(t: Typer, call: Call, places: Axes) -> None:
    """Tie batch and sequence ``(n, l)`` with where positions, or the angles themselves, are given for each."""
    tables = [t[call[name]][:-1] for name in ("cos_cache", "sin_cache")]
    positions = optional(t, call["position_ids"])
    given = tables if positions is None else [positions]
    if len(given[0]) == 2:
        broadcast(t, places, *given)
    else:
        t.freeze(places[1], "its places are counted")
    for axis in () if positions is None else (a for table in tables for a in table):
        t.freeze(axis, "addressed by data")


def _resize_rotary(r: Resizer, call: Call) -> None:
    heads, _ = r.fact
    if call["num_heads"] and r.changed(heads):
        call["num_heads"] = r.size(heads)
    table = r.axes(call["cos_cache"])[-1]
    if call["rotary_embedding_dim"] and r.changed(table):
        call["rotary_embedding_dim"] = 2 * r.size(table)


# -- embeddings ------------------------------------------------------------------------------------------------------


def _embed(t: Typer, call: Call) -> Value:
    """Sum rows of up to three tables and normalise the sum over the channels."""
    ids = t[call["input_ids"]]
    word = t[call["word_embedding"]]
    t.address(word[0], call["input_ids"], "addressed by data")
    for name in ("position_embedding", "segment_embedding"):
        table = optional(t, call[name])
        if table is not None:
            t.freeze(table[0], "addressed by data")
            t.unify(table[1], word[1])
    for name in ("gamma", "beta"):
        t.unify(t[call[name]][0], word[1])
    for name in ("input_ids", "segment_ids", "mask", "position_ids"):
        for axis in optional(t, call[name]) or ():
            t.freeze(axis, _SEQUENCE)
    t.normalise(word[1])
    out = (*ids, word[1])
    return results(call, out, (t.fixed(ids[0].size, _SEQUENCE),), out)


_ROTARY = Operator(_rotary, None, _resize_rotary)

ENTRIES: dict[str, Operator] = {
    "Attention": Operator(_attention, None, _resize_attention),
    "RotaryEmbedding": _ROTARY,
    **microsoft(Operator(_multi_head, None, _resize_multi_head), "MultiHeadAttention"),
    **microsoft(Operator(_grouped, None, _resize_grouped), "GroupQueryAttention"),
    **microsoft(Operator(_packed, None, _resize_packed), "Attention"),
    **microsoft(_ROTARY, "RotaryEmbedding"),
    **microsoft(Operator(_embed, positions=no_positions), "EmbedLayerNormalization"),
}
