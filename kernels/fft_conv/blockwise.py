"""Convolutions whose blocks are made by a kernel: transform, product and inverse
without a way through memory. (The one for TPUs transforms the filter too, and has its
own way from here, see pallas_tpu.py.)

Up to a backend's largest block a sequence is a matrix [n_1, n_2], and its FFT two
matmuls with a product by twiddles between them (Monarch of order 2, see monarch.py for
the order of its results). Longer ones take their first step and their last in XLA, and
between them every row is such a block of complex numbers.

Gates and skip stay outside: [B, L, H] must be turned to put time last, and XLA makes
them in the same pass. The spectrum of the filter is made once, for all examples.

A backend has SIDES, powers of two, and

    largest(low)                                       points of a block: real, complex
    blocks(x, K, block, source, target, low)           the convolution of every block
    spectrum_gradient(x, dy, K, block, target, low)    sum_b conj(X) D / points
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from kernels import pairs
from kernels.fft_conv import monarch, windows


def convolve(backend, v, k, k_reverse, state, segment, low):
    """With `low`, matmuls of bfloat16 with sums in float32; see reference.convolve."""

    def window(v, taps, start, count):
        points = windows.least(v.shape[-1], taps.shape[-1], start, count)
        sizes = block_sizes(points, *backend.largest(low), backend.SIDES)
        return circular(backend, v, taps, sizes, start, count, low)

    transform = monarch.Monarch(low)
    return windows.convolve(window, transform, v, k, k_reverse, state, segment)


def block_sizes(points, limit, of_row, sides) -> tuple[int, ...]:
    """(n_1, n_2), or beyond `limit` points (rows, n_1, n_2) with up to `of_row` in
    each: the fewest that suffice."""
    rows = 1 if points <= limit else -(-points // of_row)
    points = -(-points // rows)
    enough = ((a, b) for a in sides for b in sides if a >= b and a * b >= points)
    block = min(enough, key=math.prod)
    return block if rows == 1 else (rows, *block)


def circular(backend, v, taps, sizes, start, count, low):
    """Outputs start, ..., start + count - 1 of a circular convolution.

    v [B, H, *], taps [H, *], the product of `sizes` points -> [B, H, count].
    """
    block = sizes[-2:]
    points = math.prod(block)
    if len(sizes) == 2:
        padded = jnp.pad(taps, ((0, 0), (0, points - taps.shape[-1])))
        K = monarch.inner((padded, jnp.zeros_like(padded)), block, low)
        (y,) = _convolve(backend, (v,), K, block, start, count, low)
        return y
    V, K = (monarch.outer(x, sizes, 0, low) for x in (v, taps))  # [.., H, rows, points]
    K = monarch.inner(K, block, low)
    shape = V[0].shape
    V, K = (_channels(X, points) for X in (V, K))
    Y = _convolve(backend, V, K, block, 0, points, low)
    Y = tuple(part.reshape(shape) for part in Y)
    return monarch.outer_inverse(Y, sizes, start, count, low)


def _channels(X, points):
    """[.., H, rows, points] -> [.., H rows, points]."""
    return tuple(part.reshape(*part.shape[:-3], -1, points) for part in X)


@partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5, 6))
def _convolve(backend, x, K, block, start, count, low):
    """x [B, C, *] times spectra K [C, points], pairs; (re,) where x is real."""
    source = 0, x[0].shape[-1]
    return backend.blocks(x, K, block, source, (start, count), low)


def _forward(backend, x, K, *static):
    return _convolve(backend, x, K, *static), (x, K)


def _backward(backend, block, start, count, low, saved, dy):
    """dx = F^-1(conj(K) F(dy)), dK = sum_b conj(F(x)) F(dy), F a block's transform."""
    x, K = saved
    source, target = (0, x[0].shape[-1]), (start, count)
    dx = backend.blocks(dy, pairs.conj(K), block, target, source, low)
    return dx, backend.spectrum_gradient(x, dy, K, block, target, low)


_convolve.defvjp(_forward, _backward)


def tables(block, dtype, low):
    """DFT of both sides, symmetric, and the twiddles between them; pairs, flat."""
    matrices = (*monarch.dft(block[0], dtype), *monarch.dft(block[1], dtype))
    if low:
        matrices = (table.astype(jnp.bfloat16) for table in matrices)
    return *matrices, *monarch.twiddles(block, dtype, block[0])
