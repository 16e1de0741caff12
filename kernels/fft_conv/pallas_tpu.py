"""A block's convolution in one program's fast memory, the transforms of the input and
of the filter too.

A sequence of up to BLOCK points is a matrix [n_1, n_2] as in monarch.py, of which only
the rows that hold something are read and only those that are wanted are written. A
program has one channel of one example; a channel's examples follow one another, so its
filter is transformed once, and its gradient summed, in VMEM. XLA's matmuls for the
filter's spectrum took 20 s to compile and were written to memory.

Longer sequences take their first step and their last in XLA; between them every row is
such a block of complex numbers.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import blocks, compat, pairs
from kernels.fft_conv import blockwise, monarch, windows

SIDES = (16, 32, 64, 128)
BLOCK = 128 * 128  # points: two factors as wide as the matrix unit


def unsupported(u, k) -> str | None:
    return blocks.unsupported(u, k)


def convolve(v, k, k_reverse, state, segment, low):
    """With `low`, matmuls of bfloat16 with sums in float32; see reference.convolve."""

    def window(v, taps, start, count):
        points = windows.least(v.shape[-1], taps.shape[-1], start, count)
        sizes = blockwise.block_sizes(points, BLOCK, BLOCK, SIDES)
        return _circular(v, taps, sizes, start, count, low)

    transform = monarch.Monarch(low)
    return windows.convolve(window, transform, v, k, k_reverse, state, segment)


def _circular(v, taps, sizes, start, count, low):
    """See `blockwise.circular`."""
    block = sizes[-2:]
    if len(sizes) == 2:
        (y,) = _block((v,), (taps,), block, start, count, low)
        return y
    points = math.prod(block)
    V, K = (monarch.outer(x, sizes, 0, low) for x in (v, taps))  # [.., H, rows, points]
    flat = (
        tuple(part.reshape(*part.shape[:-3], -1, points) for part in X) for X in (V, K)
    )
    Y = _block(*flat, block, 0, points, low)
    Y = tuple(part.reshape(V[0].shape) for part in Y)
    return monarch.outer_inverse(Y, sizes, start, count, low)


def _block(x, taps, block, start, count, low):
    """Outputs start, ..., start + count - 1 of the convolutions of x [B, C, *] with
    taps [C, *], pairs; (re,) where they are real."""
    side = block[1]
    first, last = start // side, -(-(start + count) // side)

    def rows(x):
        x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, -x.shape[-1] % side),))
        return x.reshape(*x.shape[:-1], -1, side)

    x, taps = jax.tree.map(rows, (x, taps))
    y = _convolve(_Plan(block, first, last, low, len(x)), x, taps)
    before = start - first * side
    return tuple(
        part.reshape(*part.shape[:2], -1)[..., before : before + count] for part in y
    )


class _Plan(NamedTuple):
    """Of blocks [n_1, n_2] rows first, ..., last - 1 are wanted."""

    block: tuple[int, int]
    first: int
    last: int
    low: bool
    parts: int  # 2 of complex numbers


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(plan, x, taps):
    """[B, C, rows, n_2] from x [B, C, rows, n_2] and taps [C, rows, n_2], pairs."""
    call = _Call(plan, x[0], taps[0])
    wanted = (*x[0].shape[:2], plan.last - plan.first, plan.block[1])
    return call(_forward_kernel, (*x, *taps), [wanted] * plan.parts)


def _forward(plan, x, taps):
    return _convolve(plan, x, taps), (x, taps)


def _backward(plan, saved, dy):
    """dx = F^-1(conj(K) D), dtaps = sum_b F^-1(conj(X) D), of the spectra X of x, K of
    taps and D of dy."""
    x, taps = saved
    call = _Call(plan, x[0], taps[0])
    shapes = [part.shape for part in (*x, *taps)]
    gradients = call(_backward_kernel, (*x, *taps, *dy), shapes, sums=2)
    return tuple(gradients[: plan.parts]), tuple(gradients[plan.parts :])


_convolve.defvjp(_forward, _backward)


class _Call(NamedTuple):
    """Calls a kernel for every channel and, one after the other, every example."""

    plan: _Plan
    x: jax.Array
    taps: jax.Array

    def __call__(self, kernel, arrays, shapes, sums=0):
        """`sums` complex numbers more than the filter's spectrum stay in VMEM."""
        plan, dtype = self.plan, self.x.dtype
        batch, channels = self.x.shape[:2]
        tables = self.tables(dtype)
        spectrum = [pltpu.VMEM(plan.block, dtype)] * (2 + sums)
        return compat.pallas_tpu_call(
            partial(kernel, plan),
            grid=(channels, batch),
            semantics=("parallel", "arbitrary"),
            in_specs=[
                *(_spec(x.shape) for x in arrays),
                *(pl.BlockSpec(x.shape, lambda c, b: (0, 0)) for x in tables),
            ],
            out_specs=[_spec(shape) for shape in shapes],
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape in shapes],
            scratch_shapes=spectrum,
        )(*arrays, *tables)

    def tables(self, dtype):
        """What `_Tables` has: of F the columns of the rows that are not zero."""
        plan = self.plan
        f, g = (monarch.dft(n, dtype) for n in plan.block)
        ranges = (
            slice(0, self.x.shape[-2]),
            slice(0, self.taps.shape[-2]),
            slice(plan.first, plan.last),
        )
        matrices = [part[:, rows] for rows in ranges for part in f] + [*g]
        if plan.low:
            matrices = [part.astype(jnp.bfloat16) for part in matrices]
        return *matrices, *monarch.twiddles(plan.block, dtype, plan.block[0])


