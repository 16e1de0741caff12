"""Reciprocals in registers: a thread has some frequencies, and r (see xla.py) of a few
nodes at a time serves the numerators of several sums.

The backward pass makes r again and gives a program a few nodes, which walks over the
frequencies; what is left of its sums is added by XLA.
"""

from functools import partial

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from kernels.cauchy import reference
from kernels.compat import triton_call

POINTS = 128  # frequencies of a tile
NODES = 4  # at a time
SUMS = 4  # at a time
TILES = 64  # of frequencies that a program of the backward pass walks over


def unsupported(*arguments) -> str | None:
    return None


def cauchy(v, z, length):
    """v [E, G, n], z [G, n], pairs -> pair [E, G, length // 2 + 1]."""
    (v_re, v_im), (x, y) = v, z
    return _sums(length, v_re * x + v_im * y, v_re, jnp.hypot(x, y), x)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(length, a, b, size, x):
    """sum_n (2i mu b - 2 s a) r of a, b [E, G, n] real; size = |z| and x [G, n]."""
    sums, heads, nodes = a.shape
    points = length // 2 + 1
    tiles = triton.cdiv(points, POINTS)
    shape = jax.ShapeDtypeStruct((sums, heads, points), a.dtype)
    return triton_call(
        _forward,
        (heads * tiles, triton.cdiv(sums, SUMS)),
        (*_grid(length, a.dtype), a, b, size, x, sums, heads, nodes, points),
        (shape, shape),
        **_constants(sums),
    )


def _sums_forward(length, a, b, size, x):
    return _sums(length, a, b, size, x), (a, b, size, x)


def _sums_backward(length, saved, gradients):
    a, b, size, x = saved
    sums, heads, nodes = a.shape
    points = length // 2 + 1
    chunks = triton.cdiv(points, POINTS * TILES)
    groups = triton.cdiv(sums, SUMS)
    coefficients = jax.ShapeDtypeStruct((chunks, *a.shape), a.dtype)
    of_nodes = jax.ShapeDtypeStruct((chunks, groups, *x.shape), a.dtype)
    da, db, d_size, dx = triton_call(
        _backward,
        (heads * triton.cdiv(nodes, NODES), chunks, groups),
        (
            *_grid(length, a.dtype),
            *(a, b, size, x, *gradients, sums, heads, nodes, points),
        ),
        (coefficients, coefficients, of_nodes, of_nodes),
        TILES=TILES,
        **_constants(sums),
    )
    return da.sum(0), db.sum(0), d_size.sum((0, 1)), dx.sum((0, 1))


_sums.defvjp(_sums_forward, _sums_backward)


def _grid(length, dtype):
    return tuple(jnp.asarray(part) for part in reference.grid(length, dtype))


def _constants(sums):
    return {
        "SUMS": min(SUMS, triton.next_power_of_2(sums)),
        "POINTS": POINTS,
        "NODES": NODES,
        "num_warps": 4,
    }


@triton.jit
def _points(s, mu, start, points, POINTS: tl.constexpr):
    """s and mu of a tile; beyond the end those of theta = pi."""
    m = start + tl.arange(0, POINTS)
    m_mask = m < points
    s = tl.load(s + m, mask=m_mask, other=0.0)
    return m, m_mask, s, tl.load(mu + m, mask=m_mask, other=4.0)


@triton.jit
def _reciprocal(s, mu, size, x):
    """r [nodes, points]; the difference of squares as a product, which stays accurate
    where they nearly cancel (at a resonance)."""
    scaled = size[:, None] * s[None, :]
    re = (scaled - mu[None, :]) * (scaled + mu[None, :])
    im = -2 * x[:, None] * (s * mu)[None, :]
    scale = 1 / (re * re + im * im)
    return re * scale, -im * scale


