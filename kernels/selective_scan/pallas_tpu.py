"""Blocks of time in order, the state of N modes x some channels in VMEM between them.

A step works on [N, channels] at once; B[t] and C[t] are columns of it, so they come
with time along the lanes. What is as large as u is read and written in its own dtype,
and widened in VMEM. The states at the start of every block are kept: the backward
pass walks from the last block, makes a block's states again in VMEM and goes back over
them. The gradients of B and C are summed over the channels of a block, then over all.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import blocks
from kernels.blocks import GROUP, TILE

STEPS = 128  # of a block: the lanes of one tile of B and C
STATE = 8192  # modes x channels of a block, where that is 128 channels or more
MODES = 128  # with more, the states of a block would not fit into VMEM
LOG2_E = 1.4426950408889634


def unsupported(u, A) -> str | None:
    if A.shape[1] > MODES:
        return f"takes at most {MODES} modes, got {A.shape[1]}"
    return blocks.unsupported(u, A)


def selective_scan(u, dt, A, B, C, skip, state, into):
    """y [B, L, D] in u's dtype and the final state; see reference.selective_scan."""
    (_, length, channels), modes = u.shape, A.shape[1]
    deep = -modes % TILE
    widest = max(128, STATE // (modes + deep) // 128 * 128)
    # a sum over channels would take in what hangs over the last block
    beside = -channels % 128 if channels > widest else 0
    long = -length % STEPS
    A, B, C = (x.astype(state.dtype) for x in (A, B, C))
    u, dt = (_padded(x, beside) for x in (u, dt))
    if skip is not None:
        skip = _padded(skip.astype(state.dtype)[None], beside)
    A, state = (_padded(x.swapaxes(-1, -2), beside, deep) for x in (A, state))
    B, C = (_padded(x.swapaxes(1, 2), long, deep) for x in (B, C))
    keep = None
    if into is not None:
        keep = blocks.rows((~into).astype(state.dtype), STEPS, 1)
    width = blocks.lanes(channels + beside, widest)
    y, final = _solve(width, u, dt, A, B, C, skip, state, keep)
    return y[..., :channels], final[:, :modes, :channels].swapaxes(1, 2)


def _padded(x, columns, rows=0):
    if not (columns or rows):
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rows), (0, columns)])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(width, u, dt, A, B, C, skip, state, keep):
    return _run(width, u, dt, A, B, C, skip, state, keep)


def _solve_forward(width, u, dt, A, B, C, skip, state, keep):
    outputs = _run(width, u, dt, A, B, C, skip, state, keep, save=True)
    *results, starts = checkpoint_name(outputs, "selective_scan")
    return tuple(results), (u, dt, A, B, C, skip, starts, keep)


def _run(width, u, dt, A, B, C, skip, state, keep, save=False):
    """y, the final state, and where `save` the states at the start of the blocks."""
    walk, modes = _walk(u, width, descending=False), A.shape[0]
    starts = jax.ShapeDtypeStruct((walk.batch, walk.count, *A.shape), A.dtype)
    optional, specs, given = _optional(walk, skip, keep)
    return walk.call(
        partial(_forward, walk, given),
        in_specs=[
            *[walk.sequence()] * 2,
            walk.shared(modes),
            *[_columns(walk, modes)] * 2,
            walk.still(modes),
            *specs,
        ],
        out_specs=[
            walk.sequence(),
            walk.still(modes),
            *[_at_block(walk, modes)] * save,
        ],
        out_shape=[_like(u), _like(state), *[starts] * save],
        scratch_shapes=[
            pltpu.VMEM((modes, width), A.dtype),
            *_copies(walk, A.dtype, u, dt, u),
        ],
    )(u, dt, A, B, C, state, *optional)


def _solve_backward(width, saved, gradients):
    u, dt, A, B, C, skip, starts, keep = saved
    walk, modes = _walk(u, width, descending=True), A.shape[0]
    parts = jax.ShapeDtypeStruct((walk.batch, walk.grid[1], *B.shape[1:]), B.dtype)
    state = _like(gradients[1])
    optional, specs, given = _optional(walk, skip, keep)
    rows = jax.ShapeDtypeStruct((walk.batch, 1, u.shape[2]), A.dtype)
    du, ddt, dA, dB, dC, dstate, *dskip = walk.call(
        partial(_backward, walk, given),
        in_specs=[
            *[walk.sequence()] * 2,
            walk.shared(modes),
            *[_columns(walk, modes)] * 2,
            _at_block(walk, modes),
            walk.sequence(),
            walk.still(modes),
            *specs,
        ],
        out_specs=[
            *[walk.sequence()] * 2,
            walk.still(modes),
            *[_partial_columns(walk, modes)] * 2,
            walk.still(modes),
            *[walk.still(1)] * given.skip,
        ],
        out_shape=[
            _like(u),
            _like(dt),
            state,
            parts,
            parts,
            state,
            *[rows] * given.skip,
        ],
        scratch_shapes=[
            pltpu.VMEM((modes, width), A.dtype),
            pltpu.VMEM((walk.steps, modes, width), A.dtype),
            *_copies(walk, A.dtype, u, dt, u, u, dt),
        ],
    )(u, dt, A, B, C, starts, *gradients, *optional)
    dskip = dskip[0].sum(0) if dskip else None
    return du, ddt, dA.sum(0), dB.sum(1), dC.sum(1), dskip, dstate, None


