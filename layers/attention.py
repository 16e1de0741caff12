"""Softmax attention, full or over a sliding window, with rotary positions
(https://arxiv.org/abs/1706.03762, https://arxiv.org/abs/2104.09864)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers import heads
from layers.checks import (
    also_empty,
    at_least_one,
    at_least_zero,
    checked,
    divides,
    recurrent,
    refuse_dt,
    within_context,
)
from layers.facts import L, Placement, examples
from layers.inside import expose
from layers.parameters import at_least_float32, linear
from ssm import rotary
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
    skipped = cache.key.shape[1] - (reach - 1)
    key, value = (
        jnp.concatenate([old[:, skipped:].astype(new.dtype), new], axis=1)
        for old, new in ((cache.key, k), (cache.value, v))
    )
    before = jnp.where(filled(cache)[:, skipped:], 0, -1)
    return key, value, jnp.concatenate([before, segment], axis=1), segment


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
    ill_query = _ill(q)
    ill_token = _ill(k) | _ill(v)
    q = jnp.where(ill_query[..., None, None], 0, q)
    k, v = (jnp.where(ill_token[..., None, None], 0, z) for z in (k, v))
    ill = ill_query | jnp.any(visible & ill_token[:, None], axis=-1)
    return jnp.where(ill[..., None, None], jnp.nan, attend(q, k, v, visible))


def _ill(x):
    """Which tokens of x [B, L, heads, K] are not finite."""
    return ~jnp.all(jnp.isfinite(x), axis=(-2, -1))


class Attention(nn.Module):
    """y = W_out softmax(q k^T / sqrt(K)) v over the last R tokens, itself among them.

    q and k are turned by their positions. R is `window`, or `context`: full attention
    over whatever a call and the cache hold, up to that capacity, beyond which the
    oldest tokens are dropped. A window costs O(L window), in memory too.

    Elapsed times have no meaning for it: `dt` is a `ValueError`.

    Attributes:
        features: H, in `heads` heads of K = H / heads.
        heads: their number; kv_heads: G of the keys and values, which divides it; 0
            for as many.
        context: the longest call and the capacity of the cache. Not with `window`.
        window: R of a sliding window; 0 for full attention.
        rotary: share of the K channels that turn, in whole pairs; 0 for no positions.
        base: b of the rotary frequencies b^(-2 i / size), see `ssm.rotary`.
        bidirectional: every token sees all others of its segment; then no state.
        dtype: of activations; logits and the cache are float32 or better.
    """

    REFUSES = ("dt",)
    PLACEMENT = Placement("none", 8 / 3)
    EXAMPLES = examples(
        dict(heads=3, context=2 * L),
        window=dict(heads=1, window=4),
        bidirectional=dict(heads=3, kv_heads=1, context=2 * L, bidirectional=True),
    )

    features: int
    heads: int = 4
    kv_heads: int = 0
    context: int = 1024
    window: int = 0
    rotary: float = 1.0
    base: float = 10_000.0
    bidirectional: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H], `KVCache` (None if bidirectional).

        `ValueError` for a wrong shape, a dt, heads that do not divide, or a call longer
        than the context.
        """
        del train
        sequence = checked(self, x, state, sequence)
        reach, G, K = self._sizes()
        refuse_dt(self, sequence)
        if not self.window:
            within_context(self, x)
        x, sequence, restore = seq.compact(x, sequence)
        q = heads.project(x, self.heads, K, "query", self.dtype)
        k = heads.project(x, G, K, "key", self.dtype)
        v = heads.project(x, G, K, "value", self.dtype)
        v = expose(self, "values", v)
        if self.bidirectional:
            o, cache = self._all_to_all(q, k, v, sequence), None
        else:
            o, cache = self._causal(q, k, v, state, sequence, reach)
        o = expose(self, "mixed", o).reshape(*x.shape[:2], -1)
        y = linear(self.features, "out", self.dtype, ("mlp", "embed"))(o)
        return restore(y).astype(self.dtype), cache

    @nn.nowrap
    def init_state(self, batch_size: int) -> KVCache:
        """An empty cache."""
        recurrent(self)
        reach, G, K = self._sizes()
        return empty_cache((batch_size, reach - 1, G, K), at_least_float32(self.dtype))

    @nn.nowrap
    def _sizes(self):
        """R, G, K."""
        at_least_one(self, "heads", "context")
        at_least_zero(self, "kv_heads", "window")
        G = self.kv_heads or self.heads
        divides(self, "heads", "features", self.features)
        if self.kv_heads:
            divides(self, "kv_heads", "heads", self.heads)
        if self.window and self.bidirectional:
            raise ValueError(
                f"window: must be 0 with bidirectional=True, where every token sees "
                f"all others, got {self.window}"
            )
        if not 0 <= self.rotary <= 1:
            raise ValueError(f"rotary: must be in [0, 1], got {self.rotary}")
        return self.window or self.context, G, self.features // self.heads

    @nn.nowrap
    def _turn(self, x, start=0):
        """Of tokens x [B, L, heads, K], the first at the position `start`."""
        size = int(x.shape[-1] * self.rotary) // 2 * 2
        if not size:
            return x
        end = start + x.shape[1]
        return rotary.rotate(x, jnp.arange(start, end), self.base, size, below=end)

    @nn.nowrap
    def _all_to_all(self, q, k, v, sequence):
        visible = None
        if sequence.reset is not None:
            segment = jnp.cumsum(sequence.reset, axis=1)
            visible = segment[:, :, None] == segment[:, None]
        if sequence.mask is not None:
            exists = sequence.mask[:, None]
            # A token that does not exist sees itself, so that no row is empty.
            exists = exists | jnp.eye(q.shape[1], dtype=bool)
            visible = exists if visible is None else visible & exists
        q, k = self._turn(q), self._turn(k)
        if sequence.reset is not None:
            return attend_isolated(q, k, v, visible)
        return attend(q, k, v, visible)

    @nn.nowrap
    def _causal(self, q, k, v, cache, sequence, reach):
        length = q.shape[1]
        empty = cache is None
        cache = self.init_state(q.shape[0]) if empty else cache
        new = remember(cache, k, v, sequence)
        if empty and sequence.reset is None and length <= reach:
            # Padding stands on the right, where no token that exists looks.
            return attend(self._turn(q), self._turn(k), v, is_causal=True), new
        # Of an empty cache no more is looked at than the call is long.
        reach = min(reach, length) if empty else reach
        key, value, segments, segment = joined(cache, k, v, sequence, reach)
        inner = attend if sequence.reset is None else attend_isolated
        return self._in_blocks(inner, q, key, value, segment, segments, reach), new

    @nn.nowrap
    def _in_blocks(self, inner, q, key, value, segment, segments, reach):
        """Queries [B, L] in blocks of at most R: block i sees the R - 1 keys before it
        and its own, so a long call costs O(L R).

        key, value and segments [B, R - 1 + L] start R - 1 tokens before the queries;
        inner is `attend` or `attend_isolated`.
        """
        length = q.shape[1]
        size = min(length, reach)
        blocks = -(-length // size)
        pad = blocks * size - length

        def padded(x, fill=0):
            width = [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2)
            return jnp.pad(x, width, constant_values=fill)

        q, segment = padded(q), padded(segment)
        key, value, segments = padded(key), padded(value), padded(segments)
        ahead = reach - 1
        delay = jnp.arange(size)[:, None] + ahead - jnp.arange(ahead + size)
        near = (delay >= 0) & (delay < reach)

        def block(i):
            def own(x, width):
                return jax.lax.dynamic_slice_in_dim(x, i * size, width, 1)

            k, v, key_segment = (own(x, ahead + size) for x in (key, value, segments))
            visible = near & (own(segment, size)[:, :, None] == key_segment[:, None])
            return inner(self._turn(own(q, size), ahead), self._turn(k), v, visible)

        if blocks == 1:
            return block(0)[:, :length]
        o = jax.lax.map(jax.checkpoint(block), jnp.arange(blocks))
        o = jnp.moveaxis(o, 0, 1)
        return o.reshape(o.shape[0], -1, *o.shape[3:])[:, :length]
