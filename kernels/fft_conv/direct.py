"""Multiplies and adds: for a filter of a few taps, or a few steps after a long state.

Few taps are shifted multiplies, which XLA fuses into one pass over the input; few steps
(decoding) are each one dot product with the window of inputs before it.
"""

from functools import partial

import jax
import jax.numpy as jnp

MOST = 128  # taps or steps: each is an operation of its own to compile


def unsupported(u, k, *others) -> str | None:
    few = min(u.shape[1], k.shape[1])
    if few > MOST:
        return f"more than {MOST} taps and steps: K={k.shape[1]}, L={u.shape[1]}"
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


def _correlate(whole, number, segment, taps):
    """y[t] = sum_j taps[j] whole[t+j], where number[t+j] is segment[t]."""
    steps = whole.shape[1] - taps.shape[1] + 1
    if steps < taps.shape[1]:
        return _by_steps(whole, number, segment, taps, steps)
    return _by_taps(whole, taps, number, segment)


def _by_steps(whole, number, segment, taps, steps):
    count = taps.shape[1]
    y = []
    for t in range(steps):
        seen = whole[:, t : t + count]
        if number is not None:
            same = number[:, t : t + count] == segment[:, t : t + 1]
            seen = jnp.where(same[..., None], seen, 0)
        y.append((seen * taps.T).sum(1))
    return jnp.stack(y, 1)


@jax.custom_vjp
def _by_taps(whole, taps, number, segment):
    y = 0
    for j in range(taps.shape[1]):
        y = y + taps[:, j] * _seen(whole, number, segment, j, taps.shape[1])
    return y


def _seen(whole, number, segment, j, count):
    """whole[t+j], zero where another segment begins between."""
    steps = whole.shape[1] - count + 1
    moved = partial(jax.lax.dynamic_slice_in_dim, slice_size=steps, axis=1)
    here = moved(whole, j)
    if number is None:
        return here
    return jnp.where((moved(number, j) == segment)[..., None], here, 0)


def _forward(*arguments):
    return _by_taps(*arguments), arguments


def _backward(saved, dy):
    """Tap after tap for their gradient, or XLA would hold `whole` once per tap."""
    whole, taps, number, segment = saved
    count = taps.shape[1]

    def tap(j):
        return (dy * _seen(whole, number, segment, j, count)).sum((0, 1))

    around = ((0, 0), (count - 1, count - 1))
    after = None
    if number is not None:
        after = jnp.pad(segment, around, constant_values=-1)
    dwhole = _by_taps(jnp.pad(dy, (*around, (0, 0))), taps[:, ::-1], after, number)
    return dwhole, jax.lax.map(tap, jnp.arange(count)).T, None, None


_by_taps.defvjp(_forward, _backward)
