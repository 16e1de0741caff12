"""The FFT as matmuls, for devices on which XLA's FFT is slow (FlashFFTConv,
https://arxiv.org/abs/2311.05908).

N = n_1 n_2 ... n_p points. With j = j_1 M + m and M = n_2 ... n_p, a transform is
`n_1` points over j_1, a factor exp(-2 pi i k_1 m / N), and for each k_1 a transform of
M points over m. Its result is left in the order [k_1, ..., k_p]: filter and input share
it, so nothing is ever transposed.

The input is real. At frequencies k + 1/2 none stands for itself: rows k_1 and
n_1 - 1 - k_1 are conjugates after the first step, the first half of them is computed, a
round number, and the work is halved without pairing sequences up. What goes around the
end of the circle comes back with its sign changed, on outputs that nobody wants. Rows
of zeros (half of the padded input) enter no matmul, rows that are not wanted leave
none.

Beyond BLOCK points there are three passes over the data: the first step; for one row
k_1 after the other the convolution of M points; the last step. Complex numbers are
pairs of reals.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels import compat, pairs
from kernels.fft_conv import windows

BLOCK = 2**16  # points up to which there are no passes over rows
ROW = 2**15  # points of a row beyond that, unless there would be more than WIDEST rows
WIDEST = 128
LANES = 128  # of a TPU's tile and of its matrix unit
DENSE = 256  # points up to which a TPU has one matrix for a transform


def unsupported(*arguments) -> str | None:
    return None


def convolve(v, k, k_reverse, state, segment, low):
    """With `low`, matmuls of bfloat16 with sums in float32; see reference.convolve."""

    def window(v, taps, start, count):
        points = windows.least(v.shape[-1], taps.shape[-1], start, count)
        return circular(v, taps, sizes_of(points), start, count, low)

    return windows.convolve(window, Monarch(low), v, k, k_reverse, state, segment)


@dataclass(frozen=True)
class Monarch:
    """Transforms of real sequences as `xla.FFT`, in permuted order."""

    low: bool

    def plan(self, least):
        if compat.platform() == "tpu" and least <= DENSE:
            return (least,)
        if compat.platform() != "gpu":
            return sizes_of(least)
        # XLA for GPUs joins what lies before a step to one axis, which it finds no
        # tiles for unless what it ends in is round.
        order = 2 if least <= 1024 else 3 if least <= BLOCK else 4
        return *block_sizes(-(-least // 16), order - 1), 16

    def forward(self, plan, *arrays):
        def one(x):
            return inner(outer(x, plan, 0, self.low), plan[1:], self.low)

        return together(one, *arrays)

    def inverse(self, plan, count, *spectra):
        def one(*X):
            X = inner_inverse(X, plan[1:], self.low)
            return outer_inverse(X, plan, 0, count, self.low)

        return together(one, *spectra)

    def shift(self, plan, by, dtype):
        points = math.prod(plan)
        rows = (plan[0] + 1) // 2
        order = np.arange(points).reshape(plan[::-1]).transpose()[:rows]
        return _circle((2 * order.reshape(rows, -1) + 1) * by, 2 * points, dtype)


def together(f, *inputs):
    """[f(x) for x in inputs], arrays [*, H, time] or spectra [*, H, rows, points]."""
    if compat.platform() != "tpu":
        return [f(*x) if isinstance(x, tuple) else f(x) for x in inputs]
    # whose compiler takes a second for each matmul, at the price of one more copy
    shapes, flat = [], []
    for x in inputs:
        own = 2 + isinstance(x, tuple)  # axes that are not joined
        shapes.append(jax.tree.leaves(x)[0].shape[:-own])
        flat.append(jax.tree.map(lambda p, own=own: p.reshape(-1, *p.shape[-own:]), x))
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *flat)
    # nor does it see where the parts come from and go to: fused with that it is slower
    joined = jax.lax.optimization_barrier(joined)
    y = f(*joined) if isinstance(joined, tuple) else f(joined)
    y = jax.lax.optimization_barrier(y)
    results, start = [], 0
    for shape in shapes:
        part = slice(start, start + math.prod(shape))
        results.append(_some(y, part, shape))
        start = part.stop
    return results


def _some(X, part, shape):
    return jax.tree.map(lambda p: p[part].reshape(*shape, *p.shape[1:]), X)


def block_sizes(points, order=None):
    """See `butterfly.block_sizes`."""
    if order is None:
        order = 2 if points <= 1024 else 3 if points <= BLOCK else 4
        if order == 4:
            rows = min(WIDEST, max(16, -(-points // ROW)))
            return rows, *block_sizes(-(-points // rows), 3)
    sizes = []
    for left in range(order, 1, -1):
        size = math.ceil(round(points ** (1 / left), 6))
        if size > 8:  # whole registers
            size += -size % 8
        sizes.append(size)
        points = -(-points // size)
    return *sizes, points


def sizes_of(points):
    """The factors of a convolution whose matrices are the DFT's."""
    if compat.platform() != "tpu":
        return block_sizes(points)
    # a last axis that is no whole tile would be padded to one in memory
    if points > ROW:
        rows = -(-points // ROW)
        rows += -rows % 8
        return rows, *sizes_of(-(-points // rows))
    side = -(-points // LANES)
    return side + (-side % 8 if side > 8 else 0), LANES


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def circular(v, taps, sizes, start, count, low):
    """Outputs start, ..., start + count - 1 of a circular convolution.

    v [B, H, *], taps [H, *], the product of `sizes` points -> [B, H, count].
    """

    def row(rows):
        V, K = (inner(X, sizes[1:], low) for X in rows)
        return inner_inverse(pairs.mul(K, V), sizes[1:], low)

    rows = [outer(x, sizes, 0, low) for x in (v, taps[None])]
    return outer_inverse(_over_rows(row, rows, sizes), sizes, start, count, low)


def _forward(v, taps, *static):
    return circular(v, taps, *static), (v, taps)


def _backward(sizes, start, count, low, saved, dy):
    """Correlations, from the inputs alone; of the spectra V, K and D of v, taps, dy:
    dV = conj(K) D, dK = sum_b conj(V) D."""
    v, taps = saved

    def row(rows):
        V, K, D = (inner(X, sizes[1:], low) for X in rows)
        dK = pairs.mul(pairs.conj(V), D)
        dK = tuple(part.sum(0, keepdims=True) for part in dK)
        dV = pairs.mul(pairs.conj(K), D)
        return [inner_inverse(X, sizes[1:], low) for X in (dV, dK)]

    rows = [outer(x, sizes, 0, low) for x in (v, taps[None])]
    rows.append(outer(dy, sizes, start, low))
    dV, dK = _over_rows(row, rows, sizes)
    dv = outer_inverse(dV, sizes, 0, v.shape[-1], low)
    return dv, outer_inverse(dK, sizes, 0, taps.shape[-1], low)[0]


circular.defvjp(_forward, _backward)


@partial(jax.checkpoint, static_argnums=4)
def butterfly(u, k, u_factors, k_factors, low):
    """See `butterfly.butterfly_conv`: u [B, H, L], k [H, K], factors pairs."""
    sizes = tuple(re.shape[-1] for re, _ in u_factors)

    @jax.checkpoint
    def row(rows):
        U, K = (
            inner(X, sizes[1:], low, factors[1:])
            for X, factors in zip(rows, (u_factors, k_factors), strict=True)
        )
        return inner_inverse(pairs.mul(U, K), sizes[1:], low)

    rows = tuple(
        _rows_first(outer(x, sizes, 0, low, factors[0]))
        for x, factors in ((u, u_factors), (k[None], k_factors))
    )
    Y = jax.lax.map(row, rows) if len(sizes) > 3 else jax.vmap(row)(rows)
    return outer_inverse(_rows_last(Y), sizes, 0, u.shape[-1], low, odd=0)


def _over_rows(row, X, sizes):
    """row(X), of more than three factors one row after the other."""
    if len(sizes) <= 3:
        return row(X)
    rows = jax.tree.map(lambda part: jnp.moveaxis(part, -2, 0)[..., None, :], X)
    Y = jax.lax.map(row, rows)
    return jax.tree.map(lambda part: jnp.moveaxis(part[..., 0, :], 0, -2), Y)


def _rows_first(X):
    return tuple(jnp.moveaxis(part, -2, 0) for part in X)


def _rows_last(X):
    return tuple(jnp.moveaxis(part, 0, -2) for part in X)


def outer(x, sizes, start, low, matrix=None):
    """The first step on x [..., *], which begins at point `start` among zeros.

    Returns [..., (n_1 + 1) // 2, M], the rows that determine all. With a `matrix` other
    than the DFT's, as in `inner`, they do not, and all n_1 are returned, at whole
    frequencies.
    """
    n, row = sizes[0], math.prod(sizes[1:])
    first, last, before = _used_rows(sizes, start, x.shape[-1])
    after = (last - first) * row - before - x.shape[-1]
    x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((before, after),))
    x = x.reshape(*x.shape[:-1], 1, last - first, row)
    if matrix is None:
        odd, rows = 1, slice(0, (n + 1) // 2)
        matrix = dft(n, x.dtype, rows, slice(first, last), odd=odd)
    else:
        odd = 0
        matrix = tuple(part[..., first:last] for part in matrix)
    X = tuple(
        part[..., 0, :, :] for part in _products([[m] for m in matrix], (x,), low)
    )
    if len(sizes) == 1:
        return X
    return pairs.mul(twiddles(sizes, x.dtype, X[0].shape[-2], odd), X)


def outer_inverse(X, sizes, start, count, low, odd=1):
    """Points start, ..., start + count - 1 of what has the rows X; `outer`'s inverse.

    Where they are all n_1, at whole frequencies, without symmetry (odd = 0), the real
    part.
    """
    n = sizes[0]
    first, last, before = _used_rows(sizes, start, count)
    rows = X[0].shape[-2]
    if len(sizes) > 1:
        X = pairs.mul(pairs.conj(twiddles(sizes, X[0].dtype, rows, odd)), X)
    # a row that stands for its conjugate too counts twice
    twice = np.where(np.arange(rows) * 2 + 1 == n, 1, 2) if odd else np.ones(rows)
    scale = twice[:, None] / n
    matrix = dft(n, X[0].dtype, slice(0, rows), slice(first, last), scale, odd)
    re, im = (part.T for part in matrix)
    (y,) = _products([[re, im]], X, low)
    y = y.reshape(*y.shape[:-2], -1)
    return y[..., before : before + count]


def _used_rows(sizes, start, count):
    """The rows j_1 that hold `count` points from `start` on, and points before."""
    row = math.prod(sizes[1:])
    first = start // row
    return first, -(-(start + count) // row), start - first * row


def inner(X, sizes, low, matrices=None):
    """X [..., M] transformed over its last axis, left in the order [k_2, ..., k_p].

    matrices: for each step a pair [n, n], or [H, n, n] for X [B, H, M]; the DFT where
    None.
    """
    shape = X[0].shape
    X = tuple(part[..., None, :] for part in X)
    for step, n in enumerate(sizes):
        rest = sizes[step:]
        split = (*shape[:-1], -1, n, math.prod(rest[1:]))
        X = tuple(part.reshape(split) for part in X)
        matrix = dft(n, X[0].dtype) if matrices is None else matrices[step]
        X = _complex_matmul(matrix, X, low)
        if rest[1:]:
            X = pairs.mul(twiddles(rest, X[0].dtype, n), X)
    return tuple(part.reshape(shape) for part in X)


def inner_inverse(X, sizes, low):
    """Undoes `inner`."""
    shape = X[0].shape
    for step in reversed(range(len(sizes))):
        n, rest = sizes[step], sizes[step:]
        split = (*shape[:-1], -1, n, math.prod(rest[1:]))
        X = tuple(part.reshape(split) for part in X)
        if rest[1:]:
            X = pairs.mul(pairs.conj(twiddles(rest, X[0].dtype, n)), X)
        X = _complex_matmul(pairs.conj(dft(n, X[0].dtype, scale=1 / n)), X, low)
    return tuple(part.reshape(shape) for part in X)


def dft(n, dtype, rows=slice(None), columns=slice(None), scale=1.0, odd=0):
    """exp(-2 pi i (k + odd / 2) j / n) as a pair, for some k and j."""
    k, j = np.arange(n)[rows], np.arange(n)[columns]
    return _circle((2 * k[:, None] + odd) * j, 2 * n, dtype, scale)


def twiddles(sizes, dtype, rows, odd=0):
    """exp(-2 pi i (k_1 + odd / 2) m / N) for k_1 < rows, [rows, M].

    A product over the digits of m, [rows, n_i] each: the compiler is kept from
    multiplying these out, which for a million points takes it minutes.
    """
    points = math.prod(sizes)
    k = 2 * np.arange(rows)[:, None] + odd
    table = _circle(0 * k, 1, dtype)
    for i in range(1, len(sizes)):
        digit = np.arange(sizes[i]) * math.prod(sizes[i + 1 :])
        factor = jax.lax.optimization_barrier(_circle(k * digit, 2 * points, dtype))
        table = pairs.mul(
            tuple(part[..., None] for part in table),
            tuple(part[:, None] for part in factor),
        )
        table = tuple(part.reshape(rows, -1) for part in table)
    return table


def _circle(number, points, dtype, scale=1.0):
    """exp(-2 pi i number / points) as a pair, from exact integers in float64."""
    angle = 2 * np.pi * (number % points) / points
    parts = np.cos(angle) * scale, -np.sin(angle) * scale
    return tuple(jnp.asarray(part, dtype) for part in parts)


def _complex_matmul(matrix, X, low):
    a, b = matrix
    return _products([[a, -b], [b, a]], X, low)


def _products(matrices, X, low):
    """sum_j matrices[i][j] X[j] for every i."""
    if compat.platform() == "tpu":  # whose compiler takes a second for each of them
        if X[0].shape[-1] == 1:
            x = jnp.concatenate([part[..., 0] for part in X], -1)
            matrix = jnp.block(matrices)
            y = _einsum(_of_columns(matrix), x, matrix, low)
            return tuple(part[..., None] for part in jnp.split(y, len(matrices), -1))
        y = matmul(jnp.block(matrices), jnp.concatenate(X, -2), low)
        return tuple(jnp.split(y, len(matrices), -2))
    return tuple(
        sum(matmul(matrix, x, low) for matrix, x in zip(row, X, strict=True))
        for row in matrices
    )


def matmul(matrix, x, low):
    """[n, m] of every [.., n, m], in float32 or wider; per channel if [H, n, n]."""
    if x.shape[-1] == 1:  # a column, which would be a whole tile wide in a TPU's memory
        return _einsum(_of_columns(matrix), x[..., 0], matrix, low)[..., None]
    equation = "hkn,bhpnm->bhpkm" if matrix.ndim == 3 else "kn,...nm->...km"
    if compat.platform() != "gpu":
        return _einsum(equation, matrix, x, low)
    # XLA there joins all axes but n to one, in which it finds no tiles unless m is
    # round. The barrier keeps it from making one product of both parts', which it would
    # have to copy apart.
    columns = x.shape[-1]
    x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, -columns % 16),))
    if low:
        matrix, x = matrix.astype(jnp.bfloat16), x.astype(jnp.bfloat16)
    matrix, x = jax.lax.optimization_barrier((matrix, x))
    return _einsum(equation, matrix, x, low)[..., :columns]


def _of_columns(matrix):
    """The product of single columns [.., n] and a matrix, per channel if [H, n, n]."""
    return "bhpn,hkn->bhpk" if matrix.ndim == 3 else "...n,kn->...k"


def _einsum(equation, a, b, low):
    if low:
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
    return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST)
