"""A warp owns a few channels and walks through time in tiles of a few steps.

The states of a tile [steps, modes, channels] exist in registers only: time lies within
a thread, so that the scan is one multiply-add per state, modes and channels lie across
the lanes. Where batch and channels alone cannot fill the device, time is split too:
a first pass makes what each segment adds to the state and how much of it decays, the
linear scan joins the segments, and the second pass starts in each of them.

The backward pass keeps the state at every second tile of the forward pass. It walks
tiles of half the length backwards, makes their states again and takes several blocks of
channels in each tile, so that the gradients of B and C are added up over channels in
registers first. What is left of them, one partial sum per program, is added by XLA.
"""

import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax.ad_checkpoint import checkpoint_name

from kernels.compat import triton_call
from kernels.linear_scan import triton as linear

SLOTS = 132 * 12  # warps of the forward pass that an H100 or H200 holds at once
BACKWARD_SLOTS = 132 * 8
BLOCKS = 8  # blocks of channels of a program of the backward pass
SEGMENT = 64  # steps, at least: shorter ones cost more to join than they gain
STORED = 2  # tiles of the forward pass, of which the state before the first is kept


def unsupported(*arguments) -> str | None:
    return None


@jax.custom_vjp
def selective_scan(u, dt, A, B, C, skip, state, into):
    """y [B, L, D] in u's dtype and the final state; see reference.selective_scan. Each
    array is read in its own dtype and used in that of the state."""
    y, final, _ = _run(u, dt, A, B, C, skip, state, into, save=False)
    return y, final


def _selective_scan_forward(u, dt, A, B, C, skip, state, into):
    outputs = _run(u, dt, A, B, C, skip, state, into, save=True)
    y, final, starts = checkpoint_name(outputs, "selective_scan")
    return (y, final), (u, dt, A, B, C, skip, into, starts)


def _run(u, dt, A, B, C, skip, state, into, save):
    batch, length, channels = u.shape
    rate, keep, state = _prepared(A, into, state)
    constants = _constants(A, keep)
    tile, width = constants["TILE"], constants["WIDTH"]
    blocks = triton.cdiv(channels, width)
    segment, segments = _segments(
        length, batch * blocks * constants["num_warps"], SLOTS, tile
    )
    before = state
    if segments > 1:
        before = _joined(u, dt, rate, B, state, keep, segment, segments, constants)
    kept = triton.cdiv(length, STORED * tile)
    shapes = [
        jax.ShapeDtypeStruct(u.shape, u.dtype),
        jax.ShapeDtypeStruct(state.shape, state.dtype),
        jax.ShapeDtypeStruct((batch, kept, *rate.shape) if save else (1,), state.dtype),
    ]
    y, final, starts = triton_call(
        _forward,
        (batch * blocks, segments),
        (
            *(u, dt, rate, B, C, _or(skip, u), state, before, _or(keep, u)),
            *(length, channels, segment),
        ),
        shapes,
        SAVE=save,
        STORED=STORED * tile,
        SKIP=skip is not None,
        **constants,
    )
    return y, final.swapaxes(1, 2), starts


