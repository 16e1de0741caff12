"""Transformers over frames: attention between frames and inside of them
(https://arxiv.org/abs/2102.05095, where the two forms here are "divided" and "joint"
space-time attention)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import shards
from layers import heads, spread_attention
from layers.attention import Attention
from layers.checks import (
    also_empty,
    at_least_one,
    checked_frames,
    divides,
    refuse_dt,
    within_context,
)
from layers.facts import L, Placement, examples
from layers.parameters import at_least_float32, linear, logical
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


class _OverFrames(nn.Module):
    """The fields that both forms have, which they describe, and the learned places."""

    REFUSES = ("dt",)

    features: int
    size: tuple[int, int]
    heads: int = 4
    context: int = 64
    dtype: jnp.dtype = jnp.float32

    @nn.nowrap
    def _placed(self, x):
        """x [..., h w, U] + p, the learned place p [h w, U]."""
        init = logical(nn.initializers.normal(0.02), None, "embed")
        p = self.param("place", init, x.shape[-2:])
        return x + p.astype(self.dtype)


class FrameAttention(_OverFrames):
    """y = a + s(norm(x + a + p)), a = t(x): causal attention t over time at every
    pixel, then attention s over the pixels of every frame.

    Time is told by rotary positions, place by a learned p [h w, U]. Elapsed times have
    no meaning for it: `dt` is a `ValueError`.

    Attributes:
        features: U, in `heads` heads.
        size: (h, w) of the frames.
        heads: their number, which divides features.
        context: frames of the longest call and of the cache.
        dtype: of activations; logits and the cache are float32 or better.
    """

    PLACEMENT = Placement("none", 8 / 3)
    EXAMPLES = examples(dict(heads=3, context=2 * L))

    @nn.compact
    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, h, w, U] -> y of that shape, a `KVCache` with a second axis h w.

        `ValueError` for a wrong shape, a dt, heads that do not divide, or a call longer
        than the context.
        """
        del train
        sequence = checked_frames(self, x, state, sequence)
        B, L, h, w, U = x.shape
        pixels = seq.zero_masked(x, sequence).reshape(B, L, h * w, U)
        rows = pixels.swapaxes(1, 2).reshape(B * h * w, L, U)
        each = functools.partial(jnp.repeat, repeats=h * w, axis=0)
        # Not -1: the cache of a context of one frame is empty.
        flat = jax.tree.map(lambda s: s.reshape(B * h * w, *s.shape[2:]), state)
        time = self._time()(name="time")
        a, new = time(rows, flat, jax.tree.map(each, sequence))
        a = a.reshape(B, h * w, L, U).swapaxes(1, 2)
        z = nn.LayerNorm(dtype=self.dtype, name="norm")(self._placed(pixels + a))
        space = Attention(
            U,
            self.heads,
            context=h * w,
            rotary=0.0,
            bidirectional=True,
            dtype=self.dtype,
            name="space",
        )
        with shards.rows_alone():  # frames are rows of it
            s, _ = space(z.reshape(B * L, h * w, U))
        y = (a + s.reshape(a.shape)).reshape(x.shape)
        new = jax.tree.map(lambda s: s.reshape(B, h * w, *s.shape[1:]), new)
        return seq.zero_masked(y, sequence).astype(self.dtype), new

    @nn.nowrap
    def init_state(self, batch_size: int) -> KVCache:
        """Empty caches, one per pixel."""
        places = self.size[0] * self.size[1]
        empty = self._time()().init_state(batch_size * places)
        shape = batch_size, places
        return jax.tree.map(lambda s: s.reshape(*shape, *s.shape[1:]), empty)

    @nn.nowrap
    def _time(self):
        return functools.partial(
            Attention,
            self.features,
            self.heads,
            context=self.context,
            dtype=self.dtype,
        )


class FullFrameAttention(_OverFrames):
    """y = W_out softmax(q k^T / sqrt(K)) v, where the pixels of a frame see all pixels
    of the last R frames, their own among them.

    Time is told by rotary positions, place by a learned p [h w, U] that is added to x.
    A call costs O(L R (h w)^2), its memory O(R (h w)^2). `dt` is a `ValueError`.

    Attributes:
        features: U, in `heads` heads of K = U / heads.
        size: (h, w) of the frames.
        heads: their number, which divides features.
        context: R, frames of the longest call and of the cache.
        dtype: of activations; logits and the cache are float32 or better.
    """

    PLACEMENT = Placement("none", 8 / 3)
    EXAMPLES = examples(dict(heads=3, context=2 * L))

    @nn.compact
    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, h, w, U] -> y of that shape, `KVCache` of frames [B, R-1, h w, ..].

        `ValueError` for a wrong shape, a dt, heads that do not divide, or a call longer
        than the context.
        """
        del train
        sequence = checked_frames(self, x, state, sequence)
        self._check(x, sequence)
        # Of an empty cache no more is looked at than the call is long.
        reach = x.shape[1] if state is None else self.context
        state = self.init_state(x.shape[0]) if state is None else state
        shape = x.shape
        x, sequence, restore = seq.compact(x, sequence)
        x = x.reshape(*shape[:2], -1, self.features).astype(self.dtype)
        x = self._placed(x)
        size = self.features // self.heads
        q, k, v = (
            heads.project(x, self.heads, size, name, self.dtype)
            for name in ("query", "key", "value")
        )
        values = functools.partial(self._attend, reach)
        if shards.devices(shards.TIME) > 1:
            o = spread_attention.of_frames(values, q, k, v, state, sequence, reach)
        else:
            o = values(q, k, v, state, sequence)
        o = o.reshape(*o.shape[:3], -1)
        y = linear(self.features, "out", self.dtype, ("mlp", "embed"))(o)
        new = remember(state, k, v, sequence)
        return restore(y.reshape(shape)).astype(self.dtype), new

    @nn.nowrap
    def init_state(self, batch_size: int) -> KVCache:
        """An empty cache."""
        size = self.features // self.heads
        places = self.size[0] * self.size[1]
        shape = batch_size, self.context - 1, places, self.heads, size
        return empty_cache(shape, at_least_float32(self.dtype))

    @nn.nowrap
    def _check(self, x, sequence):
        at_least_one(self, "heads", "context")
        divides(self, "heads", "features", self.features)
        refuse_dt(self, sequence)
        within_context(self, x, "frames")

    @nn.nowrap
    def _attend(self, R, q, k, v, cache, sequence):
        """[B, L, S, heads, K], frame by frame, each seeing R frames."""
        B, L, S, *_ = q.shape
        key, value, segments, segment = joined(cache, k, v, sequence, R)
        inner = attend if sequence.reset is None else attend_isolated

        def frame(i):
            def last(x):
                return jax.lax.dynamic_slice_in_dim(x, i, R, 1)

            visible = last(segments) == jax.lax.dynamic_slice_in_dim(segment, i, 1, 1)
            visible = jnp.repeat(visible, S, axis=1)[:, None]
            query = jax.lax.dynamic_index_in_dim(q, i, 1, keepdims=False)
            query = self._turn(query, jnp.full((S,), R - 1), R)
            keys = last(key).reshape(B, R * S, *key.shape[3:])
            keys = self._turn(keys, jnp.repeat(jnp.arange(R), S), R)
            values = last(value).reshape(keys.shape)
            return inner(query, keys, values, visible)

        o = jax.lax.map(jax.checkpoint(frame), jnp.arange(L))
        return jnp.moveaxis(o, 0, 1)

    @nn.nowrap
    def _turn(self, x, positions, below):
        size = x.shape[-1] // 2 * 2
        return rotary.rotate(x, positions, 10_000.0, size, below)