@triton.jit
def _forward(
    s, mu, a, b, size, x,
    sums, heads, nodes, points,
    out_re, out_im,
    SUMS: tl.constexpr, POINTS: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(points, POINTS)
    g = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.program_id(0) % tiles * POINTS
    m, m_mask, s_m, mu_m = _points(s, mu, start, points, POINTS)
    e = tl.program_id(1) * SUMS + tl.arange(0, SUMS)
    row = e * heads + g
    a_re = tl.zeros((SUMS, POINTS), s.dtype.element_ty)
    a_im = tl.zeros_like(a_re)
    b_re = tl.zeros_like(a_re)
    b_im = tl.zeros_like(a_re)
    for first in range(0, nodes, NODES):
        n = first + tl.arange(0, NODES)
        # nodes beyond the last are 1: no point is near them
        size_n = tl.load(size + g * nodes + n, mask=n < nodes, other=1.0)
        x_n = tl.load(x + g * nodes + n, mask=n < nodes, other=1.0)
        r_re, r_im = _reciprocal(s_m, mu_m, size_n, x_n)
        at = row[:, None] * nodes + n[None, :]
        mask = (e < sums)[:, None] & (n < nodes)[None, :]
        a_n = tl.load(a + at, mask=mask, other=0.0)[:, :, None]
        b_n = tl.load(b + at, mask=mask, other=0.0)[:, :, None]
        a_re += tl.sum(a_n * r_re[None], 1)
        a_im += tl.sum(a_n * r_im[None], 1)
        b_re += tl.sum(b_n * r_re[None], 1)
        b_im += tl.sum(b_n * r_im[None], 1)
    at = row[:, None] * points + m[None, :]
    mask = (e < sums)[:, None] & m_mask[None, :]
    s_m, mu_m = s_m[None, :], mu_m[None, :]
    tl.store(out_re + at, -2 * (s_m * a_re + mu_m * b_im), mask=mask)
    tl.store(out_im + at, 2 * (mu_m * b_re - s_m * a_im), mask=mask)


@triton.jit
def _backward(
    s, mu, a, b, size, x, d_re, d_im,
    sums, heads, nodes, points,
    da, db, d_size, dx,
    TILES: tl.constexpr, SUMS: tl.constexpr, POINTS: tl.constexpr,
    NODES: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(nodes, NODES)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * NODES + tl.arange(0, NODES)
    chunk = tl.program_id(1)
    e = tl.program_id(2) * SUMS + tl.arange(0, SUMS)
    row = e * heads + g
    spot = row[:, None] * nodes + n[None, :]
    mask = (e < sums)[:, None] & (n < nodes)[None, :]
    a_n = tl.load(a + spot, mask=mask, other=0.0)[:, :, None]
    b_n = tl.load(b + spot, mask=mask, other=0.0)[:, :, None]
    size_n = tl.load(size + g * nodes + n, mask=n < nodes, other=1.0)
    x_n = tl.load(x + g * nodes + n, mask=n < nodes, other=1.0)
    dtype = s.dtype.element_ty
    sum_a = tl.zeros((SUMS, NODES, POINTS), dtype)
    sum_b = tl.zeros((SUMS, NODES, POINTS), dtype)
    sum_size = tl.zeros((NODES, POINTS), dtype)
    sum_x = tl.zeros((NODES, POINTS), dtype)
    first = chunk * TILES * POINTS
    for start in range(first, tl.minimum(first + TILES * POINTS, points), POINTS):
        m, m_mask, s_m, mu_m = _points(s, mu, start, points, POINTS)
        at = row[:, None] * points + m[None, :]
        d_mask = (e < sums)[:, None] & m_mask[None, :]
        g_re = 2 * tl.load(d_re + at, mask=d_mask, other=0.0)
        g_im = 2 * tl.load(d_im + at, mask=d_mask, other=0.0)
        r_re, r_im = _reciprocal(s_m, mu_m, size_n, x_n)
        a_re = (-s_m[None, :] * g_re)[:, None, :]
        a_im = (-s_m[None, :] * g_im)[:, None, :]
        b_re = (mu_m[None, :] * g_im)[:, None, :]
        b_im = (-mu_m[None, :] * g_re)[:, None, :]
        sum_a += a_re * r_re[None] + a_im * r_im[None]
        sum_b += b_re * r_re[None] + b_im * r_im[None]
        # d(1 / q) = -r^2 dq on pairs
        dr_re = tl.sum(a_n * a_re + b_n * b_re, 0)
        dr_im = tl.sum(a_n * a_im + b_n * b_im, 0)
        square, cross = r_re * r_re - r_im * r_im, 2 * r_re * r_im
        sum_size += (s_m * s_m)[None, :] * (-square * dr_re - cross * dr_im)
        sum_x += (s_m * mu_m)[None, :] * (cross * dr_re - square * dr_im)
    part = chunk.to(tl.int64) * sums * heads * nodes
    tl.store(da + part + spot, tl.sum(sum_a, 2), mask=mask)
    tl.store(db + part + spot, tl.sum(sum_b, 2), mask=mask)
    part = chunk.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    spot = (part * heads + g) * nodes + n
    tl.store(d_size + spot, 2 * size_n * tl.sum(sum_size, 1), mask=n < nodes)
    tl.store(dx + spot, -2 * tl.sum(sum_x, 1), mask=n < nodes)
