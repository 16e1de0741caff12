"""Softmax attention, full or over a sliding window, with rotary positions
(https://arxiv.org/abs/1706.03762, https://arxiv.org/abs/2104.09864)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import shards
from layers import heads, spread_attention
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
from layers.softmax import (
    KVCache,
    attend,
    attend_isolated,
    empty_cache,
    joined,
    remember,
)
from ssm import rotary
from ssm import sequence as seq


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
        G, K = self._sizes()
        refuse_dt(self, sequence)
        if not self.window:
            within_context(self, x)
        x, sequence, restore = seq.compact(x, sequence)
        q = heads.project(x, self.heads, K, "query", self.dtype)
        k = heads.project(x, G, K, "key", self.dtype)
        v = heads.project(x, G, K, "value", self.dtype)
        v = expose(self, "values", v)
        o, cache = self._attended(q, k, v, state, sequence)
        o = expose(self, "mixed", o).reshape(*x.shape[:2], -1)
        y = linear(self.features, "out", self.dtype, ("mlp", "embed"))(o)
        return restore(y).astype(self.dtype), cache

    @nn.nowrap
    def init_state(self, batch_size: int) -> KVCache:
        """An empty cache."""
        recurrent(self)
        G, K = self._sizes()
        shape = batch_size, self.reach - 1, G, K
        return empty_cache(shape, at_least_float32(self.dtype))

    @property
    def reach(self) -> int:
        """R."""
        return self.window or self.context

    @nn.nowrap
    def _sizes(self):
        """G, K."""
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
        return G, self.features // self.heads

    @nn.nowrap
    def _turn(self, x, start=0):
        """Of tokens x [B, L, heads, K], the first at the position `start`."""
        end = start + x.shape[1]
        return self._turn_to(x, jnp.arange(start, end), end)

    @nn.nowrap
    def _turn_to(self, x, positions, below):
        """Of tokens x [B, L, heads, K] at these positions [L]."""
        size = int(x.shape[-1] * self.rotary) // 2 * 2
        if not size:
            return x
        return rotary.rotate(x, positions, self.base, size, below)

    @nn.nowrap
    def _attended(self, q, k, v, cache, sequence):
        """What the tokens see [B, L, heads, K], and the next cache."""
        split = shards.devices(shards.TIME) > 1
        if self.bidirectional:
            if split:
                return spread_attention.both_ways(self, q, k, v, sequence), None
            return self._both_ways(q, k, v, sequence), None
        if split:
            o = spread_attention.causal(self, q, k, v, cache, sequence)
        else:
            o = self._causal(q, k, v, cache, sequence)
        cache = self.init_state(q.shape[0]) if cache is None else cache
        return o, remember(cache, k, v, sequence)

    @nn.nowrap
    def _both_ways(self, q, k, v, sequence):
        """Every token sees all others of its segment."""
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
    def _causal(self, q, k, v, cache, sequence):
        """Every token sees the last R; cache None: nothing was before."""
        length, reach = q.shape[1], self.reach
        if cache is None and sequence.reset is None and length <= reach:
            # Padding stands on the right, where no token that exists looks.
            return attend(self._turn(q), self._turn(k), v, is_causal=True)
        # Of an empty cache no more is looked at than the call is long.
        reach = min(reach, length) if cache is None else reach
        cache = self.init_state(q.shape[0]) if cache is None else cache
        key, value, segments, segment = joined(cache, k, v, sequence, reach)
        inner = attend if sequence.reset is None else attend_isolated
        return self._in_blocks(inner, q, key, value, segment, segments, reach)

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
