"""Causal convolution that stays inside segments, exactly, in O(L log^2 L).

    y[t] = sum_{s <= t, s in the segment of t} k[t-s] v[s]

Pairs (s, t) less than NEAR apart are summed lag by lag. The others are sorted by the
blocks they lie in, on levels of ever longer blocks: on each level T steps make a block
and n blocks a group, and the level has the pairs whose blocks differ and whose groups
do not. A link between two blocks must span the end of the first and the beginning of
the second. So the input counts where it lies in its block's last segment, the output
where it lies in its block's first, and n^2 bits say which two of these are one segment:

    y[j] = where(first, sum_{i < j} same[j, i] Toeplitz(k)[j-i] where(last, v[i]))

Shapes are static and nothing of one segment enters the sums of another. Below BLOCK
steps n = 2 and the Toeplitz matrix is a matrix. Above it it is diagonal in a transform
of 2 T points, and because the bits do not depend on the frequency, the sum over i is
taken there: one transform per block in each direction, whatever n is. Only T points go
in and come out: what lies T steps on is a factor at each frequency.

Everything is [B, H, time]; k is [H, K]. `transform` is `xla.FFT()` or the like.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels import compat, pairs, varying

NEAR = 16  # lags summed one by one
BLOCK = 256  # steps in the smallest blocks that are transformed
GROUP = 16  # the most blocks in a group
# On TPUs blocks of a whole tile, so that the matrices of all halves in it are of one
# size, and powers of two in every group.
LANES, TPU_GROUP = 128, 8

_precise = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def causal(transform, v, k, segment):
    """v [B, H, L], k [H, K], segment [B, L] ascending -> y [B, H, L]."""
    v, k, segment = jax.lax.optimization_barrier((v, k, segment))
    length = v.shape[-1]
    near, far = _taps(k)
    y = _near(v, near, segment)
    matrices, levels, total = _plan(length, k.shape[1])
    y, v, segment = (_padded(x, total) for x in (y, v, segment))
    for part in matrices:
        y = _matrix_part(y, v, far, segment, *part)
    for level in levels:
        y = _level(y, transform, v, far, segment, *level)
    return y[..., :length]


def _forward(transform, v, k, segment):
    return causal(transform, v, k, segment), (v, k, segment)


def _backward(transform, saved, dy):
    """Part by part, from the inputs alone."""
    v, k, segment, dy = jax.lax.optimization_barrier((*saved, dy))
    length = v.shape[-1]
    near, far = _taps(k)
    dv, dnear = _near_backward(v, near, segment, dy)
    matrices, levels, total = _plan(length, k.shape[1])
    dv, dy, v, segment = (_padded(x, total) for x in (dv, dy, v, segment))
    dk = jnp.zeros_like(k)
    for part in matrices:
        dv, dk = _matrix_part_backward(dv, dk, v, far, segment, dy, *part)
    for level in levels:
        dv, dk = _level_backward(dv, dk, transform, v, far, segment, dy, *level)
    return dv[..., :length], dk.at[:, : near.shape[1]].set(dnear), None


causal.defvjp(_forward, _backward)


def _plan(length, taps):
    """(halves, block, first step of it that gets something), (block, blocks in a group,
    blocks that the filter reaches back), length.

    A filter that reaches no more than a group's blocks needs no longer ones.
    """
    if taps <= NEAR or length <= NEAR:
        return [], [], length
    tpu = compat.platform() == "tpu"
    block, most = (LANES, TPU_GROUP) if tpu else (BLOCK, GROUP)
    halves, half = [], NEAR
    while half < min(length, block):
        halves.append(half)
        half *= 2
    matrices = [((h,), 2 * h, h) for h in halves]
    if tpu:
        matrices = [(tuple(halves), half, 0)]
    if length <= half:
        return matrices, [], half
    group = most if tpu else _even_group(-(-length // half))
    levels, block = [], half
    while True:
        count = -(-length // block)
        reach = min(-(-(taps - 1) // block), count - 1)
        if reach < most:
            levels.append((block, count, reach))
            return matrices, levels, count * block
        levels.append((block, group, group - 1))
        block *= group


def _even_group(count):
    """The least that makes as few levels of `count` blocks as GROUP would."""
    stages = 1
    while GROUP**stages < count:
        stages += 1
    group = 2
    while group**stages < count:
        group += 1
    return group


def _taps(k):
    """The first NEAR taps, and the filter without them."""
    return k[:, :NEAR], k.at[:, :NEAR].set(0)


def _padded(x, total):
    """Zeros, or steps of the last segment, up to `total` steps."""
    widths = ((0, 0),) * (x.ndim - 1) + ((0, total - x.shape[-1]),)
    return jnp.pad(x, widths, mode="edge" if x.ndim == 2 else "constant")


# Lag by lag.


def _near(v, k, segment):
    lagged, age = _history(v, segment, k.shape[1])
    y = 0
    for lag in range(k.shape[1]):
        y = y + jnp.where(lag <= age, k[:, lag, None] * lagged(lag), 0)
    return y


def _near_backward(v, k, segment, dy):
    count, length = k.shape[1], v.shape[-1]
    lagged, age = _history(v, segment, count)
    ahead = jnp.pad(dy, ((0, 0), (0, 0), (0, count - 1)))
    later_age = jnp.pad(age, ((0, 0), (0, 0), (0, count - 1)), constant_values=-1)
    ahead, later_age = jax.lax.optimization_barrier((ahead, later_age))
    dv = 0
    for lag in range(count):
        window = slice(lag, lag + length)
        term = k[:, lag, None] * ahead[..., window]
        dv = dv + jnp.where(lag <= later_age[..., window], term, 0)

    def tap(lag):
        return jnp.where(lag <= age, dy * lagged(lag), 0).sum((0, 2))

    return dv, jax.lax.map(tap, jnp.arange(count)).T


def _history(v, segment, count):
    """moved(lag) = v[t-lag], and how far back the segment of t goes, up to count-1."""
    length = v.shape[-1]
    number = jnp.pad(segment, ((0, 0), (count - 1, 0)), constant_values=-1)
    age = -1
    for lag in range(count):
        start = count - 1 - lag
        age = age + (number[:, start : start + length] == segment).astype(jnp.int32)
    # the barrier keeps XLA from computing the padding anew for every lag
    before = jnp.pad(v, ((0, 0), (0, 0), (count - 1, 0)))
    before, age = jax.lax.optimization_barrier((before, age[:, None]))

    def moved(lag):
        return jax.lax.dynamic_slice_in_dim(before, count - 1 - lag, length, -1)

    return moved, age


# Halves of blocks by a matrix.


def _matrix_part(y, v, k, segment, halves, block, start):
    """y with what each left half gives to its right half, for all `halves`."""
    x, matrix, masks = _halves(v, k, segment, halves, block, start)

    def more(masks):
        first, last, used = masks
        part = jnp.where(last, x[..., : block - start], 0)
        return jnp.where(first, _product(matrix, used, part, halves), 0)

    return _added(y, _sum_over(more, masks), start)


def _matrix_part_backward(dv, dk, v, k, segment, dy, halves, block, start):
    x, matrix, masks = _halves(v, k, segment, halves, block, start)
    dy = dy.reshape(x.shape)
    turned = matrix.swapaxes(1, 2)

    def more(masks):
        first, last, used = masks
        part = jnp.where(last, x[..., : block - start], 0)
        dy_part = jnp.where(first, dy[..., start:], 0)
        dx = _product(turned, used.T, dy_part, halves)
        d_matrix = _precise("bhnt,bhns->hts", dy_part, part)
        return jnp.where(last, dx, 0), jnp.where(used, d_matrix, 0)

    dx, d_matrix = _sum_over(more, masks)
    window = partial(_window, block=block, start=start)
    _, diagonals = jax.vjp(lambda k: _toeplitz(window(k), block - start), k)
    return _added(dv, dx, 0), dk + diagonals(d_matrix)[0]


def _product(matrix, used, x, halves):
    """[B, H, n, t] of [H, t, s] where `used` and [B, H, n, s]."""
    if len(halves) == 1:  # all of the matrix is used
        return _precise("hts,bhns->bhnt", matrix, x)
    # a zero in the matrix does not keep from one pair what is not finite in another
    bad = ~jnp.isfinite(x)
    y = _precise("hts,bhns->bhnt", jnp.where(used, matrix, 0), jnp.where(bad, 0, x))
    reached = jnp.einsum(
        "bhns,ts->bhnt", bad.astype(jnp.bfloat16), used.astype(jnp.bfloat16)
    )
    return jnp.where(reached > 0, jnp.nan, y)


def _sum_over(term, masks):
    """The sum of term(masks[i]), of which a compiler sees one."""
    first, rest = (
        jax.tree.map(lambda x, part=part: x[part], masks)
        for part in (0, slice(1, None))
    )
    total = term(first)
    if not len(rest[0]):
        return total

    def more(total, masks):
        return jax.tree.map(jnp.add, total, term(masks)), None

    zero = jax.tree.map(lambda x: varying.like(jnp.zeros_like(x), x), total)
    return jax.lax.scan(more, zero, masks)[0]


def _halves(v, k, segment, halves, block, start):
    """v as blocks [B, H, n, block]; k[t - s] for t from `start` on, s below block -
    start; of each of the halves where the right ones count, [B, 1, n, t], where the
    left ones do, [B, 1, n, s], and which t and s belong together, [t, s]."""
    number = segment.reshape(segment.shape[0], 1, -1, block)
    steps, count = np.arange(block), block - start
    first, last, used = [], [], []
    for half in halves:
        pair = segment.reshape(segment.shape[0], -1, 2 * half)
        middle = jnp.broadcast_to(pair[..., half : half + 1], pair.shape)
        right = steps // half % 2 == 1
        same = number == middle.reshape(number.shape)
        first.append((same & right)[..., start:])
        last.append((same & ~right)[..., :count])
        pair = steps // (2 * half)
        linked = pair[:, None] == pair
        used.append((linked & right[:, None] & ~right)[start:, :count])
    matrix = _toeplitz(_window(k, block, start), count)
    masks = jnp.stack(first), jnp.stack(last), jnp.asarray(np.stack(used))
    return v.reshape(*v.shape[:2], -1, block), matrix, masks


def _window(k, block, start):
    """[H, 2 (block - start)], of which _toeplitz makes k[t - s]."""
    before = block - 2 * start
    return jnp.pad(k[:, :block], ((0, 0), (before, max(0, block - k.shape[1]))))


def _toeplitz(window, count):
    """[H, count, count] of window[count + t - s]: reshapes, no gather, no scatter."""
    width = 2 * count
    rows = jnp.broadcast_to(window[:, None, 1:], (window.shape[0], count, width - 1))
    flat = jnp.pad(rows.reshape(rows.shape[0], -1), ((0, 0), (0, count)))
    return flat.reshape(-1, count, width)[..., :count][..., ::-1]


# Groups of blocks by transforms.


def _level(y, transform, v, k, segment, block, group, reach):
    """y with what all blocks of a group but the last give to all but the first."""
    first, last, same = _links(segment, block, group)
    plan = transform.plan(2 * block)
    x = jnp.where(last, _some(_blocks(v, block, group), 0, group - 1), 0)
    X, K = transform.forward(plan, x, _taps_of_blocks(k, block, reach))
    Y = _sum_over_distance(X, _spectra(K, transform, plan, block), same, reach, True)
    (contribution,) = transform.inverse(plan, block, Y)
    return _added_blocks(y, jnp.where(first, contribution, 0), 1)


def _level_backward(dv, dk, transform, v, k, segment, dy, block, group, reach):
    first, last, same = _links(segment, block, group)
    plan = transform.plan(2 * block)
    x = jnp.where(last, _some(_blocks(v, block, group), 0, group - 1), 0)
    dy = jnp.where(first, _some(_blocks(dy, block, group), 1, group), 0)
    X, D, K = transform.forward(plan, x, dy, _taps_of_blocks(k, block, reach))
    K, from_spectra = jax.vjp(lambda K: _spectra(K, transform, plan, block), K)
    dX = _sum_over_distance(D, pairs.conj(K), same, reach, False)
    (dK,) = from_spectra(_sum_over_blocks(pairs.conj(X), D, same, reach))
    gradient, taps = transform.inverse(plan, block, dX, dK)
    taps = jnp.moveaxis(taps, _axes(), (1, 0)).reshape(dk.shape[0], -1)
    taps = jnp.pad(taps, ((0, 0), (0, max(0, dk.shape[1] - taps.shape[1]))))
    dk = dk + taps[:, : dk.shape[1]]
    return _added_blocks(dv, jnp.where(last, gradient, 0), 0), dk


def _axes():
    """Of a group's blocks, and of channels, among [B, H, groups, n, T]; on TPUs [n,
    groups, B, H, T]: there a shift by blocks moves nothing within a tile of memory. On
    CPUs the sums for the filter's gradient run through memory twice as slowly then."""
    return (0, 3) if compat.platform() == "tpu" else (3, 1)


