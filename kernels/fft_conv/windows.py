"""From a call of fft_conv to what the fast forms compute.

Without resets, causal, after a state or two-sided, a call is a window of one linear
convolution,

    y[t] = (v * taps)[start + t],  t < count

which a backend computes as `window(v, taps, start, count)`; with resets it is
`segmented.causal` on the backend's transform. All [B, H, time] and [H, taps].
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels import compat
from kernels.fft_conv import segmented

# Elements of the input that are transformed at a time. A library that plans an FFT in
# 32-bit sizes fails beyond 4 GB, and on an accelerator the spectra, four times the
# input, must fit beside everything else.
MOST = 2**27
# With resets on a CPU: the spectra of a piece stay in its caches, twice as fast.
CACHED = 2**19


def convolve(window, transform, v, k, k_reverse, state, segment):
    """y [B, L, H]; v [B, L, H] and the rest as in reference.convolve."""
    v = v.swapaxes(1, 2)
    state = None if state is None else state.swapaxes(1, 2)

    def run(v, k, k_reverse, state, segment):
        if segment is None:
            return _whole(window, v, k, k_reverse, state)
        return _segments(window, transform, v, k, k_reverse, state, segment)

    cached = segment is not None and compat.platform() == "cpu"
    limit = CACHED if cached else MOST
    return _in_pieces(run, limit, v, k, k_reverse, state, segment).swapaxes(1, 2)


def least(inputs, taps, start, count):
    """Points of the shortest circular convolution that has the window unharmed."""
    return max(start + count, inputs + taps - 1 - start)


def _whole(window, v, k, k_reverse, state):
    length = v.shape[-1]
    if state is not None:
        return window(jnp.concatenate([state, v], -1), k, k.shape[1] - 1, length)
    k = k[:, :length]
    if k_reverse is None or length == 1:
        return window(v, k, 0, length)
    k_reverse = k_reverse[:, : length - 1]
    taps = jnp.concatenate([k_reverse[:, ::-1], k], 1)
    return window(v, taps, k_reverse.shape[1], length)


def _segments(window, transform, v, k, k_reverse, state, segment):
    length = v.shape[-1]
    y = segmented.causal(transform, v, k[:, :length], segment)
    if state is not None and state.shape[-1]:
        reach = min(length, state.shape[-1])
        first = segment[:, None, :reach] == 0
        response = window(state, k, k.shape[1] - 1, reach)
        response = jnp.where(first, response, 0)
        y = y + jnp.pad(response, ((0, 0), (0, 0), (0, length - reach)))
    if k_reverse is not None and length > 1:
        # the future, seen backwards, is a causal filter without lag 0
        past = jnp.pad(k_reverse[:, : length - 1], ((0, 0), (1, 0)))
        turned = segment[:, -1:] - segment[:, ::-1]
        y = y + segmented.causal(transform, v[..., ::-1], past, turned)[..., ::-1]
    return y


def _in_pieces(run, limit, v, *others):
    """`run`, on at most `limit` elements of v at a time if that can be had: on some
    channels, and where one of them is too many, on some examples."""
    batch, channels, length = v.shape
    if v.size <= limit or compat.partitioned_by_xla():
        return run(v, *others)
    group = _divisor(channels, limit // (batch * length))
    part = _divisor(batch, limit // (group * length))
    by_example = partial(_mapped, run, part, (0, None, None, 0, 0))
    return _mapped(by_example, group, (1, 0, 0, 1, None), v, *others)


def _divisor(number, limit):
    """The largest divisor of `number` up to `limit`, at least 1."""
    return next(d for d in range(max(1, min(number, limit)), 0, -1) if number % d == 0)


def _mapped(run, size, axes, *inputs):
    """run(*inputs), piece after piece of `size` along `axes` (None: the whole); the
    result is cut as the first input is."""
    if size == inputs[0].shape[axes[0]]:
        return run(*inputs)
    split = {
        i: jnp.moveaxis(x.reshape(*x.shape[:a], -1, size, *x.shape[a + 1 :]), a, 0)
        for i, (x, a) in enumerate(zip(inputs, axes, strict=True))
        if x is not None and a is not None
    }
    y = jax.lax.map(
        lambda pieces: run(*(pieces.get(i, x) for i, x in enumerate(inputs))), split
    )
    return jnp.moveaxis(y, 0, axes[0]).reshape(inputs[0].shape)
