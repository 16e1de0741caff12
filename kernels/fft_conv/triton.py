"""A block's convolution in one program's registers; see blockwise.py."""

import math
import sys

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from kernels.compat import triton_call
from kernels.fft_conv import blockwise

SIDES = (16, 32, 64)
BLOCK = 64 * 64  # real points of bfloat16 whose parts fit the registers of a program


def unsupported(*arguments) -> str | None:
    return None


def largest(low):
    """Both parts of a complex block need as much again. So does float32, and its
    products are three of tf32, of both halves of every number: at twice the points they
    spill a kilobyte per thread."""
    return (BLOCK, BLOCK // 2) if low else (BLOCK // 8, BLOCK // 8)


def convolve(*arguments):
    """See `blockwise.convolve`, of which this module is the backend."""
    return blockwise.convolve(sys.modules[__name__], *arguments)


def _constants(x, block):
    return {
        "COMPLEX": len(x) == 2,
        "N1": block[0],
        "N2": block[1],
        "SCALE": 1 / math.prod(block),
        "PRECISION": "tf32x3" if x[0].dtype == jnp.float32 else "ieee",
        "num_warps": 8 if math.prod(block) > 1024 else 4,
    }


def blocks(x, K, block, source, target, low):
    """x stands at points source[0], ... of a block of zeros; the points target[0], ...
    of the convolution come back."""
    x = _rounded(x, low)
    batch, channels, _ = x[0].shape
    real = jax.ShapeDtypeStruct((batch, channels, target[1]), K[0].dtype)
    # the imaginary part of what has none is not written
    imaginary = real if len(x) == 2 else jax.ShapeDtypeStruct((1,), real.dtype)
    tables = blockwise.tables(block, K[0].dtype, low)
    outputs = triton_call(
        _block_kernel,
        (batch, channels),
        (*_both(x), *K, *tables, channels, *source, *target),
        (real, imaginary),
        **_constants(x, block),
    )
    return outputs[: len(x)]


def spectrum_gradient(x, dy, K, block, target, low):
    """sum_b conj(X) D / points of the spectra X of x and D of dy."""
    x, dy = _rounded(x, low), _rounded(dy, low)
    batch, channels, count = x[0].shape
    shape = jax.ShapeDtypeStruct(K[0].shape, K[0].dtype)
    tables = blockwise.tables(block, K[0].dtype, low)
    return triton_call(
        _spectrum_kernel,
        (channels,),
        (*_both(x), *_both(dy), *tables, batch, channels, count, *target),
        (shape, shape),
        **_constants(x, block),
    )


def _rounded(x, low):
    """As the kernels would first round it: half as much of it lies in memory."""
    return tuple(part.astype(jnp.bfloat16) for part in x) if low else x


def _both(pair):
    return pair if len(pair) == 2 else (pair[0], pair[0])


@triton.jit
def _load(x, row, start, count, N1: tl.constexpr, N2: tl.constexpr):
    """Row `row` of x [rows, count] as points start, ... of a block [N1, N2]."""
    at = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :] - start
    mask = (at >= 0) & (at < count)
    return tl.load(x + row * count + at, mask=mask, other=0.0)


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """a @ b, rounded to the tables' dtype first."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _matrix(f_re, f_im, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    return tl.load(f_re + at), tl.load(f_im + at)


@triton.jit
def _square(x, N1: tl.constexpr, N2: tl.constexpr):
    return tl.load(x + tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :])


@triton.jit
def _transform(
    re, im, f_re, f_im, g_re, g_im, t_re, t_im,
    COMPLEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """F x, times twiddles, times G."""
    low = f_re.dtype
    x = re.to(low)
    X_re = _product(f_re, x, PRECISION)
    X_im = _product(f_im, x, PRECISION)
    if COMPLEX:
        x = im.to(low)
        X_re -= _product(f_im, x, PRECISION)
        X_im += _product(f_re, x, PRECISION)
    re = (X_re * t_re - X_im * t_im).to(low)
    im = (X_re * t_im + X_im * t_re).to(low)
    return (
        _product(re, g_re, PRECISION) - _product(im, g_im, PRECISION),
        _product(re, g_im, PRECISION) + _product(im, g_re, PRECISION),
    )


@triton.jit
def _block_kernel(
    x_re, x_im, k_re, k_im, f1_re, f1_im, f2_re, f2_im, t_re, t_im,
    channels, x_start, x_count, y_start, y_count,
    y_re, y_im,
    COMPLEX: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * channels + channel
    f_re, f_im = _matrix(f1_re, f1_im, N1)
    g_re, g_im = _matrix(f2_re, f2_im, N2)
    turn_re, turn_im = _square(t_re, N1, N2), _square(t_im, N1, N2)
    low = f_re.dtype
    re = _load(x_re, row, x_start, x_count, N1, N2)
    im = re
    if COMPLEX:
        im = _load(x_im, row, x_start, x_count, N1, N2)
    re, im = _transform(
        re, im, f_re, f_im, g_re, g_im, turn_re, turn_im, COMPLEX, PRECISION
    )
    spectrum = channel * N1 * N2
    k_r, k_i = _square(k_re + spectrum, N1, N2), _square(k_im + spectrum, N1, N2)
    Y_re = ((re * k_r - im * k_i) * SCALE).to(low)
    Y_im = ((re * k_i + im * k_r) * SCALE).to(low)
    re = _product(Y_re, g_re, PRECISION) + _product(Y_im, g_im, PRECISION)
    im = _product(Y_im, g_re, PRECISION) - _product(Y_re, g_im, PRECISION)
    Y_re = (re * turn_re + im * turn_im).to(low)
    Y_im = (im * turn_re - re * turn_im).to(low)
    y = _product(f_re, Y_re, PRECISION) + _product(f_im, Y_im, PRECISION)
    at = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :] - y_start
    mask = (at >= 0) & (at < y_count)
    tl.store(y_re + row * y_count + at, y.to(y_re.dtype.element_ty), mask=mask)
    if COMPLEX:
        y = _product(f_re, Y_im, PRECISION) - _product(f_im, Y_re, PRECISION)
        tl.store(y_im + row * y_count + at, y.to(y_im.dtype.element_ty), mask=mask)


@triton.jit
def _spectrum_kernel(
    x_re, x_im, d_re, d_im, f1_re, f1_im, f2_re, f2_im, t_re, t_im,
    batch, channels, x_count, d_start, d_count,
    k_re, k_im,
    COMPLEX: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    f_re, f_im = _matrix(f1_re, f1_im, N1)
    g_re, g_im = _matrix(f2_re, f2_im, N2)
    turn_re, turn_im = _square(t_re, N1, N2), _square(t_im, N1, N2)
    sum_re = tl.zeros_like(turn_re)
    sum_im = tl.zeros_like(turn_re)
    for b in range(0, batch):
        row = b * channels + channel
        re = _load(x_re, row, 0, x_count, N1, N2)
        im = re
        D_re = _load(d_re, row, d_start, d_count, N1, N2)
        D_im = D_re
        if COMPLEX:
            im = _load(x_im, row, 0, x_count, N1, N2)
            D_im = _load(d_im, row, d_start, d_count, N1, N2)
        re, im = _transform(
            re, im, f_re, f_im, g_re, g_im, turn_re, turn_im, COMPLEX, PRECISION
        )
        D_re, D_im = _transform(
            D_re, D_im, f_re, f_im, g_re, g_im, turn_re, turn_im, COMPLEX, PRECISION
        )
        sum_re += re * D_re + im * D_im
        sum_im += re * D_im - im * D_re
    at = channel * N1 * N2
    at += tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    tl.store(k_re + at, sum_re * SCALE)
    tl.store(k_im + at, sum_im * SCALE)
