"""Overlap-save: FFTs of short blocks, for a filter much shorter than the sequence.

Each block is transformed with the K - 1 inputs before it, of which the outputs are
thrown away. Blocks stream through: beside input and output, turned to put time last,
there are the spectra of a few blocks, whatever the length.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from scipy.fft import next_fast_len

from kernels import compat, varying
from kernels.fft_conv import monarch, windows, xla

SHORTEST = 2048  # points of a block; below, blocks cost more than they save
OVERHEAD = 8  # a block has at least this many times the points of the filter


def unsupported(*arguments) -> str | None:
    return None


def convolve(v, k, k_reverse, state, segment, low):
    """In v's own precision, whatever `low` is; see reference.convolve.

    With resets the blocks are those of `segmented`, which for a short filter has no
    long ones either.
    """
    form = by_matmuls if compat.platform() == "tpu" else window
    return windows.convolve(form, xla.transform(), v, k, k_reverse, state, segment)


def by_matmuls(v, taps, start, count):
    """`window` with the transforms of `monarch`: XLA's FFT takes a TPU's compiler ten
    times as long."""
    shortest = _shortest(taps, count)
    sizes = monarch.sizes_of(shortest)
    size, step, group, groups = _split(v, taps, count, math.prod(sizes))
    padded = _padded(v, taps, start, group * groups * step)

    @jax.checkpoint
    def some(i):
        frames = jnp.moveaxis(_frames(padded, i, size, step, group), 2, 1)
        blocks = frames.reshape(-1, *frames.shape[2:])
        y = monarch.circular(blocks, taps, sizes, size - step, step, False)
        y = jnp.moveaxis(y.reshape(-1, group, *y.shape[1:]), 1, 2)
        return y.reshape(*v.shape[:2], -1)

    return _joined(jax.lax.map(some, jnp.arange(groups)))[..., :count]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def window(v, taps, start, count):
    """y[start : start + count] of v [B, H, T] convolved with taps [H, K]."""
    size, step, group, groups = _sizes(v, taps, count)
    K = jnp.fft.rfft(taps, size)[:, None]
    padded = _padded(v, taps, start, group * groups * step)

    def some(i):
        V = jnp.fft.rfft(_frames(padded, i, size, step, group))
        y = jnp.fft.irfft(V * K, size)[..., size - step :]
        return y.reshape(*v.shape[:2], -1)

    return _joined(jax.lax.map(some, jnp.arange(groups)))[..., :count]


def _forward(v, taps, start, count):
    return window(v, taps, start, count), (v, taps)


def _backward(start, count, saved, dy):
    """To the input, blocks that overlap and add; to the taps, a sum over blocks:
    dv = F^-1(conj(K) D) and dK = sum conj(V) D, of the spectra of each block."""
    v, taps = saved
    size, step, group, groups = _sizes(v, taps, count)
    K = jnp.fft.rfft(taps, size)[:, None].conj()
    total = group * groups * step
    padded = _padded(v, taps, start, total)
    dy = jnp.pad(dy, ((0, 0), (0, 0), (0, total - count)))
    gap = ((0, 0),) * 3 + ((size - step, 0),)

    def some(carry, i):
        dK, over = carry
        V = jnp.fft.rfft(_frames(padded, i, size, step, group))
        D = jax.lax.dynamic_slice_in_dim(dy, i * group * step, group * step, -1)
        D = jnp.pad(D.reshape(*D.shape[:2], group, step), gap)
        D = jnp.fft.rfft(D)
        dv, over = _overlapped(jnp.fft.irfft(K * D, size), over, step)
        return (dK + (V.conj() * D).sum((0, 2)), over), dv

    dK = jnp.zeros_like(K[:, 0])
    over = varying.like(jnp.zeros((*dy.shape[:2], size - step), dy.dtype), dy)
    (dK, over), dv = jax.lax.scan(some, (dK, over), jnp.arange(groups))
    dv = jnp.concatenate([_joined(dv), over], -1)[..., taps.shape[1] - 1 - start :]
    dv = dv[..., : v.shape[-1]]
    padding = ((0, 0), (0, 0), (0, v.shape[-1] - dv.shape[-1]))
    return jnp.pad(dv, padding), jnp.fft.irfft(dK, size)[:, : taps.shape[1]]


window.defvjp(_forward, _backward)


def _sizes(v, taps, count):
    """Points and new steps of a block, blocks at a time, and how many times."""
    return _split(v, taps, count, next_fast_len(_shortest(taps, count), real=True))


def _shortest(taps, count):
    """Points that a block needs."""
    least = max(SHORTEST, OVERHEAD * taps.shape[1])
    return min(least, count + taps.shape[1] - 1)


def _split(v, taps, count, size):
    """`_sizes` for blocks of so many points."""
    step = size - taps.shape[1] + 1
    blocks = -(-count // step)
    limit = windows.CACHED if compat.platform() == "cpu" else windows.MOST
    group = max(1, min(blocks, limit // (v.shape[0] * v.shape[1] * size)))
    groups = -(-blocks // group)
    return size, step, -(-blocks // groups), groups


def _padded(v, taps, start, total):
    """The inputs that `total` outputs from `start` < K on see, in order of time."""
    before = taps.shape[1] - 1 - start
    v = v[..., : total + start]
    after = total + start - v.shape[-1]
    return jnp.pad(v, ((0, 0), (0, 0), (before, after)))


def _frames(padded, i, size, step, group):
    """[B, H, group, size]: blocks of `step`, each with what lies before it."""
    before = size - step
    start = i * group * step
    part = jax.lax.dynamic_slice_in_dim(padded, start, group * step + before, -1)
    if group == 1:
        return part[..., None, :]
    part = jnp.pad(part, ((0, 0), (0, 0), (0, step - before)))
    rows = part.reshape(*part.shape[:2], group + 1, step)
    return jnp.concatenate([rows[..., :-1, :], rows[..., 1:, :before]], -1)


def _overlapped(frames, over, step):
    """The sum of frames one step apart up to the last, on which `over` from earlier
    frames lies, and what goes beyond. Only a single frame may overlap by more."""
    first, rest = frames[..., :step], frames[..., step:]
    before = jnp.concatenate([over[..., None, :], rest[..., :-1, :]], -2)[..., :step]
    gap = ((0, 0),) * 3 + ((0, step - before.shape[-1]),)
    return (first + jnp.pad(before, gap)).reshape(*over.shape[:2], -1), rest[..., -1, :]


def _joined(parts):
    """[groups, B, H, *] -> [B, H, time]."""
    return jnp.moveaxis(parts, 0, 2).reshape(*parts.shape[1:3], -1)