_solve.defvjp(_solve_forward, _solve_backward)


class _Given(NamedTuple):
    """Which of the arguments that may be absent a kernel has, in their order."""

    skip: bool
    keep: bool


def _optional(walk, skip, keep):
    given = _Given(skip is not None, keep is not None)
    arrays = [x for x in (skip, keep) if x is not None]
    return arrays, [walk.shared(1)] * given.skip + [walk.row(STEPS)] * given.keep, given


def _copies(walk, dtype, *arrays):
    """Memory for the wider copies of what is in other dtypes; see `_wide`."""
    block = walk.steps, walk.width
    return [pltpu.VMEM(block, dtype) for x in arrays if x.dtype != dtype]


def _walk(u, width, descending):
    steps = min(STEPS, u.shape[1] + -u.shape[1] % GROUP)
    return blocks.Walk(*u.shape, steps, width, descending)


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _columns(walk, modes):
    """Of [B, N, L]."""
    return pl.BlockSpec((None, modes, STEPS), lambda b, j, k: (b, 0, walk.at(k)))


def _partial_columns(walk, modes):
    """Of [B, blocks of channels, N, L]."""
    return pl.BlockSpec(
        (None, None, modes, STEPS), lambda b, j, k: (b, j, 0, walk.at(k))
    )


def _at_block(walk, modes):
    """Of [B, blocks of time, N, D]."""
    return pl.BlockSpec(
        (None, None, modes, walk.width), lambda b, j, k: (b, walk.at(k), 0, j)
    )


def _wide(refs, copies, dtype):
    """Of references those with this dtype, and copies for the others."""
    copies = iter(copies)
    return [ref if ref.dtype == dtype else next(copies) for ref in refs]


def _filled(refs, copies):
    """Copies of blocks that were read, in a wider dtype."""
    for ref, copy in zip(refs, copies, strict=True):
        if copy is not ref:
            copy[...] = ref[...].astype(copy.dtype)