def _selective_scan_backward(saved, gradients):
    u, dt, A, B, C, skip, into, starts = saved
    dy, d_final = gradients
    batch, length, channels = u.shape
    rate, keep, d_final = _prepared(A, into, d_final)
    constants = _constants(A, keep)
    stored, width = STORED * constants["TILE"], constants["WIDTH"]
    tile = max(constants["TILE"] // 2, 1)
    between = max(stored // tile - 2, 1)
    group = min(BLOCKS, triton.cdiv(channels, width))
    groups = triton.cdiv(channels, width * group)
    segment, segments = _segments(
        length, batch * groups * constants["num_warps"], BACKWARD_SLOTS, stored
    )
    after = d_final
    if segments > 1:
        after = _joined(
            dy, dt, rate, C, d_final, keep, segment, segments, constants, reverse=True
        )
    wide = d_final.dtype
    per_segment = jax.ShapeDtypeStruct((batch, segments, *rate.shape), wide)
    per_group = jax.ShapeDtypeStruct((batch, groups, length, A.shape[1]), wide)
    inside = jax.ShapeDtypeStruct((batch, segments, between, *rate.shape), wide)
    du, ddt, dB, dC, carry, dA, _ = triton_call(
        _backward,
        (batch * groups, segments),
        (
            *(u, dt, rate, B, C, _or(skip, u), dy, d_final, after, starts),
            _or(keep, u),
            *(length, channels, segment),
        ),
        (
            jax.ShapeDtypeStruct(u.shape, u.dtype),
            jax.ShapeDtypeStruct(dt.shape, dt.dtype),
            *(per_group, per_group, per_segment, per_segment, inside),
        ),
        STORED=stored,
        BETWEEN=between,
        GROUP=group,
        SKIP=skip is not None,
        **constants | {"TILE": tile},
    )
    return (
        *(du, ddt, dA.sum((0, 1)).T.astype(A.dtype)),
        *(dB.sum(1).astype(B.dtype), dC.sum(1).astype(C.dtype)),
        None if skip is None else _dskip(u, dy, wide).astype(skip.dtype),
        *(carry[:, 0].swapaxes(1, 2), None),
    )


def _dskip(u, dy, dtype):
    return jnp.sum(u.astype(dtype) * dy.astype(dtype), (0, 1))


selective_scan.defvjp(_selective_scan_forward, _selective_scan_backward)


def _prepared(A, into, state):
    """Modes before channels, which are contiguous then; a = 2^(dt rate)."""
    keep = None if into is None else (~into).astype(state.dtype)
    rate = (A.astype(state.dtype) * math.log2(math.e)).T
    return rate, keep, state.swapaxes(1, 2)


def _constants(A, keep):
    modes = triton.next_power_of_2(A.shape[1])
    width = max(8, 32 // modes)
    warps = min(max(modes // 16, 1), 8)
    per_thread = max(modes * width // (32 * warps), 1)
    return {
        "KEEP": keep is not None,
        "N": A.shape[1],
        "MODES": modes,
        "WIDTH": width,
        "TILE": min(16, max(64 // per_thread, 1)),
        "num_warps": warps,
    }


def _segments(length, warps, slots, tile):
    """Steps per segment, whole tiles, and the number of segments."""
    count = max(slots // warps, 1)
    steps = max(triton.cdiv(length, count), SEGMENT)
    steps = triton.cdiv(steps, tile) * tile
    return steps, triton.cdiv(length, steps)


def _joined(
    x, dt, rate, weights, state, keep, segment, segments, constants, reverse=False
):
    """The state that enters each segment but the first, [B, segments - 1, N, D]."""
    batch, length, channels = x.shape
    shape = jax.ShapeDtypeStruct((batch, segments - 1, *rate.shape), state.dtype)
    decays, ends = triton_call(
        _summary,
        (batch * triton.cdiv(channels, constants["WIDTH"]), segments - 1),
        (x, dt, rate, weights, _or(keep, x), length, channels, segment),
        (shape, shape),
        REVERSE=reverse,
        **constants,
    )
    if keep is not None:
        links = jnp.pad(keep, ((0, 0), (0, -length % segment)), constant_values=1)
        links = links.reshape(batch, segments, segment).all(2)
        keep = links[:, 1:] if reverse else links[:, :-1]
    (states,), _ = linear.forward((decays,), (ends,), (state,), keep, reverse)
    return states


def _or(array, other):
    return other if array is None else array


@triton.jit
def _combine(a, x, b, y):
    return b * a, b * x + y


@triton.jit
def _combine_before(a, x, s, p, b, y, t, q):
    """Also s + p h: the state that its last step received, and its own term."""
    return b * a, b * x + y, q * x + t, q * a


@triton.jit
def _passed(decay, x, KEEP: tl.constexpr):
    """decay x, or 0 where a reset cuts it. There the decay, else >= 0, is -1: 0 times
    what is not finite would be NaN."""
    return tl.where(decay < 0, 0.0, decay * x) if KEEP else decay * x


@triton.jit
def _product(a, b):
    return tl.where(tl.minimum(a, b) < 0, -1.0, a * b)


@triton.jit
def _combine_kept(a, x, b, y):
    return _product(a, b), _passed(b, x, True) + y


@triton.jit
def _combine_before_kept(a, x, s, p, b, y, t, q):
    return (
        _product(a, b),
        _passed(b, x, True) + y,
        _passed(q, x, True) + t,
        _product(q, a),
    )


@triton.jit
def _rows(x, row, count, steps, t_mask, columns, real, dtype: tl.constexpr):
    """x[row + steps, columns] of x [*, count]; 0 where t_mask or real does not hold."""
    at = row * count + steps[:, None] * count + columns[None, :]
    return tl.load(x + at, mask=t_mask[:, None] & real[None, :], other=0.0).to(dtype)


@triton.jit
def _skipped(skip, columns, real, rows):
    """skip x of rows x."""
    return tl.load(skip + columns, mask=real, other=0.0).to(rows.dtype)[None] * rows


@triton.jit
def _decay(dt, rate, keep, row, steps, t_mask, KEEP: tl.constexpr):
    decay = tl.exp2(dt[:, None, :] * rate[None])
    if KEEP:
        links = tl.load(keep + row + steps, mask=t_mask, other=1.0)
        decay = tl.where(links[:, None, None] > 0, decay, -1.0)
    return decay


@triton.jit
def _states(decay, increment, h, steps, KEEP: tl.constexpr):
    """The states of a tile; h, the one before it, enters with the first step."""
    first = (steps == 0)[:, None, None]
    increment = tl.where(first, _passed(decay, h[None], KEEP) + increment, increment)
    if KEEP:
        _, states = tl.associative_scan((decay, increment), 0, _combine_kept)
    else:
        _, states = tl.associative_scan((decay, increment), 0, _combine)
    return states


@triton.jit
def _step(tile, index, steps):
    """One step of a tile. x + -0 is x for every x: the compiler drops the sum."""
    return tl.sum(tl.where((steps == index)[:, None, None], tile, -0.0), 0)


@triton.jit
def _flipped(x):
    """x in the reversed order of its first axis, a power of two: renamed registers.
    (The reversed associative scan would shuffle lanes.)"""
    steps: tl.constexpr = x.shape[0]
    modes: tl.constexpr = x.shape[1]
    width: tl.constexpr = x.shape[2]
    for bit in tl.static_range(4):
        if (2 << bit) <= steps:
            x = tl.reshape(x, (steps // (2 << bit), 2, 1 << bit, modes, width))
            even, odd = tl.split(tl.permute(x, (0, 2, 3, 4, 1)))
            x = tl.permute(tl.join(odd, even), (0, 4, 1, 2, 3))
            x = tl.reshape(x, (steps, modes, width))
    return x


@triton.jit
def _summary(
    x, dt, rate, weights, keep,
    length, channels, segment,
    decays, ends,
    REVERSE: tl.constexpr, KEEP: tl.constexpr, N: tl.constexpr, MODES: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What a segment adds to its state, h = a h + dt x w or in reverse h = a (h + x w),
    and its whole decay."""
    blocks = tl.cdiv(channels, WIDTH)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    n = tl.arange(0, MODES)
    steps = tl.arange(0, TILE)
    real = d < channels
    n_mask = n < N
    state_mask = n_mask[:, None] & real[None, :]
    place = n[:, None] * channels + d[None, :]
    rates = tl.load(rate + place, mask=state_mask, other=0.0)
    dtype = rates.dtype
    h = tl.zeros_like(rates)
    time = tl.zeros((TILE, WIDTH), dtype)
    links = tl.full((TILE,), 1.0, dtype)
    first = (tl.program_id(1) + (1 if REVERSE else 0)) * segment
    last = tl.minimum(first + segment, length)
    for start in range(0, last - first, TILE):
        order = start + steps
        t_mask = order < last - first
        # row + offset, in either direction
        row = b * length + first
        offset = (last - first - 1 - order) if REVERSE else order
        dts = _rows(dt, row, channels, offset, t_mask, d, real, dtype)
        xs = _rows(x, row, channels, offset, t_mask, d, real, dtype)
        ws = _rows(weights, row, N, offset, t_mask, n, n_mask, dtype)
        decay = _decay(dts, rates, keep, row, offset, t_mask, KEEP)
        if REVERSE:
            increment = _passed(decay, xs[:, None, :] * ws[:, :, None], KEEP)
        else:
            increment = (dts * xs)[:, None, :] * ws[:, :, None]
        h = _step(_states(decay, increment, h, steps, KEEP), TILE - 1, steps)
        time += dts
        if KEEP:
            links *= tl.load(keep + row + offset, mask=t_mask, other=1.0)
    total = tl.exp2(rates * tl.sum(time, 0)[None, :])
    if KEEP:
        total = tl.where(tl.min(links, 0) > 0, total, 0.0)
    at = (b * tl.num_programs(1) + tl.program_id(1)) * N * channels + place
    tl.store(ends + at, h, mask=state_mask)
    tl.store(decays + at, total, mask=state_mask)


@triton.jit
def _forward(
    u, dt, rate, B, C, skip, state, before, keep,
    length, channels, segment,
    y, final, starts,
    SAVE: tl.constexpr, STORED: tl.constexpr, SKIP: tl.constexpr, KEEP: tl.constexpr,
    N: tl.constexpr, MODES: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, WIDTH)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    s = tl.program_id(1)
    n = tl.arange(0, MODES)
    steps = tl.arange(0, TILE)
    real = d < channels
    n_mask = n < N
    state_mask = n_mask[:, None] & real[None, :]
    place = n[:, None] * channels + d[None, :]
    size = N * channels
    rates = tl.load(rate + place, mask=state_mask, other=0.0)
    dtype = rates.dtype
    if s == 0:
        h = tl.load(state + b * size + place, mask=state_mask, other=0.0)
    else:
        at = (b * (tl.num_programs(1) - 1) + s - 1) * size + place
        h = tl.load(before + at, mask=state_mask, other=0.0)
    first = s * segment
    last = tl.minimum(first + segment, length)
    for start in range(first, last, TILE):
        if SAVE and start % STORED == 0:
            at = (b * tl.cdiv(length, STORED) + start // STORED) * size + place
            tl.store(starts + at, h, mask=state_mask)
        t_mask = start + steps < last
        row = b * length + start
        dts = _rows(dt, row, channels, steps, t_mask, d, real, dtype)
        us = _rows(u, row, channels, steps, t_mask, d, real, dtype)
        Bs = _rows(B, row, N, steps, t_mask, n, n_mask, dtype)
        Cs = _rows(C, row, N, steps, t_mask, n, n_mask, dtype)
        decay = _decay(dts, rates, keep, row, steps, t_mask, KEEP)
        increment = (dts * us)[:, None, :] * Bs[:, :, None]
        states = _states(decay, increment, h, steps, KEEP)
        ys = tl.sum(states * Cs[:, :, None], 1)
        if SKIP:
            ys += _skipped(skip, d, real, us)
        at = row * channels + steps[:, None] * channels + d[None, :]
        mask = t_mask[:, None] & real[None, :]
        tl.store(y + at, ys.to(y.dtype.element_ty), mask=mask)
        h = _step(states, TILE - 1, steps)
    if s == tl.num_programs(1) - 1:
        tl.store(final + b * size + place, h, mask=state_mask)


@triton.jit
def _backward(
    u, dt, rate, B, C, skip, dy, d_final, after, starts, keep,
    length, channels, segment,
    du, ddt, dB, dC, carry, dA, inside,
    STORED: tl.constexpr, BETWEEN: tl.constexpr, GROUP: tl.constexpr,
    SKIP: tl.constexpr, KEEP: tl.constexpr, N: tl.constexpr, MODES: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """With c = C dy and q[t] = a[t] g[t], the gradient of the state before a step:
    g = c + q[t+1], du = dt B g, da a = g (h - increment).

    q and dA lie in memory between the tiles, in `carry`, which ends as the gradient of
    the state before the segment, and in `dA`. The last of the tiles that share a stored
    state leaves those before the tiles in between in `inside`.
    """
    groups = tl.cdiv(channels, WIDTH * GROUP)
    b = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    s = tl.program_id(1)
    n = tl.arange(0, MODES)
    steps = tl.arange(0, TILE)
    n_mask = n < N
    size = N * channels
    dtype = rate.dtype.element_ty
    base = (b * tl.num_programs(1) + s) * size
    between = base * BETWEEN
    for block in range(0, GROUP):
        d = (group * GROUP + block) * WIDTH + tl.arange(0, WIDTH)
        state_mask = n_mask[:, None] & (d < channels)[None, :]
        place = n[:, None] * channels + d[None, :]
        if s == tl.num_programs(1) - 1:
            q = tl.load(d_final + b * size + place, mask=state_mask, other=0.0)
        else:
            at = (b * (tl.num_programs(1) - 1) + s) * size + place
            q = tl.load(after + at, mask=state_mask, other=0.0)
        tl.store(carry + base + place, q, mask=state_mask)
        tl.store(dA + base + place, tl.zeros_like(q), mask=state_mask)
    tl.debug_barrier()
    first = s * segment
    last = tl.minimum(first + segment, length)
    tiles = tl.cdiv(last - first, TILE)
    for i in range(0, tiles):
        start = first + (tiles - 1 - i) * TILE
        t_mask = start + steps < last
        row = b * length + start
        stored = start // STORED * STORED
        # The tiles to walk through from the stored state to this one; the others find
        # what the last one left.
        newest = (i == 0) | (start + TILE == stored + STORED)
        from_stored = newest | (start == stored)
        passed = stored if newest else start
        left = between + ((start - stored) // TILE - 1) * size
        sum_B = tl.zeros((TILE, MODES, WIDTH), dtype)
        sum_C = tl.zeros((TILE, MODES, WIDTH), dtype)
        for block in range(0, GROUP):
            d = (group * GROUP + block) * WIDTH + tl.arange(0, WIDTH)
            real = d < channels
            state_mask = n_mask[:, None] & real[None, :]
            place = n[:, None] * channels + d[None, :]
            rates = tl.load(rate + place, mask=state_mask, other=0.0)
            at = (b * tl.cdiv(length, STORED) + start // STORED) * size + place
            if from_stored:
                h = tl.load(starts + at, mask=state_mask, other=0.0)
            else:
                h = tl.load(inside + left + place, mask=state_mask, other=0.0)
            for earlier in range(passed, start, TILE):
                on = steps < TILE  # an earlier tile is whole
                line = b * length + earlier
                dts = _rows(dt, line, channels, steps, on, d, real, dtype)
                us = _rows(u, line, channels, steps, on, d, real, dtype)
                Bs = _rows(B, line, N, steps, on, n, n_mask, dtype)
                decay = _decay(dts, rates, keep, line, steps, on, KEEP)
                increment = (dts * us)[:, None, :] * Bs[:, :, None]
                h = _step(_states(decay, increment, h, steps, KEEP), TILE - 1, steps)
                if earlier + TILE < start:
                    at = between + (earlier - stored) // TILE * size + place
                    tl.store(inside + at, h, mask=state_mask)
            dts = _rows(dt, row, channels, steps, t_mask, d, real, dtype)
            us = _rows(u, row, channels, steps, t_mask, d, real, dtype)
            dys = _rows(dy, row, channels, steps, t_mask, d, real, dtype)
            Bs = _rows(B, row, N, steps, t_mask, n, n_mask, dtype)
            Cs = _rows(C, row, N, steps, t_mask, n, n_mask, dtype)
            decay = _decay(dts, rates, keep, row, steps, t_mask, KEEP)
            xs = dts * us
            increment = xs[:, None, :] * Bs[:, :, None]
            states = _states(decay, increment, h, steps, KEEP)
            sum_C += states * dys[:, None, :]
            carried = states - increment

            q = tl.load(carry + base + place, mask=state_mask, other=0.0)
            c = dys[:, None, :] * Cs[:, :, None]
            c = tl.where((steps == TILE - 1)[:, None, None], c + q[None], c)
            decay, c = _flipped(decay), _flipped(c)
            one = tl.full(c.shape, 1.0, dtype)
            if KEEP:
                _, qs, g, _ = tl.associative_scan(
                    (decay, _passed(decay, c, KEEP), c, one), 0, _combine_before_kept
                )
            else:
                _, qs, g, _ = tl.associative_scan(
                    (decay, decay * c, c, one), 0, _combine_before
                )
            tl.store(carry + base + place, _step(qs, TILE - 1, steps), mask=state_mask)
            g = _flipped(g)
            carried *= g
            rate_sum = tl.load(dA + base + place, mask=state_mask, other=0.0)
            rate_sum += tl.sum(carried * dts[:, None, :], 0)
            tl.store(dA + base + place, rate_sum, mask=state_mask)
            through_B = tl.sum(g * Bs[:, :, None], 1)
            through_a = tl.sum(carried * rates[None], 1) * 0.6931471805599453
            at = row * channels + steps[:, None] * channels + d[None, :]
            mask = t_mask[:, None] & real[None, :]
            through_u = dts * through_B
            if SKIP:
                through_u += _skipped(skip, d, real, dys)
            tl.store(du + at, through_u.to(du.dtype.element_ty), mask=mask)
            slope = us * through_B + through_a
            tl.store(ddt + at, slope.to(ddt.dtype.element_ty), mask=mask)
            sum_B += g * xs[:, None, :]
            # the next tile reads what other threads wrote to carry and dA
            tl.debug_barrier()
        part = (b * groups + group) * length + start
        at = part * N + steps[:, None] * N + n[None, :]
        mask = t_mask[:, None] & n_mask[None, :]
        tl.store(dB + at, tl.sum(sum_B, 2), mask=mask)
        tl.store(dC + at, tl.sum(sum_C, 2), mask=mask)