def _some(x, start, stop):
    """Blocks start, ..., stop - 1 of each group."""
    return jax.lax.slice_in_dim(x, start, stop, axis=_axes()[0])


def _filled(x, before, after):
    """x with so many blocks of zeros before and after each group's."""
    gaps = [(0, 0)] * x.ndim
    gaps[_axes()[0]] = before, after
    return jnp.pad(x, gaps)


def _blocks(x, block, group):
    """[B, H, L] as blocks."""
    x = x.reshape(*x.shape[:2], -1, group, block)
    return jnp.moveaxis(x, (3, 2), (0, 1)) if _axes()[0] == 0 else x


def _links(segment, block, group):
    """Of blocks of one channel where outputs, of all but the first, and inputs, of all
    but the last, count; and whether block j, a later one, begins in the segment that
    ends block j-d: same(d), n - d blocks of one step."""
    number = _blocks(segment[:, None], block, group)
    after, before = _some(number, 1, group), _some(number, 0, group - 1)
    begin, end = after[..., :1], before[..., -1:]

    def same(d):
        return _some(begin, d - 1, group - 1) == _some(end, 0, group - d)

    return after == begin, before == end, same


def _taps_of_blocks(k, block, reach):
    """Blocks of taps, reach + 1 of them in a group."""
    total = (reach + 1) * block
    k = jnp.pad(k[:, :total], ((0, 0), (0, max(0, total - k.shape[1]))))
    return _blocks(k[None], block, reach + 1)


