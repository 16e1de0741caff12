"""Sequences that are spread over devices: what mixes tokens, inside of `jax.shard_map`.

Arrays are the device's own part, [B, L / T, ...], and `axes` the axes of the mesh that
T devices in the order of time lie on. Under a mesh of the trainer
(`mesh.sequence`, `kernels.shards.over`) operations and layers do all this themselves;
here it is for a `jax.shard_map` of one's own:

    scan        any linear recurrence, by one all-gather of what the parts do to a
                state, whose size does not depend on L:
                    scan(axes, lambda h, **how: linear_scan(a, x, h, reset, **how), h,
                         reverse=False, return_transition=False)
    window      the last inputs before a part, for `short_conv`, from a neighbour
    to_channels, to_time
                between a part of the tokens with all channels, and all tokens of a part
                of the channels, for what needs the whole length, such as `fft_conv`:
                one all-to-all each
    ring_attention
                softmax attention; keys and values go round from device to device

What it takes to be split like that is a recurrence that is linear in its state.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels import varying
from kernels.relay import Axes, neighbour, passed, scan, window
from ssm.sequence import not_finite

__all__ = [
    "neighbour",
    "passed",
    "ring_attention",
    "scan",
    "segments",
    "to_channels",
    "to_time",
    "window",
]


def to_channels(axes: Axes, x: jax.Array, channels: int = -1) -> jax.Array:
    """[B, L / T, .., H, ..] -> [B, L, .., H / T, ..], H the axis `channels`."""
    channels %= x.ndim
    return jax.lax.all_to_all(x, axes, channels, 1, tiled=True)


def to_time(axes: Axes, x: jax.Array, channels: int = -1) -> jax.Array:
    """The way back from `to_channels`."""
    channels %= x.ndim
    return jax.lax.all_to_all(x, axes, 1, channels, tiled=True)


def segments(axes: Axes, reset: jax.Array) -> jax.Array:
    """The numbers [B, L / T] of the segments that resets [B, L / T] begin; 0 is that of
    the initial state. One all-gather of [B] numbers."""
    own = jnp.cumsum(reset, axis=1, dtype=jnp.int32)
    counts = jax.lax.all_gather(own[:, -1], axes)
    before = jnp.arange(len(counts)) < jax.lax.axis_index(axes)
    return own + jnp.sum(jnp.where(before[:, None], counts, 0), 0)[:, None]


def ring_attention(
    axes: Axes,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Any,
    keys: Any,
    sees: Callable[[Any, Any], jax.Array],
    cache: tuple[jax.Array, jax.Array, Any] | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the keys of all parts that a query sees.

    Keys and values go round a ring of the devices; each adds what passes to a softmax
    that is kept as a maximum, a sum and a weighted sum, so that the logits of two parts
    exist at once and no more (https://arxiv.org/abs/2310.01889). What is not finite
    reaches the queries that see it and no others.

    Args:
        q: [B, L / T, heads, K]; k, v: [B, L / T, G, K] where G divides heads.
        queries, keys: trees of [B, L / T] or [L / T], what `sees` tells them by, such
            as positions and segments.
        sees: (queries, keys) -> bool [B, L / T, S], of S keys.
        cache: (k, v, keys) that all devices have besides, [B, S, G, K], or None.

    Returns:
        [B, L / T, heads, K], 0 for a query that sees nothing.
    """
    B, L, heads, K = q.shape
    G = k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    ill_query = not_finite(q)
    q = jnp.where(ill_query[..., None, None], 0, q).reshape(B, L, G, heads // G, K)

    def add(carry, block):
        most, total, o, ill = carry
        k, v, tags = block
        visible = sees(queries, tags)
        ill_token = not_finite(k) | not_finite(v)
        ill = ill | jnp.any(visible & ill_token[:, None], -1)
        k, v = (jnp.where(ill_token[..., None, None], 0, x) for x in (k, v))
        logits = jnp.einsum("btgnk,bsgk->btgns", q, k, preferred_element_type=dtype)
        logits = jnp.where(visible[:, :, None, None], logits * K**-0.5, -jnp.inf)
        largest = jnp.maximum(most, jax.lax.stop_gradient(logits.max(-1)))
        finite = jnp.where(jnp.isfinite(largest), largest, 0)
        p = jnp.exp(logits - finite[..., None])
        kept = jnp.exp(most - finite)
        o = o * kept[..., None] + jnp.einsum("btgns,bsgk->btgnk", p, v.astype(dtype))
        return largest, total * kept + p.sum(-1), o, ill

    add = jax.checkpoint(add)
    block = k, v, keys
    nothing = jnp.full(q.shape[:-1], -jnp.inf, dtype), jnp.zeros(q.shape[:-1], dtype)
    carry = *nothing, jnp.zeros(q.shape, dtype), ill_query
    carry = varying.like(carry, q, block, queries, cache)
    block = varying.like(block, q, queries)
    if cache is not None:
        carry = add(carry, varying.like(cache, q, block))
    count = jax.lax.axis_size(axes)
    ring = [(i, (i + 1) % count) for i in range(count)]

    def turn(carry, _):
        carry, block = carry
        carry = add(carry, block)
        block = jax.tree.map(lambda x: jax.lax.ppermute(x, axes, ring), block)
        return (carry, block), None

    (carry, block), _ = jax.lax.scan(turn, (carry, block), length=count - 1)
    _, total, o, ill = add(carry, block)
    o = o / jnp.where(total == 0, 1, total)[..., None]
    o = jnp.where(ill[:, :, None, None, None], jnp.nan, o)
    return o.reshape(B, L, heads, K).astype(q.dtype)
