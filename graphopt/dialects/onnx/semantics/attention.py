"""Attention in the standard's form and in those that ONNX Runtime fuses, rotary embeddings, caches.

Inside, queries, keys and values are (batch, heads, positions, head size).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor

from graphopt.dialects.onnx.semantics.common import Function, axis_of, results, type_of

__all__ = ["TABLE"]


def _heads(x: Tensor, count: int | None) -> Tensor:
    """Turn (batch, positions, heads · size) into (batch, heads, positions, size)."""
    return x.unflatten(-1, (count or 1, -1)).transpose(1, 2) if x.dim() == 3 else x


def _packed(x: Tensor) -> Tensor:
    """Turn (batch, heads, positions, size) into (batch, positions, heads · size)."""
    return x.transpose(1, 2).flatten(2)


def _shared(x: Tensor, heads: int) -> Tensor:
    """Repeat heads of keys or values for all heads of the queries that share them."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _probabilities(logits: Tensor, sink: Tensor | None = None) -> Tensor:
    """Return the softmax over the keys; a row that may look at no key is zero.

    ``sink``, (heads,), is one more logit of each row that takes its share and stands for no key.
    """
    if sink is not None:
        extra = sink.to(logits.dtype).reshape(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        return F.softmax(torch.cat([logits, extra], -1), -1)[..., :-1]
    blind = (logits == -math.inf).all(-1, keepdim=True)
    return F.softmax(logits.masked_fill(blind, 0), -1).masked_fill(blind, 0)


def _capped(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _distances(queries: int, keys: int, offset: int | Tensor, device: torch.device) -> Tensor:
    """Return how far each key is before each query, (queries, keys) or with an offset a row (batch, 1, …)."""
    rows = torch.arange(queries, device=device).unsqueeze(-1)
    return rows + offset - torch.arange(keys, device=device)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    outputs: int = 1,
) -> Any:
    """Return softmax(scale·Q·Kᵀ, capped, + mask)·V, the keys and values with those of the past, and Q·Kᵀ.

    A query at position i has ``offset`` keys before those of its own block and sees, if causal, keys up to i + offset.
    """
    flat = q.dim() == 3
    q, k, v = _heads(q, q_num_heads), _heads(k, kv_num_heads), _heads(v, kv_num_heads)
    offset: int | Tensor = 0
    if past_key is not None and past_value is not None:
        offset = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    elif nonpad_kv_seqlen is not None:
        offset = (nonpad_kv_seqlen - q.shape[2]).reshape(-1, 1, 1, 1)
    heads, length, keys = q.shape[1], q.shape[2], k.shape[2]
    root = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    raw = (q * root) @ (_shared(k, heads) * root).transpose(-1, -2)
    capped = _capped(raw, softcap)
    biased = capped
    if attn_mask is not None:
        biased = _masked(biased, attn_mask)
    far = _distances(length, keys, offset, q.device)
    for hidden in (
        far < 0 if is_causal else None,
        far > left_window_size if left_window_size >= 0 else None,
        -far > right_window_size if right_window_size >= 0 else None,
        None if nonpad_kv_seqlen is None else _behind(nonpad_kv_seqlen, keys),
    ):
        if hidden is not None:
            biased = biased.masked_fill(hidden, -math.inf)
    exact = biased if softmax_precision is None else biased.to(type_of(softmax_precision))
    weights = _probabilities(exact).to(v.dtype)
    y = weights @ _shared(v, heads)
    chosen = (raw, capped, biased, weights)[qk_matmul_output_mode]
    return results(outputs, _packed(y) if flat else y, k, v, chosen.to(q.dtype))


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    """Add a mask to logits, or hide what a mask of truth values does not let through; missing keys are hidden."""
    missing = logits.shape[-1] - mask.shape[-1] if mask.dim() and mask.shape[-1] > 1 else 0
    if mask.dtype == torch.bool:
        return logits.masked_fill(~F.pad(mask, (0, missing), value=False), -math.inf)
    return logits + (F.pad(mask, (0, missing), value=-math.inf) if missing else mask)


def _behind(lengths: Tensor, keys: int) -> Tensor:
    """Return which keys of a row are behind its length, (batch, 1, 1, keys)."""
    return torch.arange(keys, device=lengths.device) >= lengths.reshape(-1, 1, 1, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate pairs of the first entries of each head, as many as the tables (batch, positions, pairs) hold.

    A pair is (i, i + pairs), or with ``interleaved`` (2i, 2i + 1).
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    real, imaginary = a * cos - b * sin, a * sin + b * cos
    both = torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    return torch.cat([both, rest], -1) if rest.shape[-1] else both


def _rotary(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int | None = None,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    cos, sin = (table if position_ids is None else F.embedding(position_ids, table) for table in (cos_cache, sin_cache))
    turned = _rotate(_heads(x, num_heads), cos, sin, interleaved=bool(interleaved))
    return _packed(turned) if x.dim() == 3 else turned


def _rotary_of_runtime(
    x: Tensor,
    position_ids: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    *,
    interleaved: int = 0,
    is_packed_batching: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """Rotate heads by the tables' rows at the given positions, or from one given position on."""
    size = x.shape[-1] // num_heads if num_heads else 2 * cos_cache.shape[-1]
    heads = x.unflatten(-1, (-1, size)).transpose(1, 2) if x.dim() == 3 else x
    if position_ids.numel() == 1:
        position_ids = (position_ids.reshape(1, 1) + torch.arange(heads.shape[2], device=x.device)).expand(
            x.shape[0], -1
        )
    turned = _rotate(
        heads, F.embedding(position_ids, cos_cache), F.embedding(position_ids, sin_cache), interleaved=bool(interleaved)
    )
    return _packed(turned) if x.dim() == 3 else turned


def _tensor_scatter(
    cache: Tensor, update: Tensor, write_indices: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """Write new positions into a cache, each row's from its own index on; ``circular`` goes on at the front."""
    axis = axis_of(axis, cache.dim())
    at = torch.arange(update.shape[axis], device=cache.device).unsqueeze(0)
    if write_indices is not None:
        at = at + write_indices.reshape(-1, 1)
    if mode == "circular":
        at = at % cache.shape[axis]
    shape = [1] * cache.dim()
    shape[0], shape[axis] = at.shape
    return cache.scatter(axis, at.reshape(shape).expand(update.shape), update)


def _linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_state: Tensor | None = None,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    chunk_size: int = 64,
    kv_num_heads: int,
    q_num_heads: int,
    scale: float = 0.0,
    update_rule: str = "gated_delta",
    outputs: int = 1,
) -> Any:
    """Keep a state S of keys times values and read it with each query, position by position.

    S is multiplied by exp(decay) if gated, and k ⊗ v is added to it, or with a delta rule beta·k ⊗ (v − Sᵀ·k).
    """
    q, k, v = _heads(query, q_num_heads), _heads(key, kv_num_heads), _heads(value, kv_num_heads)
    scale = scale or 1 / math.sqrt(q.shape[-1])
    state = past_state
    if state is None:
        state = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=v.dtype, device=v.device)
    gates = None if decay is None or "gated" not in update_rule else _heads(decay, kv_num_heads).exp()
    rates = None if beta is None or "delta" not in update_rule else _heads(beta, beta.shape[-1])
    found = []
    for t in range(q.shape[2]):
        if gates is not None:
            state = state * gates[:, :, t].unsqueeze(-1)
        new = v[:, :, t]
        if rates is not None:
            new = rates[:, :, t] * (new - (k[:, :, t].unsqueeze(-2) @ state).squeeze(-2))
        state = state + k[:, :, t].unsqueeze(-1) * new.unsqueeze(-2)
        found.append((q[:, :, t].unsqueeze(-2) @ _shared(state, q_num_heads)) * scale)
    return results(outputs, _packed(torch.cat(found, 2)), state)


def _causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    past_state: Tensor | None = None,
    *,
    activation: str = "none",
    outputs: int = 1,
) -> Any:
    """Convolve each channel over the present and the past; the second result are the last inputs, for next time."""
    before = weight.shape[-1] - 1
    whole = F.pad(x, (before, 0)) if past_state is None else torch.cat([past_state, x], -1)
    y = F.conv1d(whole, weight, bias, groups=x.shape[1])
    y = F.silu(y) if activation in ("silu", "swish") else y
    return results(outputs, y, whole.narrow(-1, whole.shape[-1] - before, before))


# -- the forms of ONNX Runtime ---------------------------------------------------------------------------------------


def _multi_head(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    past_sequence_length: Tensor | None = None,
    cache_indirection: Tensor | None = None,
    *,
    num_heads: int,
    mask_filter_value: float = -10000.0,
    scale: float = 0.0,
    unidirectional: int = 0,
    outputs: int = 1,
) -> Any:
    """Attend with queries, keys and values that are projected already, in one of these forms.

    Apart, (batch, positions, heads · size); keys and values in one, (batch, positions, heads, 2, size); all in one,
    (batch, positions, heads, 3, size); keys and values with the heads in front, from a cache.
    """
    if cache_indirection is not None:
        raise NotImplementedError("MultiHeadAttention with an indirect cache, as beam search has it")
    if key is None:
        query, key, value = (_packed(t.transpose(1, 2)) for t in query.unbind(3))
    elif value is None:
        key, value = (_packed(t.transpose(1, 2)) for t in key.unbind(3))
    assert value is not None
    if bias is not None:
        sizes = [query.shape[-1], key.shape[-1] if key.dim() == 3 else query.shape[-1]]
        for_query, for_key, for_value = bias.split([*sizes, bias.shape[0] - sum(sizes)])
        query = query + for_query
        # Keys from a cache got their bias when they went into it.
        key, value = (t + b if t.dim() == 3 else t for t, b in ((key, for_key), (value, for_value)))
    q, k, v = (_heads(t, num_heads) for t in (query, key, value))
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    y, logits = _fused(q, k, v, key_padding_mask, attention_bias, mask_filter_value, scale, causal=bool(unidirectional))
    return results(outputs, _packed(y), k, v, logits)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    hidden: float,
    scale: float,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attend as ONNX Runtime's operators do: a mask of ones and zeros adds ``hidden`` where it is zero."""
    length, keys = q.shape[2], k.shape[2]
    logits = (q @ k.transpose(-1, -2)) * (scale or 1 / math.sqrt(q.shape[-1]))
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits + _hidden(mask, q.shape[0], length, keys).to(logits.dtype) * hidden
    if causal:
        # The queries are the last of the positions.
        logits = logits.masked_fill(_distances(length, keys, keys - length, q.device) < 0, hidden)
    return F.softmax(logits, -1) @ v, logits


def _hidden(mask: Tensor, batch: int, length: int, keys: int) -> Tensor:
    """Return which keys a mask hides, (batch, 1, 1 or queries, keys), from any of the forms it may have."""
    if mask.dim() == 1:
        if mask.shape[0] == batch:
            return _behind(mask, keys)
        ends, starts = mask[:batch], mask[batch : 2 * batch]
        at = torch.arange(keys, device=mask.device)
        return (at >= ends.reshape(-1, 1, 1, 1)) | (at < starts.reshape(-1, 1, 1, 1))
    if mask.dim() == 2:
        return (mask == 0)[:, None, None, :]
    if mask.dim() == 3:
        return (mask == 0)[:, None]
    return (mask == 0)[:, :, keys - length : keys, :keys]


def _projected(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    mask_index: Tensor | None = None,
    past: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_sequence_length: Tensor | None = None,
    *,
    num_heads: int,
    do_rotary: int = 0,
    mask_filter_value: float = -10000.0,
    past_present_share_buffer: int = 0,
    qkv_hidden_sizes: Sequence[int] | None = None,
    rotary_embedding_dim: int = 0,
    scale: float = 0.0,
    unidirectional: int = 0,
    outputs: int = 1,
) -> Any:
    """Project the input to queries, keys and values by one matrix, and attend.

    The second result holds keys and values, those of the past first: (2, batch, heads, positions, size).
    """
    if do_rotary or past_present_share_buffer:
        raise NotImplementedError("com.microsoft.Attention with rotary embeddings or a cache of fixed length")
    packed = x @ weights
    if bias is not None:
        packed = packed + bias
    sizes = list(qkv_hidden_sizes or [packed.shape[-1] // 3] * 3)
    q, k, v = (_heads(t, num_heads) for t in packed.split(sizes, -1))
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    y, _ = _fused(q, k, v, mask_index, attention_bias, mask_filter_value, scale, causal=bool(unidirectional))
    return results(outputs, _packed(y), torch.stack([k, v]) if outputs > 1 else None)


def _grouped(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    seqlens_k: Tensor,
    total_sequence_length: Any,
    cos_cache: Tensor | None = None,
    sin_cache: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_bias: Tensor | None = None,
    head_sink: Tensor | None = None,
    *unusual: Tensor | None,
    num_heads: int,
    kv_num_heads: int,
    causal: int = 1,
    do_rotary: int = 0,
    local_window_size: int = -1,
    rotary_interleaved: int = 0,
    scale: float = 0.0,
    smooth_softmax: int = -1,
    softcap: float = 0.0,
    outputs: int = 1,
    **others: Any,
) -> Any:
    """Attend causally with fewer heads of keys and values than of queries, and a cache that the new ones go into.

    ``seqlens_k`` is the number of valid keys of each row, less one. Without ``key`` the query holds all three, one
    after the other. Where the total length is not known, as on meta tensors, the cache grows by the new positions.
    """
    if any(t is not None for t in unusual) or outputs > 3:
        raise NotImplementedError("GroupQueryAttention with a quantized cache, with norms or with its logits as result")
    if key is None or value is None:
        size = query.shape[-1] // (num_heads + 2 * kv_num_heads)
        query, key, value = query.split([num_heads * size, kv_num_heads * size, kv_num_heads * size], -1)
    q, k, v = _heads(query, num_heads), _heads(key, kv_num_heads), _heads(value, kv_num_heads)
    length, past = q.shape[2], 0 if past_key is None else past_key.shape[2]
    unknown = isinstance(total_sequence_length, Tensor) and total_sequence_length.is_meta
    total = past + length if unknown else int(total_sequence_length)
    # In the first call rows may be shorter than the others: they begin at zero all the same.
    first = seqlens_k.reshape(-1) * 0 if total == length else (seqlens_k.reshape(-1) + 1 - length).clamp(min=0)
    at = first.to(torch.int64).unsqueeze(-1) + torch.arange(length, device=q.device)
    if do_rotary and cos_cache is not None and sin_cache is not None:
        where = at.clamp(max=cos_cache.shape[0] - 1) if position_ids is None else position_ids
        cos, sin = F.embedding(where, cos_cache), F.embedding(where, sin_cache)
        q, k = (_rotate(t, cos, sin, interleaved=bool(rotary_interleaved)) for t in (q, k))
    room = max(past, total)
    keys, values = (_cached(old, new, at, room) for old, new in ((past_key, k), (past_value, v)))
    logits = (q @ _shared(keys, num_heads).transpose(-1, -2)) * (scale or 1 / math.sqrt(q.shape[-1]))
    logits = _capped(logits, softcap)
    if attention_bias is not None:
        logits = logits + F.pad(attention_bias, (0, room - attention_bias.shape[-1]))
    far = at[:, None, :, None] - torch.arange(room, device=q.device)
    hidden = far < 0 if causal else _behind(seqlens_k + 1, room)
    if local_window_size >= 0:
        hidden = hidden | (far >= local_window_size)
    sink = head_sink
    if sink is None and smooth_softmax == 1:
        sink = torch.zeros(num_heads, dtype=q.dtype, device=q.device)
    y = _probabilities(logits.masked_fill(hidden, -math.inf), sink) @ _shared(values, num_heads)
    return results(outputs, _packed(y), keys, values)


def _cached(old: Tensor | None, new: Tensor, at: Tensor, room: int) -> Tensor:
    """Return a cache of a length with new positions written where each row's go."""
    missing = room - (0 if old is None else old.shape[2])
    empty = new.new_zeros(new.shape[0], new.shape[1], missing, new.shape[3])
    cache = empty if old is None else torch.cat([old, empty], 2) if missing else old
    return cache.scatter(2, at[:, None, :, None].expand_as(new), new)


TABLE: Final[dict[str, Function]] = {
    "Attention": _attention,
    "CausalConvWithState": _causal_conv,
    "LinearAttention": _linear_attention,
    "RotaryEmbedding": _rotary,
    "TensorScatter": _tensor_scatter,
    "com.microsoft.Attention": _projected,
    "com.microsoft.GroupQueryAttention": _grouped,
    "com.microsoft.MultiHeadAttention": _multi_head,
    "com.microsoft.RotaryEmbedding": _rotary_of_runtime,
}