def _spectra(K, transform, plan, block):
    """What leads from the start of a block to that of the one d = 1, ..., reach later:
    spectra of the taps [(d-1) T, (d+1) T), the first half of which lie before it."""
    turn = transform.shift(plan, -block, K[0].dtype)
    count = K[0].shape[_axes()[0]]
    before = pairs.mul(tuple(_some(part, 0, count - 1) for part in K), turn)
    return pairs.add(tuple(_some(part, 1, count) for part in K), before)


def _sum_over_distance(X, K, same, reach, back):
    """sum_d K[d] X[j-d] over linked blocks, or X[j+d] where not `back`."""
    count = X[0].shape[_axes()[0]]
    gap = (reach - 1, 0) if back else (0, reach - 1)
    # padded once: padding inside the sum is computed anew for every term
    X = jax.lax.optimization_barrier(tuple(_filled(part, *gap) for part in X))
    total = None
    for d in range(1, reach + 1):
        start = reach - d if back else d - 1
        moved = tuple(_some(part, start, start + count) for part in X)
        term = pairs.mul(tuple(_some(part, d - 1, d) for part in K), moved)
        gap = (d - 1, 0) if back else (0, d - 1)
        links = _filled(same(d), *gap)
        term = tuple(_linked(links, part) for part in term)
        total = term if total is None else pairs.add(total, term)
    return total


