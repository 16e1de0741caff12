"""Multiplies and adds: for a filter of a few taps, or a few steps after a long state.

Shifted multiplies, many to a pass over the output: with few taps it is long and there is
one pass; with few steps (decoding) it is short and stays in the cache.
"""

from functools import partial

import jax
import jax.numpy as jnp

UNROLLED = 16  # taps in one pass over the outputs


def unsupported(*arguments) -> str | None:
    return None


def convolve(v, k, k_reverse, state, segment, low):
    """In v's own precision, whatever `low` is; see reference.convolve."""
    batch, length, channels = v.shape
    if state is None:
        k = k[:, :length]
        state = jnp.zeros((batch, k.shape[1] - 1, channels), v.dtype)
    number = None
    if segment is not None:
        number = jnp.pad(segment, ((0, 0), (k.shape[1] - 1, 0)))
    y = _correlate(jnp.concatenate([state, v], 1), number, segment, k[:, ::-1])
    if k_reverse is None or length == 1:
        return y
    ahead = k_reverse[:, : length - 1]
    later = ((0, 0), (0, ahead.shape[1]))
    if segment is not None:
        number = jnp.pad(segment[:, 1:], later, constant_values=-1)
    return y + _correlate(jnp.pad(v[:, 1:], (*later, (0, 0))), number, segment, ahead)


@jax.custom_vjp
def _correlate(whole, number, segment, taps):
    """y[t] = sum_j taps[j] whole[t+j], where number[t+j] is segment[t]."""
    count = taps.shape[1]
    taps = jax.lax.optimization_barrier(taps.T)  # or every pass would read it across
    seen = _windows(whole, number, segment, count)
    passes, left = divmod(count, UNROLLED)

    def some(i, y):
        for j in range(UNROLLED):
            lag = UNROLLED * i + j
            y = y + taps[lag] * seen(lag)
        return y

    y = jnp.zeros_like(whole[:, : whole.shape[1] - count + 1])
    if passes == 1:
        y = some(0, y)
    elif passes:
        y = jax.lax.fori_loop(0, passes, some, y)
    for lag in range(count - left, count):
        y = y + taps[lag] * seen(lag)
    return y


def _windows(whole, number, segment, count):
    """seen(j) = whole[t+j] for all t, zero where another segment is."""
    steps = whole.shape[1] - count + 1

    def seen(j):
        here = _part(whole, j, steps)
        if number is None:
            return here
        return jnp.where((_part(number, j, steps) == segment)[..., None], here, 0)

    return seen


def _part(x, start, count):
    return jax.lax.dynamic_slice_in_dim(x, start, count, 1)


def _forward(*arguments):
    return _correlate(*arguments), arguments


def _backward(saved, dy):
    whole, number, segment, taps = saved
    by_steps = dy.shape[1] < taps.shape[1]
    form = _backward_by_steps if by_steps else _backward_by_taps
    dwhole, dtaps = form(whole, number, segment, taps, dy)
    return dwhole, None, None, dtaps


def _backward_by_taps(whole, number, segment, taps, dy):
    """Tap after tap for their gradient, or XLA would hold `whole` once per tap."""
    count = taps.shape[1]
    seen = _windows(whole, number, segment, count)
    around = ((0, 0), (count - 1, count - 1))
    after = None
    if number is not None:
        after = jnp.pad(segment, around, constant_values=-1)
    dwhole = _correlate(jnp.pad(dy, (*around, (0, 0))), after, number, taps[:, ::-1])
    dtaps = jax.lax.map(lambda j: (dy * seen(j)).sum((0, 1)), jnp.arange(count))
    return dwhole, dtaps.T


def _backward_by_steps(whole, number, segment, taps, dy):
    count = taps.shape[1]
    taps = jax.lax.optimization_barrier(taps.T)

    def step(t, gradients):
        dwhole, dtaps = gradients
        here = _part(dy, t, 1)
        if number is not None:
            same = _part(number, t, count) == _part(segment, t, 1)
            here = jnp.where(same[..., None], here, 0)
        window = _part(dwhole, t, count) + here * taps
        dwhole = jax.lax.dynamic_update_slice_in_dim(dwhole, window, t, 1)
        return dwhole, dtaps + (here * _part(whole, t, count)).sum(0)

    zero = jnp.zeros_like(whole), jnp.zeros_like(taps)
    dwhole, dtaps = jax.lax.fori_loop(0, dy.shape[1], step, zero)
    return dwhole, dtaps.T


_correlate.defvjp(_forward, _backward)
