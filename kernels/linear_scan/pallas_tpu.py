"""One pass over memory: blocks of time in order, the carry in VMEM between them.

Eight steps fill the rows of a tile: their prefixes are made in three doublings that do
not wait for the carry, which then passes a tile in one multiply-add. The backward pass
is the same walk in the other direction. Complex numbers are (re, im).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import blocks, compat, pairs

PAIRS = True
TILE = 8  # rows of a float32 register


def unsupported(*arguments) -> str | None:
    return blocks.unsupported(*arguments)


def forward(a, x, initial_state, keep, reverse):
    """h and the final state; pairs a [B|1, L|1, *S|1], x [B, L, *S]; keep [B, L]."""
    decay = _flat(_over_channels(a, x))
    values, state = _flat(x), _row_each(initial_state)
    plan = _Plan.of(decay, values, state, keep, reverse)
    dtype = x[0].dtype if len(state) == 1 else state[0].dtype
    block, row = plan.block(descending=reverse), plan.row()
    made = compat.pallas_tpu_call(
        partial(_forward, plan=plan),
        grid=plan.grid,
        semantics=("parallel", "parallel", "arbitrary"),
        in_specs=[
            *[plan.decay(decay[0], descending=reverse)] * len(decay),
            *[block] * len(values),
            *[row] * len(state),
            *plan.keep(descending=reverse),
        ],
        out_specs=[block] * len(state) + [row] * len(state),
        out_shape=[
            *[jax.ShapeDtypeStruct(values[0].shape, dtype)] * len(state),
            *[jax.ShapeDtypeStruct(s.shape, s.dtype) for s in state],
        ],
        scratch_shapes=plan.carries(state) + plan.kept(state),
    )(*decay, *values, *state, *plan.keep_rows(keep, state))
    return (
        tuple(part.reshape(x[0].shape) for part in made[: len(state)]),
        tuple(part.reshape(initial_state[0].shape) for part in made[len(state) :]),
    )


def backward(a, h, initial_state, keep, like_x, h_gradient, final_gradient, reverse):
    """Gradients of a, x and the initial state as plain gradients of their parts:
    g[t] = h_gradient[t] + conj(a[t+1]) g[t+1], da[t] = conj(h[t-1]) g[t]."""
    whole = _over_channels(a, h)
    decay, states, state = _flat(whole), _flat(h), _row_each(initial_state)
    plan = _Plan.of(decay, states, state, keep, reverse)
    down = not reverse
    block, row = plan.block(descending=down), plan.row()
    per_row = (h[0].shape[0], 1, states[0].shape[2])
    da_shape = states[0].shape if plan.varying else per_row
    exact = da_shape == a[0].shape  # nothing is left to sum
    da_like = jax.ShapeDtypeStruct(da_shape, a[0].dtype if exact else state[0].dtype)
    made = compat.pallas_tpu_call(
        partial(_backward, plan=plan, inputs=len(like_x)),
        grid=plan.grid,
        semantics=("parallel", "parallel", "arbitrary"),
        in_specs=[
            *[plan.decay(decay[0], descending=down)] * len(decay),
            *[block] * len(states),
            *[plan.beside(reverse)] * len(states),
            *[block] * len(states),
            *[row] * (2 * len(state)),
            *plan.keep(descending=down),
        ],
        out_specs=[
            *[block if plan.varying else row] * len(decay),
            *[block] * len(like_x),
            *[row] * len(state),
        ],
        out_shape=[
            *[da_like] * len(decay),
            *[jax.ShapeDtypeStruct(h[0].shape[:2] + per_row[2:], like_x[0].dtype)]
            * len(like_x),
            *[jax.ShapeDtypeStruct(per_row, s.dtype) for s in state],
        ],
        scratch_shapes=plan.carries(state) + plan.kept(state),
    )(
        *decay,
        *states,
        *states,
        *_flat(h_gradient),
        *state,
        *_row_each(final_gradient),
        *plan.keep_rows(keep, state),
    )
    da, dx, dstate = _take(made, len(decay), len(like_x), len(state))
    shape = (h[0].shape[0], da_shape[1], *h[0].shape[2:])
    return (
        tuple(
            _reduced(part.reshape(shape), like.shape).astype(like.dtype)
            for part, like in zip(da, a, strict=True)
        ),
        tuple(part.reshape(h[0].shape) for part in dx),
        tuple(part.reshape(initial_state[0].shape) for part in dstate),
    )


def _over_channels(a, x):
    """a with every channel written out; over batch and time it stays as it is."""
    shape = (*a[0].shape[:2], *x[0].shape[2:])
    return tuple(jnp.broadcast_to(part, shape) for part in a)


def _flat(pair):
    return tuple(part.reshape(*part.shape[:2], -1) for part in pair)


def _row_each(pair):
    return tuple(part.reshape(part.shape[0], 1, -1) for part in pair)


def _reduced(array, shape):
    axes = [i for i, size in enumerate(shape) if size == 1 and array.shape[i] != 1]
    return array.sum(axes, keepdims=True) if axes else array


def _take(items, *counts):
    """The items in consecutive tuples of these lengths."""
    items = iter(items)
    return [tuple(next(items) for _ in range(count)) for count in counts]


class _Plan(NamedTuple):
    """Everything static: how the arrays are cut, and which of them there are."""

    shape: tuple[int, int, int]
    decays: int  # parts of a
    inputs: int  # parts of x
    parts: int  # of the state
    kept_parts: int  # 1 where `keep` is given
    varying: bool  # a over time
    reverse: bool
    steps: int  # of a block
    width: int

    @classmethod
    def of(cls, decay, values, state, keep, reverse):
        batch, length, channels = values[0].shape
        width = blocks.lanes(channels)
        return cls(
            (batch, length, channels),
            len(decay),
            len(values),
            len(state),
            int(keep is not None),
            decay[0].shape[1] > 1,
            reverse,
            blocks.steps(length, width),
            width,
        )

    @property
    def grid(self):
        batch, length, channels = self.shape
        return batch, pl.cdiv(channels, self.width), pl.cdiv(length, self.steps)

    @property
    def ragged(self):
        return self.shape[1] % self.steps != 0

    def at(self, k, descending):
        """The block of time that is visited k-th."""
        return self.grid[2] - 1 - k if descending else k

    def block(self, descending):
        return pl.BlockSpec(
            (None, self.steps, self.width),
            lambda b, j, k: (b, self.at(k, descending), j),
        )

    def row(self):
        """One row for all steps; an output stays in VMEM until its last block."""
        return pl.BlockSpec((None, 1, self.width), lambda b, j, k: (b, 0, j))

    def decay(self, array, descending):
        per_batch = array.shape[0] > 1
        steps = self.steps if self.varying else 1

        def index(b, j, k):
            time = self.at(k, descending) if self.varying else 0
            return b if per_batch else 0, time, j

        return pl.BlockSpec((None, steps, self.width), index)

    def beside(self, reverse):
        """The group of steps next to a block, on the side its states come from."""
        per_block = self.steps // blocks.GROUP
        last = pl.cdiv(self.shape[1], blocks.GROUP) - 1

        def index(b, j, k):
            if reverse:
                return b, jnp.minimum((k + 1) * per_block, last), j
            return b, jnp.maximum(self.at(k, True) * per_block - 1, 0), j

        return pl.BlockSpec((None, blocks.GROUP, self.width), index)

    def keep(self, descending):
        spec = pl.BlockSpec(
            (None, None, 1, self.steps),
            lambda b, j, k: (b, self.at(k, descending), 0, 0),
        )
        return [spec] * self.kept_parts

    def keep_rows(self, keep, state):
        if keep is None:
            return []
        return [blocks.rows(keep.astype(state[0].dtype), self.steps, 1)]

    def carries(self, state):
        return [pltpu.VMEM((1, self.width), part.dtype) for part in state]

    def kept(self, state):
        return [pltpu.VMEM((self.steps, 1), state[0].dtype)] * self.kept_parts

    def walk(self, group, carry, descending):
        """group(carry, start, tiles) for the block's groups in order; `start` is the
        first step of a group and `tiles` the order of the tiles in it."""
        count = self.steps // blocks.GROUP
        tiles = range(0, blocks.GROUP, TILE)

        def body(i, carry):
            index = count - 1 - i if descending else i
            start = pl.multiple_of(index * blocks.GROUP, blocks.GROUP)
            return group(carry, start, tiles[::-1] if descending else tiles)

        return jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), body, carry)

    def inside(self, block, start, tile):
        """[TILE, width]: which steps of a tile exist; None for all."""
        if not self.ragged:
            return None
        step = block * self.steps + start + tile + _steps(self.width)
        return step < self.shape[1]


def _forward(*refs, plan):
    a, x, first, keep, h, final, carry, kept = _take(
        refs,
        plan.decays,
        plan.inputs,
        plan.parts,
        plan.kept_parts,
        plan.parts,
        plan.parts,
        plan.parts,
        plan.kept_parts,
    )
    k = pl.program_id(2)
    block, dtype = plan.at(k, plan.reverse), first[0].dtype
    _begin(k, carry, first, keep, kept)

    def group(state, start, tiles):
        decays, inputs = _read(a, start, dtype), _read(x, start, dtype)
        if len(inputs) < plan.parts:
            inputs = (*inputs, jnp.zeros_like(inputs[0]))
        made = {}
        for tile in tiles:
            decay = _kept(_tile(decays, tile), kept, start + tile)
            value = _tile(inputs, tile)
            decay, value = _masked(
                decay, value, plan.inside(block, start, tile), plan.width
            )
            decay, value = _prefixes(decay, value, plan.reverse)
            made[tile] = pairs.add(value, pairs.mul(decay, state))
            state = _last(made[tile], plan.reverse)
        _write(h, start, made)
        return state

    state = plan.walk(group, tuple(part[...] for part in carry), plan.reverse)
    for i in range(plan.parts):
        carry[i][...] = state[i]
        final[i][...] = state[i]


def _backward(*refs, plan, inputs):
    a, h, beside, dh, first, dfinal, keep, da, dx, dfirst, carry, kept = _take(
        refs,
        plan.decays,
        *[plan.parts] * 5,
        plan.kept_parts,
        plan.decays,
        inputs,
        plan.parts,
        plan.parts,
        plan.kept_parts,
    )
    k, down = pl.program_id(2), not plan.reverse
    block, dtype = plan.at(k, down), first[0].dtype
    _begin(k, carry, dfinal, keep, kept)
    start_state = tuple(part[...] for part in first)
    step = _steps(plan.width)
    groups = plan.steps // blocks.GROUP
    first_step = plan.shape[1] - 1 if plan.reverse else 0

    def group(state, start, tiles):
        """`state` is conj(a[t]) g[t] of the step that was visited last, which is what
        reaches the next one through its state."""
        through, da_sum = state
        decays, states = _read(a, start, dtype), _read(h, start, dtype)
        gradients = _read(dh, start, dtype)
        around = _neighbour(h, beside, start, groups, plan.reverse, dtype)
        made_da, made_dx = {}, {}
        for tile in tiles:
            mask = plan.inside(block, start, tile)
            decay = pairs.conj(_kept(_tile(decays, tile), kept, start + tile))
            gradient = _tile(gradients, tile)
            decay, gradient = _masked(decay, gradient, mask, plan.width)
            total, value = _prefixes(decay, pairs.mul(decay, gradient), down)
            passed = pairs.add(value, pairs.mul(total, through))
            g = pairs.add(gradient, _shifted(passed, through, down))
            through = _last(passed, down)
            made_dx[tile] = g

            before = tile + (TILE if plan.reverse else -TILE)
            near = _tile(states, before) if before in tiles else around
            before = _shifted(
                _tile(states, tile), _last(near, plan.reverse), plan.reverse
            )
            at_first = block * plan.steps + start + tile + step == first_step
            before = tuple(
                jnp.where(at_first, one, part)
                for one, part in zip(start_state, before, strict=True)
            )
            product = pairs.mul(pairs.conj(before), g)[: plan.decays]
            product = _kept(product, kept, start + tile)
            if plan.varying:
                made_da[tile] = product
            else:
                if mask is not None:
                    product = tuple(jnp.where(mask, part, 0) for part in product)
                da_sum = pairs.add(da_sum, product)
        if plan.varying:
            _write(da, start, made_da)
        _write(dx, start, made_dx)
        return through, da_sum

    da_sum = ()
    if not plan.varying:
        da_sum = tuple(jnp.zeros((TILE, plan.width), dtype) for _ in range(plan.decays))
    state = tuple(part[...] for part in carry)
    state, da_sum = plan.walk(group, (state, da_sum), down)
    for i in range(plan.parts):
        carry[i][...] = state[i]
        dfirst[i][...] = state[i]
    for whole, part in zip(da, da_sum, strict=False):
        part = jnp.sum(part, 0, keepdims=True)
        whole[...] = jnp.where(k == 0, part, whole[...] + part)


def _begin(k, carry, first, keep, kept):
    @pl.when(k == 0)
    def _():
        for to, part in zip(carry, first, strict=True):
            to[...] = part[...]

    for to, row in zip(kept, keep, strict=True):
        to[...] = blocks.column(row[...])


def _read(refs, start, dtype):
    """A group of rows, or the only row."""
    rows = pl.ds(start, blocks.GROUP)
    return tuple(
        (ref[rows, :] if ref.shape[0] > 1 else ref[...]).astype(dtype) for ref in refs
    )


def _write(refs, start, tiles):
    rows = pl.ds(start, blocks.GROUP)
    for i, ref in enumerate(refs):
        whole = jnp.concatenate([tiles[tile][i] for tile in sorted(tiles)])
        ref[rows, :] = whole.astype(ref.dtype)


def _tile(parts, tile):
    return tuple(
        part[tile : tile + TILE] if part.shape[0] > 1 else part for part in parts
    )


def _kept(parts, kept, start):
    for ref in kept:
        return pairs.scale(parts, ref[pl.ds(pl.multiple_of(start, TILE), TILE), :])
    return parts


def _masked(decay, value, inside, width):
    """Full tiles; steps that do not exist pass the carry and add nothing."""
    decay = tuple(jnp.broadcast_to(part, (TILE, width)) for part in decay)
    if inside is None:
        return decay, value
    decay = _where(inside, decay, (1, 0))
    return decay, _where(inside, value, (0, 0))


def _where(condition, parts, other):
    return tuple(
        jnp.where(condition, part, value)
        for part, value in zip(parts, other, strict=False)
    )


def _steps(width):
    return jax.lax.broadcasted_iota(jnp.int32, (TILE, width), 0)


def _prefixes(decay, value, descending):
    """The recurrence inside a tile, from nothing, and the products of its decays."""
    step = _steps(value[0].shape[1])
    for shift in (1, 2, 4):
        linked = step < TILE - shift if descending else step >= shift
        turn = TILE - shift if descending else shift
        before = (tuple(pltpu.roll(part, turn, 0) for part in p) for p in (decay, value))
        total, partial_sum = before
        value = pairs.add(
            value, pairs.mul(decay, _where(linked, partial_sum, (0, 0)))
        )
        decay = pairs.mul(decay, _where(linked, total, (1, 0)))
    return decay, value


def _last(parts, descending):
    """The row of a tile that is visited last."""
    return tuple(part[:1] if descending else part[-1:] for part in parts)


def _shifted(parts, before, descending):
    """Each row's predecessor in the order of the walk; `before` precedes the tile."""
    step = _steps(parts[0].shape[1])
    first = step == (TILE - 1 if descending else 0)
    turn = TILE - 1 if descending else 1
    return tuple(
        jnp.where(first, row, pltpu.roll(part, turn, 0))
        for part, row in zip(parts, before, strict=True)
    )


def _neighbour(h, beside, start, groups, reverse, dtype):
    """The group of states on the side the states of this group come from."""
    index = start // blocks.GROUP + (1 if reverse else -1)
    here = (index >= 0) & (index < groups)
    rows = pl.ds(pl.multiple_of(jnp.clip(index, 0, groups - 1) * blocks.GROUP,
                                blocks.GROUP), blocks.GROUP)  # fmt: skip
    return tuple(
        jnp.where(here, inner[rows, :], outer[...]).astype(dtype)
        for inner, outer in zip(h, beside, strict=True)
    )