def _sum_over_blocks(X, D, same, reach):
    """Blocks d = 1, ..., reach: the sum of X[j-d] D[j] over linked blocks."""
    blocks, channels = _axes()
    count = X[0].shape[blocks]
    others = tuple(axis for axis in range(4) if axis != channels)
    sums = []
    for d in range(1, reach + 1):
        before = tuple(_some(part, 0, count + 1 - d) for part in X)
        products = pairs.mul(before, tuple(_some(part, d - 1, count) for part in D))
        sums.append(
            [_linked(same(d), part).sum(others, keepdims=True) for part in products]
        )
    return tuple(jnp.concatenate(parts, blocks) for parts in zip(*sums, strict=True))


def _linked(same, spectrum):
    """Zero where not `same`; the points of a spectrum may have two axes."""
    axes = tuple(range(same.ndim, spectrum.ndim))
    return jnp.where(jnp.expand_dims(same, axes), spectrum, 0)


# In passes of their own: XLA would compute y anew for every part of the sum.


def _added(y, contribution, start):
    """y [B, H, L] with `contribution` [B, H, n, count] added from step `start` of each
    of n blocks, and nothing to as many other steps as that leaves."""
    blocks = y.reshape(*y.shape[:2], contribution.shape[2], -1)
    stop = start + contribution.shape[-1]
    parts = [blocks[..., :start], blocks[..., start:stop] + contribution]
    blocks = jnp.concatenate([*parts, blocks[..., stop:]], -1)
    return jax.lax.optimization_barrier(blocks.reshape(y.shape))


def _added_blocks(y, contribution, start):
    """y [B, H, L] with blocks added to those of each group from `start` on, of which
    there is one more."""
    axis = _axes()[0]
    count = contribution.shape[axis]
    blocks = _blocks(y, contribution.shape[-1], count + 1)
    parts = [_some(blocks, start, start + count) + contribution]
    other = _some(blocks, 0, 1) if start else _some(blocks, count, count + 1)
    parts.insert(0 if start else 1, other)
    blocks = jnp.concatenate(parts, axis)
    if axis == 0:
        blocks = jnp.moveaxis(blocks, (0, 1), (3, 2))
    return jax.lax.optimization_barrier(blocks.reshape(y.shape))
