"""One FFT of a fast length >= L + K - 1 in float32 or float64.

Without resets the carried inputs are put before the new ones, and the wrapped part of
the circular convolution falls on them (overlap-save). With resets, recursive halving:
at each level the left half of a block reaches the right half only within the segment
that spans the middle, which is a convolution between two masks: exact, of static shape,
O(L log^2 L).
"""

from functools import partial

import jax
import jax.numpy as jnp
from scipy.fft import next_fast_len

BASE = 16  # blocks below this length are summed lag by lag


def unsupported(*arguments) -> str | None:
    return None


def convolve(v, k, k_reverse, state, segment):
    """v [B, L, H], k [H, K]; see reference.convolve."""
    v = v.swapaxes(1, 2)
    state = None if state is None else state.swapaxes(1, 2)
    if segment is None:
        y = _whole(v, k, k_reverse, state)
    else:
        y = _segments(v, k, state, segment)
        if k_reverse is not None:
            # the future, seen backwards, is a causal filter without lag 0
            past = jnp.pad(k_reverse, ((0, 0), (1, 0)))
            turned = segment[:, -1:] - segment[:, ::-1]
            y = y + _segments(v[..., ::-1], past, None, turned)[..., ::-1]
    return y.swapaxes(1, 2)


def _whole(v, k, k_reverse, state):
    length = v.shape[-1]
    if state is not None:
        v = jnp.concatenate([state, v], -1)
        size = next_fast_len(v.shape[-1], real=True)
        return circular(v, k, size)[..., k.shape[1] - 1 :][..., :length]
    k = k[:, :length]
    ahead = 0
    if k_reverse is not None and length > 1:
        k_reverse = k_reverse[:, : length - 1]
        ahead = k_reverse.shape[1]
    size = next_fast_len(length + max(k.shape[1] - 1, ahead), real=True)
    if ahead:
        gap = jnp.zeros((k.shape[0], size - k.shape[1] - ahead), k.dtype)
        k = jnp.concatenate([k, gap, k_reverse[:, ::-1]], 1)
    return circular(v, k, size)[..., :length]


def _segments(v, k, state, segment):
    """Causal convolution within segments. v [B, H, L], segment [B, L]."""
    length = v.shape[-1]
    before = 0 if state is None else state.shape[-1]
    if before:
        v = jnp.concatenate([state, v], -1)
        segment = jnp.pad(segment, ((0, 0), (before, 0)))
    total = v.shape[-1]
    k = k[:, :total]
    size = BASE
    while size < total:
        size *= 2
    v = jnp.pad(v, ((0, 0), (0, 0), (0, size - total)))
    segment = jnp.pad(segment, ((0, 0), (0, size - total)), mode="edge")
    y = _near(v, k, segment)
    half = BASE
    while half < total:
        y = y + _across(v, k, segment, half)
        half *= 2
    return y[..., before:][..., :length]


def _near(v, k, segment):
    """All pairs inside blocks of BASE steps."""
    blocks = (-1, BASE)
    v = v.reshape(*v.shape[:-1], *blocks)
    segment = segment.reshape(segment.shape[0], 1, *blocks)
    y = 0
    for lag in range(min(BASE, k.shape[1])):
        moved = jnp.pad(v, ((0, 0),) * 3 + ((lag, 0),))[..., :BASE]
        number = jnp.pad(segment, ((0, 0),) * 3 + ((lag, 0),), constant_values=-1)
        same = number[..., :BASE] == segment
        y = y + jnp.where(same, k[:, lag, None, None] * moved, 0)
    return y.reshape(*y.shape[:2], -1)


def _across(v, k, segment, half):
    """What left halves of blocks of 2 * half steps give to right halves."""
    batch, channels, length = v.shape
    blocks = length // (2 * half)
    reach = half
    while reach // 2 >= k.shape[1] - 1 and reach > 1:
        reach //= 2
    v = v.reshape(batch, channels, blocks, 2 * half)[..., half - reach : half]
    number = segment.reshape(batch, 1, blocks, 2 * half)
    middle = number[..., half : half + 1]
    left = number[..., half - reach : half] == middle
    right = number[..., half : half + reach] == middle
    taps = k[:, None, : 2 * reach]
    given = circular(jnp.where(left, v, 0), taps, 2 * reach)[..., reach:]
    given = jnp.where(right, given, 0)
    given = jnp.pad(given, ((0, 0),) * 3 + ((half, half - reach),))
    return given.reshape(batch, channels, length)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def circular(v, k, size):
    """Circular convolution of `size` points, last axis; k broadcasts against v."""
    return jnp.fft.irfft(jnp.fft.rfft(v, size) * jnp.fft.rfft(k, size), size)


def _circular_forward(v, k, size):
    return circular(v, k, size), (v, k)


def _circular_backward(size, saved, dy):
    """Correlations; the spectra are made again rather than kept."""
    v, k = saved
    dy_f = jnp.fft.rfft(dy, size)
    dv = jnp.fft.irfft(dy_f * jnp.fft.rfft(k, size).conj(), size)
    product = dy_f * jnp.fft.rfft(v, size).conj()
    dk = jnp.fft.irfft(_sum_to(product, k), size)
    return dv[..., : v.shape[-1]], dk[..., : k.shape[-1]]


circular.defvjp(_circular_forward, _circular_backward)


def _sum_to(product, k):
    """Sums over the axes along which k was broadcast."""
    product = product.sum(tuple(range(product.ndim - k.ndim)))
    axes = [i for i in range(k.ndim - 1) if k.shape[i] == 1 and product.shape[i] > 1]
    return product.sum(axes, keepdims=True) if axes else product
