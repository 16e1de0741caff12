"""A block's convolution in one program's fast memory; see blockwise.py."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import blocks as tiles
from kernels import compat
from kernels.fft_conv import blockwise

SIDES = (16, 32, 64, 128)
BLOCK = 128 * 128  # points: two factors as wide as the matrix unit


def unsupported(u, k) -> str | None:
    return tiles.unsupported(u, k)


def largest(low):
    """The most points of a complex and of a real block."""
    return BLOCK, BLOCK


def convolve(*arguments):
    """See `blockwise.convolve`, of which this module is the backend."""
    return blockwise.convolve(sys.modules[__name__], *arguments)


def blocks(x, K, block, source, target, low):
    """x stands at points source[0], ... of a block of zeros; the points target[0], ...
    of the convolution come back."""
    x = tuple(_block(part, block, source) for part in x)
    K = tuple(part.reshape(-1, *block) for part in K)
    grid, example, channel, table = _specs(x, block)
    y = compat.pallas_tpu_call(
        partial(_block_kernel, low=low, parts=len(x)),
        grid=grid,
        semantics=("parallel", "parallel"),
        in_specs=[*[example] * len(x), channel, channel, *table],
        out_specs=[example] * len(x),
        out_shape=[jax.ShapeDtypeStruct(part.shape, part.dtype) for part in x],
    )(*x, *K, *blockwise.tables(block, K[0].dtype, low))
    start, count = target
    return tuple(
        part.reshape(*part.shape[:2], -1)[..., start : start + count] for part in y
    )


def spectrum_gradient(x, dy, K, block, target, low):
    """sum_b conj(X) D / points of the spectra X of x and D of dy."""
    parts = len(x)
    x = tuple(_block(part, block, (0, part.shape[-1])) for part in x)
    dy = tuple(_block(part, block, target) for part in dy)
    grid, example, channel, table = _specs(x, block)
    dK = compat.pallas_tpu_call(
        partial(_spectrum_kernel, low=low, parts=parts),
        grid=grid,
        semantics=("parallel", "arbitrary"),
        in_specs=[*[example] * (2 * parts), *table],
        out_specs=[channel] * 2,
        out_shape=[jax.ShapeDtypeStruct((grid[0], *block), K[0].dtype)] * 2,
    )(*x, *dy, *blockwise.tables(block, K[0].dtype, low))
    return tuple(part.reshape(K[0].shape) for part in dK)


def _block(x, block, place):
    """[B, C, count] as points place[0], ... of [B, C, n_1, n_2]."""
    start, count = place
    after = block[0] * block[1] - start - count
    x = jnp.pad(x, ((0, 0), (0, 0), (start, after)))
    return x.reshape(*x.shape[:2], *block)


def _specs(x, block):
    """The grid, and the blocks of an example's channel, of a channel, of the tables."""
    batch, channels = x[0].shape[:2]
    first, second = block
    example = pl.BlockSpec((None, None, *block), lambda c, b: (b, c, 0, 0))
    channel = pl.BlockSpec((None, *block), lambda c, b: (c, 0, 0))
    shapes = ((first, first),) * 2 + ((second, second),) * 2 + (block,) * 2
    table = [pl.BlockSpec(shape, lambda c, b: (0, 0)) for shape in shapes]
    return (channels, batch), example, channel, table


def _dot(a, b, low):
    """a @ b, of bfloat16 with sums in float32 if `low`."""
    if low:
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        return jnp.dot(a, b, preferred_element_type=jnp.float32)
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


def _transform(x, tables, low):
    """F x, times twiddles, times G; x a pair, or (re,) where it is real."""
    f_re, f_im, g_re, g_im, t_re, t_im = tables
    X_re, X_im = _dot(f_re, x[0], low), _dot(f_im, x[0], low)
    if len(x) == 2:
        X_re = X_re - _dot(f_im, x[1], low)
        X_im = X_im + _dot(f_re, x[1], low)
    re, im = X_re * t_re - X_im * t_im, X_re * t_im + X_im * t_re
    return (
        _dot(re, g_re, low) - _dot(im, g_im, low),
        _dot(re, g_im, low) + _dot(im, g_re, low),
    )


def _inverse(X, tables, low, parts):
    f_re, f_im, g_re, g_im, t_re, t_im = tables
    scale = 1 / (f_re.shape[0] * g_re.shape[0])
    re, im = (part * scale for part in X)
    re, im = (
        _dot(re, g_re, low) + _dot(im, g_im, low),
        _dot(im, g_re, low) - _dot(re, g_im, low),
    )
    re, im = re * t_re + im * t_im, im * t_re - re * t_im
    y = (_dot(f_re, re, low) + _dot(f_im, im, low),)
    if parts == 2:
        y = (*y, _dot(f_re, im, low) - _dot(f_im, re, low))
    return y


def _block_kernel(*refs, low, parts):
    x, (k_re, k_im), refs = refs[:parts], refs[parts : parts + 2], refs[parts + 2 :]
    tables, out = [ref[...] for ref in refs[:6]], refs[6:]
    re, im = _transform([ref[...] for ref in x], tables, low)
    k_re, k_im = k_re[...], k_im[...]
    Y = re * k_re - im * k_im, re * k_im + im * k_re
    for ref, part in zip(out, _inverse(Y, tables, low, parts), strict=True):
        ref[...] = part.astype(ref.dtype)


def _spectrum_kernel(*refs, low, parts):
    x, dy, refs = refs[:parts], refs[parts : 2 * parts], refs[2 * parts :]
    tables, (sum_re, sum_im) = [ref[...] for ref in refs[:6]], refs[6:]

    @pl.when(pl.program_id(1) == 0)
    def _():
        sum_re[...] = jnp.zeros_like(sum_re)
        sum_im[...] = jnp.zeros_like(sum_im)

    re, im = _transform([ref[...] for ref in x], tables, low)
    d_re, d_im = _transform([ref[...] for ref in dy], tables, low)
    scale = 1 / (re.shape[0] * re.shape[1])
    sum_re[...] += (re * d_re + im * d_im) * scale
    sum_im[...] += (re * d_im - im * d_re) * scale
