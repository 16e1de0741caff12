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
    size = BASE
    while size < total:
        size *= 2
    v = jnp.pad(v, ((0, 0), (0, 0), (0, size - total)))
    segment = jnp.pad(segment, ((0, 0), (0, size - total)), mode="edge")
    return _halving(v, k[:, :total], segment)[..., before:][..., :length]


@jax.custom_vjp
def _halving(v, k, segment):
    """v [B, H, L] with L = BASE * 2^m."""
    y = _near(v, k, segment)
    for half in _halves(v):
        left, right, reach = _masks(segment, k, half)
        given = jnp.fft.rfft(_lefts(v, half, reach, left)) * _spectrum(k, reach)
        given = jnp.where(right, jnp.fft.irfft(given)[..., reach:], 0)
        given = jnp.pad(given, ((0, 0),) * 3 + ((half, half - reach),))
        y = y + given.reshape(v.shape)
    return y


def _halving_forward(v, k, segment):
    return _halving(v, k, segment), (v, k, segment)


def _halving_backward(saved, dy):
    """To the input, the same convolution with time turned; to k, its correlation."""
    v, k, segment = saved
    dv = _halving(dy[..., ::-1], k, segment[:, ::-1])[..., ::-1]
    dk = jnp.zeros_like(k)
    near = _near_gradient(v, k, segment, dy)
    dk = dk.at[:, : near.shape[1]].add(near)
    for half in _halves(v):
        left, right, reach = _masks(segment, k, half)
        into = jnp.where(right, _blocks(dy, half)[..., half : half + reach], 0)
        into = jnp.pad(into, ((0, 0),) * 3 + ((reach, 0),))
        product = jnp.fft.rfft(into) * jnp.fft.rfft(_lefts(v, half, reach, left)).conj()
        lags = jnp.fft.irfft(product.sum((0, 2)))[:, : k.shape[1]]
        dk = dk.at[:, : lags.shape[1]].add(lags)
    return dv, dk, None


_halving.defvjp(_halving_forward, _halving_backward)


def _halves(v):
    half = BASE
    while half < v.shape[-1]:
        yield half
        half *= 2


def _blocks(x, half):
    """[..., L] -> [..., L / (2 half), 2 half]."""
    return x.reshape(*x.shape[:-1], -1, 2 * half)


def _masks(segment, k, half):
    """Which of the last `reach` steps of a left half, and of the first of a right half,
    share the segment that spans the middle; a short filter reaches no further."""
    reach = half
    while reach > 1 and reach // 2 >= k.shape[1] - 1:
        reach //= 2
    number = _blocks(segment[:, None], half)
    middle = number[..., half : half + 1]
    left = number[..., half - reach : half] == middle
    return left, number[..., half : half + reach] == middle, reach


def _lefts(v, half, reach, left):
    """The left steps that count, followed by as many zeros."""
    given = jnp.where(left, _blocks(v, half)[..., half - reach : half], 0)
    return jnp.pad(given, ((0, 0),) * 3 + ((0, reach),))


def _spectrum(k, reach):
    return jnp.fft.rfft(k[:, None, : 2 * reach], 2 * reach)


def _near(v, k, segment):
    """All pairs inside blocks of BASE steps."""
    y = 0
    for lag in range(min(BASE, k.shape[1])):
        moved, same = _shift(v, segment, lag)
        y = y + jnp.where(same, k[:, lag, None, None] * moved, 0)
    return y.reshape(v.shape)


def _near_gradient(v, k, segment, dy):
    """[H, lags]; one lag at a time, or XLA would hold v moved by each of them."""
    dy = dy.reshape(*dy.shape[:-1], -1, BASE)

    def one(lag):
        moved, same = _shift(v, segment, lag)
        return jnp.where(same, dy * moved, 0).sum((0, 2, 3))

    return jax.lax.map(one, jnp.arange(min(BASE, k.shape[1]))).T


def _shift(v, segment, lag):
    """v moved by `lag` inside blocks of BASE steps, and where its segment stays."""

    def moved(x, fill):
        x = jnp.pad(x, ((0, 0),) * 3 + ((BASE, 0),), constant_values=fill)
        return jax.lax.dynamic_slice_in_dim(x, BASE - lag, BASE, -1)

    v = v.reshape(*v.shape[:-1], -1, BASE)
    segment = segment.reshape(segment.shape[0], 1, -1, BASE)
    return moved(v, 0), moved(segment, -1) == segment


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def circular(v, k, size):
    """Circular convolution of `size` points: v [B, H, *], k [H, *]."""
    return jnp.fft.irfft(jnp.fft.rfft(v, size) * jnp.fft.rfft(k, size), size)


def _circular_forward(v, k, size):
    return circular(v, k, size), (v, k)


def _circular_backward(size, saved, dy):
    """Correlations; the spectra are made again rather than kept."""
    v, k = saved
    dy_f = jnp.fft.rfft(dy, size)
    dv = jnp.fft.irfft(dy_f * jnp.fft.rfft(k, size).conj(), size)
    product = dy_f * jnp.fft.rfft(v, size).conj()
    dk = jnp.fft.irfft(product.sum(0), size)
    return dv[..., : v.shape[-1]], dk[..., : k.shape[-1]]


circular.defvjp(_circular_forward, _circular_backward)
