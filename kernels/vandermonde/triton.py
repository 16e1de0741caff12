"""All powers in registers: tap l = i LOW + j takes z^(i LOW), a product over the binary
digits of i, times z^j, from a small table.

Both are exact in phase (see pairs.powers). In memory are only exp(2^k log_z) and the
first LOW powers of each node. A program has some taps and sums over all nodes, or for
the moments some nodes and sums over many taps; XLA adds up what is left.
"""

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from kernels import pairs
from kernels.compat import triton_call

LOW = 64
HIGH = 16  # a tile has HIGH x LOW taps
NODES = 8  # at a time
TILES = 16  # tiles that a program of the moments walks over


def unsupported(*arguments) -> str | None:
    return None


def vandermonde(c, log_z, length):
    """c [E, G, N], log_z [G, N], pairs -> [E, G, length]."""
    outputs, heads, modes = c[0].shape
    tiles = triton.cdiv(length, HIGH * LOW)
    factors, low, digits = _tables(log_z, length)
    (taps,) = triton_call(
        _taps,
        (heads * tiles, outputs),
        (*_both(c), *_both(factors), *_both(low), heads, modes, length),
        [jax.ShapeDtypeStruct((outputs, heads, length), c[0].dtype)],
        COMPLEX=len(c) == 2,
        DIGITS=digits,
        **_constants(),
    )
    return taps


def moments(u, log_z, orders):
    """sum_l l^k u[l] z^l for k in orders (0 or 1). u [E, G, L] -> pairs [E, G, N]."""
    outputs, heads, length = u.shape
    modes = log_z[0].shape[1]
    chunks = triton.cdiv(length, HIGH * LOW * TILES)
    blocks = triton.cdiv(modes, NODES)
    factors, low, digits = _tables(log_z, length)
    parts = len(log_z)
    shape = 2, parts, outputs, chunks, heads, modes
    shape = jax.ShapeDtypeStruct(shape, log_z[0].dtype)
    (sums,) = triton_call(
        _moments,
        (heads * blocks, chunks, outputs),
        (u, *_both(factors), *_both(low), heads, modes, length),
        [shape],
        COMPLEX=parts == 2,
        PLAIN=0 in orders,
        WEIGHTED=1 in orders,
        DIGITS=digits,
        TILES=TILES,
        **_constants(),
    )
    sums = sums.sum(3)
    return tuple(tuple(sums[order]) for order in orders)


def _constants():
    return {"LOW": LOW, "HIGH": HIGH, "NODES": NODES, "num_warps": 4}


def _tables(log_z, length):
    """exp(2^k log_z) [K, G, N] for the digits k above those of LOW, their number K,
    and z^j [G, N, LOW]."""
    low_digits = LOW.bit_length() - 1
    digits = max((length - 1).bit_length(), low_digits)
    doubling = (2.0 ** np.arange(digits)).reshape(-1, 1, 1)
    factors = pairs.exp(tuple(part * doubling.astype(part.dtype) for part in log_z))
    one = (1.0, 0.0)[: len(factors)]
    shape = (*log_z[0].shape, LOW)
    low = tuple(jnp.full(shape, x, log_z[0].dtype) for x in one)
    for digit in range(low_digits):
        present = (np.arange(LOW) >> digit & 1).astype(bool)
        present = tuple(
            jnp.where(present, part[digit, ..., None], x)
            for part, x in zip(factors, one, strict=True)
        )
        low = pairs.mul(low, present)
    # never empty: a kernel takes no array without values
    high = tuple(part[min(low_digits, digits - 1) :] for part in factors)
    return high, low, digits - low_digits


def _both(pair):
    return pair if len(pair) == 2 else (pair[0], pair[0])


@triton.jit
def _power(
    f_re, f_im, index, at, n_mask, stride,
    COMPLEX: tl.constexpr, DIGITS: tl.constexpr,
):  # fmt: skip
    """The product of the factors [DIGITS, G, N] of the digits of index: [nodes, index].
    `at` [nodes] is their place in the first of them, and stride G N."""
    dtype = f_re.dtype.element_ty
    re = tl.full((at.shape[0], index.shape[0]), 1.0, dtype)
    im = tl.zeros_like(re)
    for digit in range(0, DIGITS):
        present = ((index >> digit) & 1)[None, :] == 1
        place = digit * stride + at
        a = tl.load(f_re + place, mask=n_mask, other=0.0)[:, None]
        if COMPLEX:
            b = tl.load(f_im + place, mask=n_mask, other=0.0)[:, None]
            turned = re * a - im * b
            im = tl.where(present, re * b + im * a, im)
            re = tl.where(present, turned, re)
        else:
            re = tl.where(present, re * a, re)
    return re, im


