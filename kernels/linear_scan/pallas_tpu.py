"""One pass over memory: blocks of time in order, the carry in VMEM between them.

Eight steps fill the rows of a tile: their prefixes are made in three doublings that do
not wait for the carry, which then passes a tile in one multiply-add. The backward pass
is the same walk in the other direction. Complex numbers are (re, im).
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import blocks, pairs
from kernels.blocks import GROUP, TILE

PAIRS = True


def unsupported(*arguments) -> str | None:
    return blocks.unsupported(*arguments)


def forward(a, x, initial_state, keep, reverse):
    """h and the final state; pairs a [B|1, L|1, *S|1], x [B, L, *S]; keep [B, L]."""
    decay, values = _flat(_over_channels(a, x)), _flat(x)
    state = _row_each(initial_state)
    walk = blocks.Walk.over(values[0], descending=reverse)
    h_dtype = x[0].dtype if len(state) == 1 else state[0].dtype
    h_like = jax.ShapeDtypeStruct(values[0].shape, h_dtype)
    h, final = _call(
        _forward,
        walk,
        keep,
        arguments=[
            (decay, _decay(walk, decay[0])),
            (values, walk.sequence()),
            (state, walk.still(1)),
        ],
        outputs=[
            ([h_like] * len(state), walk.sequence()),
            (state, walk.still(1)),
        ],
    )
    return _like(h, x), _like(final, initial_state)


def backward(a, h, initial_state, keep, like_x, h_gradient, final_gradient, reverse):
    """Gradients of a, x and the initial state as plain gradients of their parts:
    g[t] = h_gradient[t] + conj(a[t+1]) g[t+1], da[t] = conj(h[t-1]) g[t]."""
    decay, states = _flat(_over_channels(a, h)), _flat(h)
    state = _row_each(initial_state)
    walk = blocks.Walk.over(states[0], descending=not reverse)
    varying = decay[0].shape[1] > 1
    da_shape = states[0].shape if varying else state[0].shape
    summed = not varying or states[0].size != a[0].size  # over time or afterwards
    da_like = jax.ShapeDtypeStruct(da_shape, (state if summed else a)[0].dtype)
    dx_like = jax.ShapeDtypeStruct(states[0].shape, like_x[0].dtype)
    da, dx, dstate = _call(
        _backward,
        walk,
        keep,
        arguments=[
            (decay, _decay(walk, decay[0])),
            (states, walk.sequence()),
            (states, _beside(walk)),
            (_flat(h_gradient), walk.sequence()),
            (state, walk.still(1)),
            (_row_each(final_gradient), walk.still(1)),
        ],
        outputs=[
            ([da_like] * len(decay), walk.sequence() if varying else walk.still(1)),
            ([dx_like] * len(like_x), walk.sequence()),
            (state, walk.still(1)),
        ],
    )
    shape = (da_shape[0], da_shape[1], *h[0].shape[2:])
    da = tuple(
        _reduced(part.reshape(shape), like.shape).astype(like.dtype)
        for part, like in zip(da, a, strict=True)
    )
    return da, _like(dx, h), _like(dstate, initial_state)


def _call(kernel, walk, keep, arguments, outputs):
    """Both are [(parts, their block)], of which the kernel gets tuples; then it gets
    `column`, of the links kept, where `keep` is given, and the carry."""
    like = outputs[-1][0][0]
    sizes = [len(parts) for parts, _ in (*arguments, *outputs)]
    arrays = [part for parts, _ in arguments for part in parts]
    in_specs = [block for parts, block in arguments for _ in parts]
    scratch = [pltpu.VMEM((1, walk.width), like.dtype)] * len(outputs[-1][0])
    if keep is not None:
        arrays.append(blocks.rows(keep.astype(like.dtype), walk.steps, 1))
        in_specs.append(walk.row(walk.steps))
        scratch.append(pltpu.VMEM((walk.steps, 1), like.dtype))

    def body(*refs):
        input_refs, output_refs = refs[: len(arrays)], refs[len(arrays) :]
        column = None
        if keep is not None:
            *input_refs, row = input_refs
            *output_refs, column = output_refs
            column[...] = blocks.column(row[...])
        *tuples, carry = _take([*input_refs, *output_refs], sizes)
        kernel(walk, column, carry, *tuples)

    results = walk.call(
        body,
        in_specs=in_specs,
        out_specs=[block for parts, block in outputs for _ in parts],
        out_shape=[
            jax.ShapeDtypeStruct(part.shape, part.dtype)
            for parts, _ in outputs
            for part in parts
        ],
        scratch_shapes=scratch,
    )(*arrays)
    return _take(results, [len(parts) for parts, _ in outputs])[: len(outputs)]


def _take(items, sizes):
    """The items in consecutive tuples of these sizes, and the rest."""
    items = iter(items)
    return [*(tuple(next(items) for _ in range(size)) for size in sizes), tuple(items)]


def _over_channels(a, x):
    """a with every channel written out; over batch and time it stays as it is."""
    shape = (*a[0].shape[:2], *x[0].shape[2:])
    return tuple(jnp.broadcast_to(part, shape) for part in a)


def _flat(pair):
    return tuple(part.reshape(*part.shape[:2], -1) for part in pair)


def _row_each(pair):
    return tuple(part.reshape(part.shape[0], 1, -1) for part in pair)


def _like(parts, references):
    return tuple(part.reshape(references[0].shape) for part in parts)


def _reduced(array, shape):
    axes = [i for i, size in enumerate(shape) if size == 1 and array.shape[i] != 1]
    return array.sum(axes, keepdims=True) if axes else array


def _decay(walk, array):
    batched, varying = array.shape[0] > 1, array.shape[1] > 1

    def index(b, j, k):
        return b if batched else 0, walk.at(k) if varying else 0, j

    return pl.BlockSpec((None, walk.steps if varying else 1, walk.width), index)


def _beside(walk):
    """The group of steps next to a block, on the side its states come from."""
    per_block = walk.steps // GROUP
    last = pl.cdiv(walk.length, GROUP) - 1

    def index(b, j, k):
        first = walk.at(k) * per_block
        if walk.descending:
            return b, jnp.maximum(first - 1, 0), j
        return b, jnp.minimum(first + per_block, last), j

    return pl.BlockSpec((None, GROUP, walk.width), index)


def _forward(walk, column, carry, a, x, first, h, final):
    k = pl.program_id(2)
    block, dtype, down = walk.at(k), first[0].dtype, walk.descending
    _begin(k, carry, first)

    def group(start, tiles, state):
        decays, inputs = _read(a, start, dtype), _read(x, start, dtype)
        if len(inputs) < len(state):
            inputs = (*inputs, jnp.zeros_like(inputs[0]))
        states = {}
        for tile in tiles:
            decay, links = _tile(decays, tile), _links(walk, column, start + tile)
            valid = walk.inside(block * walk.steps + start + tile, TILE)
            decay, value = _full(walk, decay, _tile(inputs, tile), valid)
            decay, value, links = _prefixes(decay, value, links, down)
            carried = _passed(links, pairs.mul(decay, state))
            states[tile] = pairs.add(value, carried)
            state = _last(states[tile], down)
        _write(h, start, states)
        return state

    _end(_groups(walk, group, _values(carry)), carry, final)


def _backward(walk, column, carry, a, h, border, dh, first, dfinal, da, dx, dfirst):
    k = pl.program_id(2)
    block, dtype, down = walk.at(k), first[0].dtype, walk.descending
    varying = da[0].shape[0] > 1
    initial = _values(first)
    first_step = 0 if down else walk.length - 1
    row = jax.lax.broadcasted_iota(jnp.int32, (TILE, walk.width), 0)
    _begin(k, carry, dfinal)

    def group(start, tiles, state):
        """`through` is conj(a) g of the step visited before, what reaches this one
        through its state."""
        through, da_sum = state
        decays, states = _read(a, start, dtype), _read(h, start, dtype)
        gradients = _read(dh, start, dtype)
        outside = _neighbour(walk, h, border, start, dtype)
        da_tiles, dx_tiles = {}, {}
        for tile in tiles:
            step = block * walk.steps + start + tile
            valid = walk.inside(step, TILE)
            gradient = _tile(gradients, tile)
            decay, tile_links = (
                pairs.conj(_tile(decays, tile)),
                _links(walk, column, start + tile),
            )
            decay, gradient = _full(walk, decay, gradient, valid)
            value = _passed(tile_links, pairs.mul(decay, gradient))
            total, value, links = _prefixes(decay, value, tile_links, down)
            carried = _passed(links, pairs.mul(total, through))
            carried = pairs.add(value, carried)
            g = pairs.add(gradient, _shifted(carried, through, down))
            through = _last(carried, down)
            dx_tiles[tile] = g

            neighbour = tile + (-TILE if down else TILE)
            neighbour = _tile(states, neighbour) if neighbour in tiles else outside
            before = _shifted(_tile(states, tile), _last(neighbour, not down), not down)
            before = tuple(
                jnp.where(step + row == first_step, other, part)
                for part, other in zip(before, initial, strict=True)
            )
            product = pairs.mul(pairs.conj(before), g)[: len(da)]
            product = _passed(tile_links, product)
            if varying:
                da_tiles[tile] = product
            else:
                da_sum = pairs.add(da_sum, _where(valid, product, (0, 0)))
        if varying:
            _write(da, start, da_tiles)
        _write(dx, start, dx_tiles)
        return through, da_sum

    da_sum = () if varying else (jnp.zeros((TILE, walk.width), dtype),) * len(da)
    through, da_sum = _groups(walk, group, (_values(carry), da_sum))
    _end(through, carry, dfirst)
    for ref, part in zip(da, da_sum, strict=False):
        part = jnp.sum(part, 0, keepdims=True)
        ref[...] = jnp.where(k == 0, part, ref[...] + part)


def _values(refs):
    return tuple(ref[...] for ref in refs)


def _begin(k, carry, first):
    @pl.when(k == 0)
    def _():
        for ref, part in zip(carry, first, strict=True):
            ref[...] = part[...]


def _end(state, carry, final):
    for part, *refs in zip(state, carry, final, strict=True):
        for ref in refs:
            ref[...] = part


def _groups(walk, group, carry):
    """carry = group(start, tiles, carry) for the groups of a block in the order of the
    walk; `start` is the first step of a group, `tiles` the order of its tiles."""
    count, tiles = walk.steps // GROUP, range(0, GROUP, TILE)
    if walk.descending:
        tiles = tiles[::-1]

    def body(i, carry):
        i = count - 1 - i if walk.descending else i
        return group(pl.multiple_of(i * GROUP, GROUP), tiles, carry)

    return blocks.for_each(count, body, carry)


def _read(refs, start, dtype):
    """A group of rows, or the only row."""
    rows = pl.ds(start, GROUP)
    return tuple(
        (ref[rows, :] if ref.shape[0] > 1 else ref[...]).astype(dtype) for ref in refs
    )


def _write(refs, start, tiles):
    for i, ref in enumerate(refs):
        values = jnp.concatenate([tiles[tile][i] for tile in sorted(tiles)])
        ref[pl.ds(start, GROUP), :] = values.astype(ref.dtype)


def _tile(parts, tile):
    return tuple(
        part[tile : tile + TILE] if part.shape[0] > 1 else part for part in parts
    )


def _links(walk, flags, start):
    """A tile, 0 where a reset cuts the link into a step, else 1; or None."""
    if flags is None:
        return None
    column = flags[pl.ds(pl.multiple_of(start, TILE), TILE), :]
    return jnp.broadcast_to(column, (TILE, walk.width))


def _passed(links, parts):
    """What passes the links: chosen, because 0 times NaN is NaN."""
    if links is None:
        return parts
    return tuple(jnp.where(links > 0, part, 0) for part in parts)


def _full(walk, decay, value, valid):
    """Whole tiles; a step that does not exist passes the carry and adds nothing."""
    decay = tuple(jnp.broadcast_to(part, (TILE, walk.width)) for part in decay)
    return _where(valid, decay, (1, 0)), _where(valid, value, (0, 0))


def _where(condition, parts, other):
    if condition is None:
        return parts
    return tuple(
        jnp.where(condition, part, value)
        for part, value in zip(parts, other, strict=False)
    )


def _prefixes(decay, value, links, down):
    """The recurrence inside a tile, from nothing, and the products of its decays and of
    its links."""
    row = jax.lax.broadcasted_iota(jnp.int32, value[0].shape, 0)
    for shift in (1, 2, 4):
        linked = row < TILE - shift if down else row >= shift
        a, h, before = (
            tuple(blocks.turn(part, -shift if down else shift, 0) for part in parts)
            for parts in (decay, value, () if links is None else (links,))
        )
        h = pairs.mul(decay, _where(linked, h, (0, 0)))
        value = pairs.add(value, _passed(links, h))
        decay = pairs.mul(decay, _where(linked, a, (1, 0)))
        if links is not None:
            links = links * _where(linked, before, (1,))[0]
    return decay, value, links


def _last(parts, down):
    """The row of a tile that is visited last."""
    return tuple(part[:1] if down else part[-1:] for part in parts)


def _shifted(parts, before, down):
    """Each row's predecessor in the order of the walk; `before` precedes the tile."""
    row = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 0)
    first = row == (TILE - 1 if down else 0)
    return tuple(
        jnp.where(first, other, blocks.turn(part, -1 if down else 1, 0))
        for part, other in zip(parts, before, strict=True)
    )


def _neighbour(walk, h, border, start, dtype):
    """The group of states on the side the states of this group come from."""
    start, last = start + (-GROUP if walk.descending else GROUP), walk.steps - GROUP
    inside = (start >= 0) & (start <= last)
    group = _read(h, pl.multiple_of(jnp.clip(start, 0, last), GROUP), dtype)
    return tuple(
        jnp.where(inside, inner, outer[...].astype(dtype))
        for inner, outer in zip(group, border, strict=True)
    )
