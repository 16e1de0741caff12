"""Softmax attention as functions of arrays, and the cache of its keys and values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssm import sequence as seq
from ssm.sequence import Sequence


class KVCache(NamedTuple):
    """The last tokens that a later one may see, right-aligned."""

    key: jax.Array  # [B, R-1, G, K], not turned: positions count from the query
    value: jax.Array  # [B, R-1, G, K]
    count: jax.Array  # [B] int32, how many of them exist


def empty_cache(shape: tuple[int, ...], dtype: jnp.dtype) -> KVCache:
    """A `KVCache` of `shape` [B, R-1, ...] in which no token is."""
    return KVCache(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(shape[0], jnp.int32)
    )


def filled(cache: KVCache) -> jax.Array:
    """Which slots hold a token, [B, R-1] bool."""
    slots = jnp.arange(cache.key.shape[1])
    return slots >= cache.key.shape[1] - cache.count[:, None]


def remember(cache: KVCache, k: jax.Array, v: jax.Array, sequence: Sequence) -> KVCache:
    """The cache after keys and values [B, L, ...] with right padding only."""
    real = jnp.ones(k.shape[:2], bool)
    return KVCache(
        seq.window(cache.key, k, sequence),
        seq.window(cache.value, v, sequence),
        seq.lengths(seq.window(filled(cache), real, sequence)),
    )


def joined(
    cache: KVCache, k: jax.Array, v: jax.Array, sequence: Sequence, reach: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Keys, values and segments [B, R - 1 + L, ...] of the last R - 1 slots of a cache
    and a call, R = `reach`, and the segments [B, L] of the call alone. The cache is of
    segment 0, an empty slot of none."""
    segment = jnp.zeros(k.shape[:2], jnp.int32)
    if sequence.reset is not None:
        segment = jnp.cumsum(sequence.reset, axis=1)
    before = last_slots(cache, reach)
    key, value, segments = (
        jnp.concatenate([old.astype(new.dtype), new], axis=1)
        for old, new in zip(before, (k, v, segment), strict=True)
    )
    return key, value, segments, segment


def last_slots(cache: KVCache, reach: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys, values and segments [B, R - 1, ...] of the last R - 1 slots of a cache, R =
    `reach`: 0, or -1 of an empty one."""
    skipped = cache.key.shape[1] - (reach - 1)
    segments = jnp.where(filled(cache), 0, -1)
    return cache.key[:, skipped:], cache.value[:, skipped:], segments[:, skipped:]


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the keys that a query sees, [B, L, heads, K].

    q [B, L, heads, K], k and v [B, S, G, K] where G divides heads; visible bool,
    broadcastable to [B, L, S]; the softmax is float32 or better.
    """
    mask = None if visible is None else visible[:, None]
    if q.dtype != jnp.float64:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=is_causal)
    # That function rounds its softmax to float32 whatever it is given.
    B, L, heads, K = q.shape
    groups = q.reshape(B, L, k.shape[2], heads // k.shape[2], K)
    logits = jnp.einsum("btgik,bsgk->bgits", groups, k) * K**-0.5
    if is_causal:
        mask = jnp.tril(jnp.ones((L, k.shape[1]), bool))[None, None]
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, jnp.finfo(logits.dtype).min)
    p = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("bgits,bsgk->btgik", p, v).reshape(q.shape)


def attend_isolated(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array
) -> jax.Array:
    """`attend`, where what is not finite reaches the queries that see it and no other:
    a weight of 0 alone would let NaN through, in the products and in their gradients.
    """
    ill_query = seq.not_finite(q)
    ill_token = seq.not_finite(k) | seq.not_finite(v)
    q = jnp.where(ill_query[..., None, None], 0, q)
    k, v = (jnp.where(ill_token[..., None, None], 0, z) for z in (k, v))
    ill = ill_query | jnp.any(visible & ill_token[:, None], axis=-1)
    return jnp.where(ill[..., None, None], jnp.nan, attend(q, k, v, visible))
