"""`Attention` whose sequence is spread over T devices, in one of three forms:

    heads   every device attends for a part of the heads, over all tokens; queries, keys
            and values get there and the outputs back by all-to-alls
            (https://arxiv.org/abs/2309.14509)
    keys    for its own queries, with all heads; it is sent the keys and values of all
            tokens, or of a window that reaches no further than into the part before its
            own, what it sees of that
    ring    for its own queries; keys and values go round (`parallel.ring_attention`)

`form` says which, and why; `kernels.dispatch.backend_report` repeats it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels import dispatch, shards
from layers import softmax
from ssm import parallel
from ssm.sequence import Sequence

RING = 8192  # tokens from which no device is sent the keys of all


def form(heads: int, groups: int, length: int, reach: int) -> tuple[str, str]:
    """A form and the reason for it.

    Args:
        heads: of the queries; groups: of the keys and values.
        length: of the sequence; reach: tokens that a query sees.
    """
    devices, parts = shards.devices(shards.SPREAD), shards.devices(shards.TIME)
    if heads % devices == groups % devices == 0:
        return "heads", f"{devices} devices divide {heads} heads, {groups} of keys"
    not_heads = f"{devices} devices do not divide {heads} heads, {groups} of keys"
    if reach - 1 <= length // parts:
        return "keys", f"{not_heads}; a window of {reach} reaches one part back"
    if length < RING:
        return "keys", f"{not_heads}; {length} tokens are less than {RING}"
    return "ring", f"{not_heads}; {length} tokens are {RING} or more"


def causal(
    layer: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: Any,
    sequence: Sequence,
) -> jax.Array:
    """`layer._causal` of an `Attention`: [B, L, heads, K]."""
    reach = min(layer.reach, q.shape[1]) if cache is None else layer.reach
    name = _noted(q, k, reach)
    arguments = q, k, v, cache, sequence
    if name == "heads":
        return _by_heads(layer._causal, *arguments)
    parts = {"keys": _keys, "ring": _ring}[name]
    each, rows = shards.BY_TOKEN, shards.BY_ROW
    relayed = functools.partial(parts, layer)
    specs = each, each, each, rows, each
    return shards.run(layer._causal, arguments, specs, each, relayed)


def both_ways(
    layer: Any, q: jax.Array, k: jax.Array, v: jax.Array, sequence: Sequence
) -> jax.Array:
    """`layer._both_ways` of an `Attention`: [B, L, heads, K]."""
    name = _noted(q, k, q.shape[1])
    arguments = q, k, v, sequence
    if name == "heads":

        def call(q, k, v, cache, sequence):
            return layer._both_ways(q, k, v, sequence)

        return _by_heads(call, q, k, v, None, sequence)
    if name == "keys":  # which XLA brings to every device's queries
        return layer._both_ways(*arguments)
    relayed = functools.partial(_ring_both_ways, layer)
    each = shards.BY_TOKEN
    return shards.run(layer._both_ways, arguments, [each] * 4, each, relayed)


def of_frames(
    call: Callable,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: Any,
    sequence: Sequence,
    reach: int,
) -> jax.Array:
    """call(q, k, v, cache, sequence) of frames [B, L, places, heads, K], by heads where
    these divide; otherwise XLA brings every device what it needs."""
    name = _noted(q, k, reach)
    if name == "heads":
        return _by_heads(call, q, k, v, cache, sequence)
    return call(q, k, v, cache, sequence)


def _by_heads(call, q, k, v, cache, sequence):
    """Every device with all tokens of its heads, the last axis but one."""
    between = [None] * (q.ndim - 3)
    heads, rows = PartitionSpec(shards.ROWS, *between, shards.SPREAD), shards.BY_ROW
    of_cache = shards.WHOLE
    if cache is not None:
        of_cache = softmax.KVCache(heads, heads, rows)
    arguments = q, k, v, cache, sequence
    return shards.run(call, arguments, (heads, heads, heads, of_cache, rows), heads)


def _noted(q, k, reach):
    name, reason = form(q.shape[-2], k.shape[-2], q.shape[1], reach)
    dispatch.note("attention over devices", name, reason)
    return name


def _segments(axes, sequence, shape):
    if sequence.reset is None:
        return jnp.zeros(shape, jnp.int32)
    return parallel.segments(axes, sequence.reset)


def _cached(layer, q, cache, length):
    """The last R - 1 slots of a cache, empty where there is none: keys, values and
    segments; and R."""
    reach = layer.reach
    if cache is None:
        cache, reach = layer.init_state(q.shape[0]), min(reach, length)
    return *softmax.last_slots(cache, reach), reach


def _keys(layer, axes, q, k, v, cache, sequence):
    L, rank = q.shape[1], jax.lax.axis_index(axes)
    *cached, reach = _cached(layer, q, cache, L * jax.lax.axis_size(axes))
    segment = _segments(axes, sequence, q.shape[:2])
    own = k, v, segment
    if reach - 1 <= L:

        def seen(old, new):
            there = parallel.neighbour(axes, new[:, L - (reach - 1) :])
            there = jnp.where(rank == 0, old.astype(new.dtype), there)
            return jnp.concatenate([there, new], 1)

    else:

        def seen(old, new):
            every = jax.lax.all_gather(new, axes, axis=1, tiled=True)
            every = jnp.concatenate([old.astype(new.dtype), every], 1)
            return jax.lax.dynamic_slice_in_dim(every, rank * L, reach - 1 + L, 1)

    key, value, segments = map(seen, cached, own)
    inner = softmax.attend
    if sequence.reset is not None:
        inner = softmax.attend_isolated
    return layer._in_blocks(inner, q, key, value, segment, segments, reach)


def _ring(layer, axes, q, k, v, cache, sequence):
    L = q.shape[1]
    length = L * jax.lax.axis_size(axes)
    *cached, reach = _cached(layer, q, cache, length)
    position = jax.lax.axis_index(axes) * L + jnp.arange(L)
    key, value, segments = cached
    before = jnp.arange(1 - reach, 0)
    below = length + reach

    def sees(queries, keys):
        (i, segment), (j, key_segment) = queries, keys
        delay = i[:, None] - j
        same = segment[:, :, None] == key_segment[:, None]
        return (delay >= 0) & (delay < reach) & same

    tags = position, _segments(axes, sequence, q.shape[:2])
    first = None
    if cache is not None and reach > 1:
        key = layer._turn_to(key.astype(k.dtype), before, below)
        first = key, value.astype(v.dtype), (before, segments)
    q, k = (layer._turn_to(x, position, below) for x in (q, k))
    return parallel.ring_attention(axes, q, k, v, tags, tags, sees, first)


def _ring_both_ways(layer, axes, q, k, v, sequence):
    L = q.shape[1]
    position = jax.lax.axis_index(axes) * L + jnp.arange(L)
    exists = sequence.mask
    if exists is None:
        exists = jnp.ones(q.shape[:2], bool)
    tags = exists, _segments(axes, sequence, q.shape[:2])

    def sees(queries, keys):
        (_, segment), (exists, key_segment) = queries, keys
        return exists[:, None] & (segment[:, :, None] == key_segment[:, None])

    below = L * jax.lax.axis_size(axes)
    q, k = (layer._turn_to(x, position, below) for x in (q, k))
    return parallel.ring_attention(axes, q, k, v, tags, tags, sees)