@triton.jit
def _taps(
    c_re, c_im, f_re, f_im, low_re, low_im,
    heads, modes, length,
    taps,
    COMPLEX: tl.constexpr, DIGITS: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(length, HIGH * LOW)
    g = (tl.program_id(0) // tiles).to(tl.int64)
    e = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) % tiles * HIGH + tl.arange(0, HIGH)
    j = tl.arange(0, LOW)
    total = tl.zeros((HIGH, LOW), c_re.dtype.element_ty)
    for first in range(0, modes, NODES):
        n = first + tl.arange(0, NODES)
        n_mask = n < modes
        at = g * modes + n
        c_at = e * heads * modes + at
        high_re, high_im = _power(
            f_re, f_im, index, at, n_mask, heads * modes, COMPLEX, DIGITS
        )
        table = at[:, None] * LOW + j[None, :]
        w_re = tl.load(low_re + table, mask=n_mask[:, None], other=0.0)
        a = tl.load(c_re + c_at, mask=n_mask, other=0.0)[:, None]
        if COMPLEX:
            w_im = tl.load(low_im + table, mask=n_mask[:, None], other=0.0)
            b = tl.load(c_im + c_at, mask=n_mask, other=0.0)[:, None]
            left_re = a * high_re - b * high_im
            left_im = a * high_im + b * high_re
            total += tl.sum(
                left_re[:, :, None] * w_re[:, None, :]
                - left_im[:, :, None] * w_im[:, None, :],
                0,
            )
        else:
            total += tl.sum((a * high_re)[:, :, None] * w_re[:, None, :], 0)
    l = index[:, None] * LOW + j[None, :]
    row = (e * heads + g) * length
    tl.store(taps + row + l, total, mask=l < length)


@triton.jit
def _moments(
    u, f_re, f_im, low_re, low_im,
    heads, modes, length,
    sums,
    COMPLEX: tl.constexpr, PLAIN: tl.constexpr, WEIGHTED: tl.constexpr,
    DIGITS: tl.constexpr, TILES: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """sums [order, part, E, chunks, G, N]."""
    blocks = tl.cdiv(modes, NODES)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    chunk = tl.program_id(1)
    e = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) % blocks * NODES + tl.arange(0, NODES)
    j = tl.arange(0, LOW)
    n_mask = n < modes
    at = g * modes + n
    size = heads * modes
    dtype = low_re.dtype.element_ty
    table = at[None, :] * LOW + j[:, None]
    w_re = tl.load(low_re + table, mask=n_mask[None, :], other=0.0)
    if COMPLEX:
        w_im = tl.load(low_im + table, mask=n_mask[None, :], other=0.0)
    plain_re = tl.zeros((NODES, HIGH), dtype)
    plain_im = tl.zeros_like(plain_re)
    weighted_re = tl.zeros_like(plain_re)
    weighted_im = tl.zeros_like(plain_re)
    first = chunk * TILES
    last = tl.minimum(first + TILES, tl.cdiv(length, HIGH * LOW))
    row = (e * heads + g) * length
    for tile in range(first, last):
        index = tile * HIGH + tl.arange(0, HIGH)
        l = index[None, :] * LOW + j[:, None]
        us = tl.load(u + row + l, mask=l < length, other=0.0).to(w_re.dtype)
        sum_re = tl.sum(us[:, None, :] * w_re[:, :, None], 0)
        if COMPLEX:
            sum_im = tl.sum(us[:, None, :] * w_im[:, :, None], 0)
        # not before the sums, whose terms fill the registers
        high_re, high_im = _power(f_re, f_im, index, at, n_mask, size, COMPLEX, DIGITS)
        if COMPLEX:
            if PLAIN:
                plain_re += high_re * sum_re - high_im * sum_im
                plain_im += high_re * sum_im + high_im * sum_re
        elif PLAIN:
            plain_re += high_re * sum_re
        if WEIGHTED:
            # l = index LOW + j
            block = (index * LOW).to(dtype)[None, :]
            turned = us * j.to(dtype)[:, None]
            sum_re = block * sum_re + tl.sum(turned[:, None, :] * w_re[:, :, None], 0)
            if COMPLEX:
                sum_im = block * sum_im + tl.sum(
                    turned[:, None, :] * w_im[:, :, None], 0
                )
                weighted_re += high_re * sum_re - high_im * sum_im
                weighted_im += high_re * sum_im + high_im * sum_re
            else:
                weighted_re += high_re * sum_re
    chunks = tl.num_programs(1)
    place = (e * chunks + chunk) * size + at
    step = tl.num_programs(2).to(tl.int64) * chunks * size
    parts: tl.constexpr = 2 if COMPLEX else 1
    tl.store(sums + place, tl.sum(plain_re, 1), mask=n_mask)
    tl.store(sums + parts * step + place, tl.sum(weighted_re, 1), mask=n_mask)
    if COMPLEX:
        tl.store(sums + step + place, tl.sum(plain_im, 1), mask=n_mask)
        tl.store(sums + 3 * step + place, tl.sum(weighted_im, 1), mask=n_mask)