def _forward(walk, given, u, dt, A, B, C, first, *rest):
    skip, rest = rest[: given.skip], rest[given.skip :]
    keep, (y_out, final, *rest) = rest[: given.keep], rest[given.keep :]
    saved = len(rest) - 1 - len(_copies(walk, A.dtype, u, dt, u))
    starts, (carry, *copies) = rest[:saved], rest[saved:]
    narrow = u, dt, y_out
    u, dt, y = _wide(narrow, copies, A.dtype)
    _filled(narrow[:2], (u, dt))
    block = pl.program_id(2)

    @pl.when(block == 0)
    def _():
        carry[...] = first[...]

    for ref in starts:
        ref[...] = carry[...]
    rate = A[...] * LOG2_E

    def tile(i, state):
        h, columns = state
        part = _Tile.read(walk, block, i, u, dt, columns)
        sums = []
        for step in range(TILE):
            h = part.next(step, rate, h)
            sums.append(_fold(h * part.column(part.C, step)))
        outputs = _row_sums(sums)
        for ref in skip:
            outputs += ref[...] * part.u
        y[part.rows, :] = outputs
        return h, _turned(columns, TILE)

    columns = tuple(ref[...] for ref in (B, C, *keep))
    h, _ = blocks.for_each(walk.steps // TILE, tile, (carry[...], columns))
    carry[...] = h
    final[...] = h
    _filled([y], [y_out])


def _backward(walk, given, u, dt, A, B, C, starts, dy, dfinal, *rest):
    skip, rest = rest[: given.skip], rest[given.skip :]
    keep, rest = rest[: given.keep], rest[given.keep :]
    (*large, dA, dB, dC, dfirst), rest = rest[:6], rest[6:]
    dskip, (carry, states, *copies) = rest[: given.skip], rest[given.skip :]
    narrow = u, dt, dy, *large
    u, dt, dy, du, ddt = _wide(narrow, copies, A.dtype)
    _filled(narrow[:3], (u, dt, dy))
    k = pl.program_id(2)
    block, count = walk.at(k), walk.steps // TILE

    @pl.when(k == 0)
    def _():
        carry[...] = dfinal[...]
        dA[...] = jnp.zeros_like(dA)
        for ref in dskip:
            ref[...] = jnp.zeros_like(ref)

    modes = A[...]
    rate = modes * LOG2_E

    def again(i, state):
        h, columns = state
        part = _Tile.read(walk, block, i, u, dt, columns)
        for step in range(TILE):
            states[i * TILE + step] = h
            h = part.next(step, rate, h)
        return h, _turned(columns, TILE)

    columns = tuple(ref[...] for ref in (B, C, *keep))
    h, columns = blocks.for_each(count, again, (starts[...], columns))
    lane = jax.lax.broadcasted_iota(jnp.int32, (modes.shape[0], STEPS), 1)

    def tile(i, state):
        """`through` is what reaches a step by way of the state it leaves."""
        h, through, dA_sum, dB_sum, dC_sum, columns = state
        columns = _turned(columns, -TILE)
        i = count - 1 - i
        part = _Tile.read(walk, block, i, u, dt, columns)
        dy_rows = part.real(dy[part.rows, :])
        dx_sums, decay_sums = [], []
        for step in reversed(range(TILE)):
            before, at_step = states[i * TILE + step], lane == i * TILE + step
            dy_row = part.row(dy_rows, step)
            dC_sum = jnp.where(at_step, jnp.sum(h * dy_row, 1, keepdims=True), dC_sum)
            g = through + part.column(part.C, step) * dy_row
            dB_step = jnp.sum(g * part.row(part.x, step), 1, keepdims=True)
            dB_sum = jnp.where(at_step, dB_step, dB_sum)
            dx_sums.append(_fold(g * part.column(part.B, step)))
            through = part.decayed(step, rate, g)
            change = part.linked(step, through * before)
            decay_sums.append(_fold(change * modes))
            dA_sum = dA_sum + change * part.row(part.dt, step)
            h = before
        dx = _row_sums(dx_sums[::-1])
        into_u = dx * part.dt
        for ref, gradient in zip(skip, dskip, strict=True):
            into_u += ref[...] * dy_rows
            gradient[...] += jnp.sum(dy_rows * part.u, 0, keepdims=True)
        du[part.rows, :] = into_u
        ddt[part.rows, :] = dx * part.u + _row_sums(decay_sums[::-1])
        return h, through, dA_sum, dB_sum, dC_sum, columns

    zeros = jnp.zeros_like(modes), *[jnp.zeros((modes.shape[0], STEPS), A.dtype)] * 2
    state = (h, carry[...], *zeros, columns)
    _, through, dA_sum, dB_sum, dC_sum, _ = blocks.for_each(count, tile, state)
    carry[...] = through
    dfirst[...] = through
    dA[...] += dA_sum
    dB[...] = dB_sum
    dC[...] = dC_sum
    _filled([du, ddt], large)


class _Tile(NamedTuple):
    """TILE steps: u, dt and x = dt u as rows; B, C and keep as the first TILE lanes."""

    rows: object
    inside: jax.Array | None
    u: jax.Array
    dt: jax.Array
    x: jax.Array
    B: jax.Array
    C: jax.Array
    keep: list[jax.Array]

    @classmethod
    def read(cls, walk, block, i, u, dt, columns):
        start = pl.multiple_of(i * TILE, TILE)
        rows, valid = pl.ds(start, TILE), walk.inside(block * walk.steps + start, TILE)
        u, dt = (_real(ref[rows, :], valid) for ref in (u, dt))
        B, C, *keep = columns
        return cls(rows, valid, u, dt, dt * u, B, C, keep)

    def real(self, rows):
        return _real(rows, self.inside)

    def row(self, rows, step):
        return rows[step : step + 1]

    def column(self, columns, step):
        return columns[:, step : step + 1]

    def decayed(self, step, rate, h):
        return self.linked(step, jnp.exp2(self.row(self.dt, step) * rate) * h)

    def linked(self, step, h):
        """h, or 0 where a reset cuts the link into a step."""
        for keep in self.keep:
            h = jnp.where(self.column(keep, step) > 0, h, 0)
        return h

    def next(self, step, rate, h):
        increment = self.row(self.x, step) * self.column(self.B, step)
        return self.decayed(step, rate, h) + increment


def _real(rows, valid):
    """A step that does not exist has dt = 0: it changes nothing."""
    return rows if valid is None else jnp.where(valid, rows, 0)


def _turned(columns, steps):
    """The columns `steps` further come first. They go along tile by tile, because the
    result of a turn is long in coming."""
    return tuple(blocks.turn(part, -steps, 1) for part in columns)


def _fold(x):
    """[N, width] -> [TILE, width], with the same sum over rows."""
    return sum(x[i : i + TILE] for i in range(0, x.shape[0], TILE))


def _row_sums(parts):
    """TILE arrays [TILE, width] -> one, whose row i is the sum of the rows of the i-th.

    At every level two arrays become one, in which rows of both alternate.
    """
    row = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 0)
    for shift in (1, 2, 4):
        even = (row & shift) == 0
        parts = [
            jnp.where(even, a, b) + blocks.turn(jnp.where(even, b, a), shift, 0)
            for a, b in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]
