"""One pass: blocks of time in order, the last inputs of a block stay in VMEM.

A lag reaches over a reset exactly if it is larger than the number of steps since then,
so one column of these ages replaces the segments. The backward pass goes from the last
block to the first and keeps the first gradients of a block for the one before it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import blocks, varying
from kernels.blocks import GROUP, TILE
from kernels.short_conv import xla

TAPS = 64  # every lag is written out


def unsupported(u, w) -> str | None:
    if w.shape[1] > TAPS:
        return f"takes at most {TAPS} taps, got {w.shape[1]}"
    return blocks.unsupported(u, w)


def short_conv(u, w, bias, state, segment):
    """u [B, L, H], state [B, W-1, H] in segment 0, segment [B, L] or None."""
    if bias is None:
        bias = varying.like(jnp.zeros(u.shape[2]), u)
    return _solve(u, w.astype(state.dtype), bias.astype(state.dtype), state, segment)


@jax.custom_vjp
def _solve(u, w, bias, state, segment):
    walk, taps = blocks.Walk.over(u, descending=False), w.shape[1]
    halo = _halo(taps)
    state = jnp.pad(state, ((0, 0), (halo - state.shape[1], 0), (0, 0)))
    ages = _ages(walk, taps, segment, state.dtype)
    return walk.call(
        partial(_forward, walk, len(ages)),
        in_specs=[
            walk.sequence(),
            walk.shared(taps),
            walk.shared(1),
            walk.still(halo),
            *[walk.row(walk.steps)] * len(ages),
        ],
        out_specs=walk.sequence(),
        out_shape=jax.ShapeDtypeStruct(u.shape, u.dtype),
        scratch_shapes=[
            pltpu.VMEM((halo + walk.steps, walk.width), state.dtype),
            *[pltpu.VMEM((walk.steps, 1), state.dtype)] * len(ages),
        ],
    )(u, w.T, bias[None], state, *ages)


def _solve_forward(u, w, bias, state, segment):
    return _solve(u, w, bias, state, segment), (u, w, state, segment)


def _solve_backward(saved, dy):
    u, w, state, segment = saved
    walk, taps = blocks.Walk.over(u, descending=True), w.shape[1]
    ages = _ages(walk, taps, segment, state.dtype)
    rows = _halo(taps) + walk.steps
    du, dw, dbias = walk.call(
        partial(_backward, walk, len(ages)),
        in_specs=[
            walk.sequence(),
            walk.shared(taps),
            walk.sequence(),
            *[walk.row(walk.steps)] * len(ages),
        ],
        out_specs=[walk.sequence(), walk.still(taps), walk.still(1)],
        out_shape=[
            jax.ShapeDtypeStruct(u.shape, u.dtype),
            jax.ShapeDtypeStruct((walk.batch, taps, walk.channels), w.dtype),
            jax.ShapeDtypeStruct((walk.batch, 1, walk.channels), w.dtype),
        ],
        scratch_shapes=[
            pltpu.VMEM((rows, walk.width), w.dtype),
            *[pltpu.VMEM((rows, 1), w.dtype)] * len(ages),
        ],
    )(u, w.T, dy, *ages)
    dw_early, dstate = _from_state(w, state, segment, dy)
    return du, dw.sum(0).T + dw_early, dbias.sum((0, 1)), dstate, None


_solve.defvjp(_solve_forward, _solve_backward)


def _from_state(w, state, segment, dy):
    """Gradients of w and the state through the first outputs, which see the state."""
    count = state.shape[1]
    early = dy[:, :count].astype(state.dtype)
    segment = None if segment is None else segment[:, :count]

    def outputs(w, state):
        return xla.short_conv(jnp.zeros_like(early), w, None, state, segment)

    return jax.vjp(outputs, w, state)[1](early)


def _halo(taps):
    """Steps kept from the block before: the largest lag, in whole tiles."""
    return max(TILE, taps - 1 + -(taps - 1) % TILE)


def _ages(walk, taps, segment, dtype):
    """[the largest lag at which each step sees anything]; the state is in segment 0."""
    if segment is None or taps == 1:
        return []
    before = jnp.pad(segment, ((0, 0), (taps - 1, 0)))
    age = sum(
        (before[:, taps - 1 - lag :][:, : walk.length] == segment).astype(dtype)
        for lag in range(1, taps)
    )
    return [blocks.rows(age, walk.steps)]


def _forward(walk, resets, u, w, bias, state, *rest):
    ages, (y, window, *age) = rest[:resets], rest[resets:]
    halo, first = state.shape[0], pl.program_id(2) == 0
    window[:halo] = jnp.where(first, state[...], window[walk.steps :])
    window[halo:] = u[...].astype(window.dtype)
    for column, row in zip(age, ages, strict=True):
        column[...] = blocks.column(row[...])

    def group(i, _):
        start = pl.multiple_of(i * GROUP, GROUP)
        rows = pl.ds(start, GROUP)
        inputs, total = window[pl.ds(start, halo + GROUP), :], bias[...]
        for lag in range(w.shape[0]):
            lagged = _seen(_group(inputs, halo - lag), age, rows, lag)
            total = total + w[lag : lag + 1] * lagged
        y[rows, :] = total.astype(y.dtype)

    blocks.for_each(walk.steps // GROUP, group, None)


def _backward(walk, resets, u, w, dy, *rest):
    ages, (du, dw, dbias, window, *age) = rest[:resets], rest[resets:]
    k = pl.program_id(2)
    first, dtype = walk.at(k) * walk.steps, window.dtype
    halo = window.shape[0] - walk.steps
    window[walk.steps :] = jnp.where(k == 0, 0, window[:halo])
    window[: walk.steps] = _real(walk, first, dy[...].astype(dtype))
    for column, row in zip(age, ages, strict=True):
        column[walk.steps :] = jnp.where(k == 0, 0, column[:halo])
        column[: walk.steps] = blocks.column(row[...])

    def group(i, sums):
        start = pl.multiple_of(i * GROUP, GROUP)
        rows, wider = pl.ds(start, GROUP), pl.ds(start, GROUP + halo)
        inputs = _real(walk, first + start, u[rows, :].astype(dtype))
        gradients, total, products = window[wider, :], 0, []
        for lag in range(w.shape[0]):
            gradient = _group(_seen(gradients, age, wider, lag), lag)
            total = total + w[lag : lag + 1] * gradient
            products.append(inputs * gradient)
        du[rows, :] = total.astype(du.dtype)
        products.append(gradients[:GROUP])
        return tuple(
            total + part[:TILE] + part[TILE:]
            for total, part in zip(sums, products, strict=True)
        )

    zeros = (jnp.zeros((TILE, walk.width), dtype),) * (w.shape[0] + 1)
    sums = blocks.for_each(walk.steps // GROUP, group, zeros)
    sums = [jnp.sum(part, 0, keepdims=True) for part in sums]
    for ref, part in ((dw, jnp.concatenate(sums[:-1])), (dbias, sums[-1])):
        ref[...] = jnp.where(k == 0, part, ref[...] + part)


def _real(walk, first, x):
    """x, zero at the steps that do not exist."""
    valid = walk.inside(first, x.shape[0])
    return x if valid is None else jnp.where(valid, x, 0)


def _seen(x, age, rows, lag):
    """x, zero at the steps `rows` that are too young for the lag."""
    for column in age:
        if lag:
            x = jnp.where(column[rows, :] >= lag, x, 0)
    return x


def _group(x, first):
    """GROUP rows of x. Only whole tiles can be cut out, the rest is turned."""
    start = first // TILE * TILE
    tiles = x[start : start + GROUP + TILE]
    if first > start:
        tiles = blocks.turn(tiles, start - first, 0)
    return tiles[:GROUP]