def _spec(shape):
    """Of an example's channel, or of a channel."""
    if len(shape) == 4:
        return pl.BlockSpec((None, None, *shape[2:]), lambda c, b: (b, c, 0, 0))
    return pl.BlockSpec((None, *shape[1:]), lambda c, b: (c, 0, 0))


# Inside a kernel.


class _Tables(NamedTuple):
    """Pairs: of the first transform F [n_1, rows] for what x, taps and y hold, of the
    second G [n_2, n_2], and the twiddles [n_1, n_2] between them."""

    x: pairs.Pair
    taps: pairs.Pair
    y: pairs.Pair
    second: pairs.Pair
    twiddles: pairs.Pair

    @classmethod
    def read(cls, refs) -> "_Tables":
        values = [ref[...] for ref in refs]
        return cls(*zip(values[::2], values[1::2], strict=True))

    def transform(self, first, x, low):
        """F x, times twiddles, times G; x a pair, or (re,) where it is real."""
        products = [[_dot(matrix, part, low) for matrix in first] for part in x]
        re, im = products[0]
        if len(x) == 2:
            re, im = re - products[1][1], im + products[1][0]
        (re, im), (g_re, g_im) = pairs.mul((re, im), self.twiddles), self.second
        return (
            _dot(re, g_re, low) - _dot(im, g_im, low),
            _dot(re, g_im, low) + _dot(im, g_re, low),
        )

    def inverse(self, first, X, low, parts):
        """Undoes `transform`; the real part alone of one part."""
        scale = 1 / math.prod(X[0].shape)
        (re, im), (g_re, g_im) = (part * scale for part in X), self.second
        re, im = (
            _dot(re, g_re, low) + _dot(im, g_im, low),
            _dot(im, g_re, low) - _dot(re, g_im, low),
        )
        re, im = pairs.mul((re, im), pairs.conj(self.twiddles))
        f_re, f_im = first
        y = (_dot(f_re, re, low, TURNED) + _dot(f_im, im, low, TURNED),)
        if parts == 2:
            y = (*y, _dot(f_re, im, low, TURNED) - _dot(f_im, re, low, TURNED))
        return y


PLAIN = ((1,), (0,))
TURNED = ((0,), (0,))  # a.T @ b


def _dot(a, b, low, contract=PLAIN):
    """a @ b, of bfloat16 with sums in float32 if `low`."""
    if low:
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jax.lax.dot_general(
        a,
        b,
        (contract, ((), ())),
        precision=None if low else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
    )


def _read(refs):
    return tuple(ref[...] for ref in refs)


def _write(refs, pair):
    for ref, part in zip(refs, pair, strict=True):
        ref[...] = part.astype(ref.dtype)


def _split(refs, *counts):
    """Lists of so many of the references, and of all that are left."""
    lists = []
    for count in counts:
        lists.append(refs[:count])
        refs = refs[count:]
    return *lists, refs


def _forward_kernel(plan, *refs):
    parts, low = plan.parts, plan.low
    x, taps, tables, y, spectrum = _split(refs, parts, parts, 10, parts)
    tables = _Tables.read(tables)

    @pl.when(pl.program_id(1) == 0)
    def _():
        _write(spectrum, tables.transform(tables.taps, _read(taps), low))

    X = tables.transform(tables.x, _read(x), low)
    Y = pairs.mul(X, _read(spectrum))
    _write(y, tables.inverse(tables.y, Y, low, parts))


def _backward_kernel(plan, *refs):
    parts, low = plan.parts, plan.low
    x, taps, dy, tables, dx, d_taps, refs = _split(refs, *[parts] * 3, 10, parts, parts)
    spectrum, total = refs[:2], refs[2:]
    tables, example = _Tables.read(tables), pl.program_id(1)

    @pl.when(example == 0)
    def _():
        _write(spectrum, tables.transform(tables.taps, _read(taps), low))
        _write(total, tuple(jnp.zeros(plan.block, ref.dtype) for ref in total))

    X = tables.transform(tables.x, _read(x), low)
    D = tables.transform(tables.y, _read(dy), low)
    dX = pairs.mul(pairs.conj(_read(spectrum)), D)
    _write(dx, tables.inverse(tables.x, dX, low, parts))
    _write(total, pairs.add(_read(total), pairs.mul(pairs.conj(X), D)))

    @pl.when(example == pl.num_programs(1) - 1)
    def _():
        _write(d_taps, tables.inverse(tables.taps, _read(total), low, parts))
