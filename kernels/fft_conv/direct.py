"""Multiplies and adds: for a filter of a few taps, or a few steps after a long state.

Shifted multiplies, many to a pass over the output: with few taps it is long and there
is one pass; with few steps (decoding) it is short and stays in the cache.
"""

import jax
import jax.numpy as jnp

from kernels import varying

UNROLLED = 16  # taps in one pass over the outputs


def unsupported(*arguments) -> str | None:
    return None


def convolve(v, k, k_reverse, state, segment, low):
    """In v's own precision, whatever `low` is; see reference.convolve."""
    batch, length, channels = v.shape
    if state is None:
        k = k[:, :length]
        state = jnp.zeros((batch, k.shape[1] - 1, channels), v.dtype)
        state = varying.like(state, v)
    number = None
    if segment is not None:
        number = jnp.pad(segment, ((0, 0), (k.shape[1] - 1, 0)))
    y = _correlate(jnp.concatenate([state, v], 1), number, segment, k[:, ::-1])
    if k_reverse is None or length == 1:
        return y
    ahead = k_reverse[:, : length - 1]
    margin = ((0, 0), (0, ahead.shape[1]))
    if segment is not None:
        number = jnp.pad(segment[:, 1:], margin, constant_values=-1)
    return y + _correlate(jnp.pad(v[:, 1:], (*margin, (0, 0))), number, segment, ahead)


@jax.custom_vjp
def _correlate(padded, number, segment, taps):
    """y[t] = sum_j taps[j] padded[t+j], where number[t+j] is segment[t]."""
    count = taps.shape[1]
    steps = padded.shape[1] - count + 1
    rows = _rows(taps)
    window = _windows(padded, number, segment, count)
    zero = jnp.zeros((padded.shape[0], steps, padded.shape[2]), padded.dtype)
    return _sum(count, lambda j: rows[j] * window(j), varying.like(zero, padded))


def _forward(*arguments):
    return _correlate(*arguments), arguments


def _backward(saved, dy):
    """dpadded[i] = sum_j taps[j] dy[i-j], dtaps[j] = sum_t padded[t+j] dy[t], where the
    segments are the same."""
    padded, number, segment, taps = saved
    by_steps = dy.shape[1] < taps.shape[1]
    form = _backward_by_steps if by_steps else _backward_by_taps
    dpadded, dtaps = form(padded, number, segment, taps, dy)
    return dpadded, None, None, dtaps


_correlate.defvjp(_forward, _backward)


def _backward_by_taps(padded, number, segment, taps, dy):
    """Tap after tap for their gradient, or XLA would hold `padded` once per tap."""
    count = taps.shape[1]
    window = _windows(padded, number, segment, count)
    margin = ((0, 0), (count - 1, count - 1))
    after = None
    if number is not None:
        after = jnp.pad(segment, margin, constant_values=-1)
    dpadded = _correlate(jnp.pad(dy, (*margin, (0, 0))), after, number, taps[:, ::-1])
    dtaps = jax.lax.map(lambda j: (dy * window(j)).sum((0, 1)), jnp.arange(count))
    return dpadded, dtaps.T


def _backward_by_steps(padded, number, segment, taps, dy):
    """What each step gives to all taps, and to all inputs."""
    count, steps = taps.shape[1], dy.shape[1]
    shifted = jnp.pad(_rows(taps), ((steps - 1, steps - 1), (0, 0)))[None]

    def same(t, start, length, term):
        if number is None:
            return term
        linked = _part(number, start, length) == _part(segment, t, 1)
        return jnp.where(linked[..., None], term, 0)

    def to_taps(t):
        return same(t, t, count, _part(dy, t, 1) * _part(padded, t, count))

    def to_inputs(t):
        tap = _part(shifted, steps - 1 - t, padded.shape[1])
        return same(t, 0, padded.shape[1], _part(dy, t, 1) * tap)

    dtaps = _sum(steps, to_taps, jnp.zeros_like(padded[:, :count])).sum(0)
    return _sum(steps, to_inputs, jnp.zeros_like(padded)), dtaps.T


def _sum(count, term, total):
    """total + term(0) + ... + term(count - 1), UNROLLED terms to a pass."""
    passes, left = divmod(count, UNROLLED)

    def some(i, total):
        for j in range(UNROLLED):
            total = total + term(UNROLLED * i + j)
        return total

    if passes:
        total = jax.lax.fori_loop(0, passes, some, total)
    for j in range(count - left, count):
        total = total + term(j)
    return total


def _rows(taps):
    """[K, H], made once: each pass would read across [H, K] again."""
    return jax.lax.optimization_barrier(taps.T)


def _windows(padded, number, segment, count):
    """window(j) = padded[t+j] for all t, zero where another segment is."""
    steps = padded.shape[1] - count + 1

    def window(j):
        part = _part(padded, j, steps)
        if number is None:
            return part
        return jnp.where((_part(number, j, steps) == segment)[..., None], part, 0)

    return window


def _part(x, start, count):
    return jax.lax.dynamic_slice_in_dim(x, start, count, 1)
