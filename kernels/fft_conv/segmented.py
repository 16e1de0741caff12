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
taken there: one transform per block in each direction, whatever n is.

Everything is [B, H, time]; k is [H, K]. `transform` is `xla.FFT()` or the like.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels import pairs

NEAR = 16  # lags summed one by one
BLOCK = 256  # steps in the smallest blocks that are transformed
GROUP = 16  # the most blocks in a group

_precise = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def causal(transform, v, k, segment):
    """v [B, H, L], k [H, K], segment [B, L] ascending -> y [B, H, L]."""
    v, k, segment = jax.lax.optimization_barrier((v, k, segment))
    length = v.shape[-1]
    near, far = _taps(k)
    y = _near(v, near, segment)
    halves, levels, total = _plan(length, k.shape[1])
    y, v, segment = (_padded(x, total) for x in (y, v, segment))
    for half in halves:
        y = _half(y, v, far, segment, half)
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
    halves, levels, total = _plan(length, k.shape[1])
    dv, dy, v, segment = (_padded(x, total) for x in (dv, dy, v, segment))
    dk = jnp.zeros_like(k)
    for half in halves:
        dv, dk = _half_backward(dv, dk, v, far, segment, dy, half)
    for level in levels:
        dv, dk = _level_backward(dv, dk, transform, v, far, segment, dy, *level)
    return dv[..., :length], dk.at[:, : near.shape[1]].set(dnear), None


causal.defvjp(_forward, _backward)


def _plan(length, taps):
    """Halves, (block, blocks in a group, blocks that the filter reaches back), length.

    A filter that reaches no more than GROUP - 1 blocks needs no longer blocks.
    """
    if taps <= NEAR or length <= NEAR:
        return [], [], length
    halves, half = [], NEAR
    while half < min(length, BLOCK):
        halves.append(half)
        half *= 2
    if length <= BLOCK:
        return halves, [], half
    count = -(-length // BLOCK)
    stages = 1
    while GROUP**stages < count:
        stages += 1
    group = 2
    while group**stages < count:
        group += 1
    levels, block = [], BLOCK
    while True:
        count = -(-length // block)
        reach = min(-(-(taps - 1) // block), count - 1)
        if reach < GROUP:
            levels.append((block, count, reach))
            return halves, levels, count * block
        levels.append((block, group, group - 1))
        block *= group


def _taps(k):
    """The first NEAR taps, and the filter without them."""
    return k[:, :NEAR], k.at[:, :NEAR].set(0)


def _padded(x, total):
    """Zeros, or steps of the last segment, up to `total` steps."""
    widths = ((0, 0),) * (x.ndim - 1) + ((0, total - x.shape[-1]),)
    return jnp.pad(x, widths, mode="edge" if x.ndim == 2 else "constant")


def _add(dk, window, start):
    """dk with `window` added from tap `start` on, as far as there are taps."""
    stop = min(dk.shape[1], start + window.shape[1])
    return dk.at[:, start:stop].add(window[:, : max(0, stop - start)])


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


# Two blocks by a matrix.


def _half(y, v, k, segment, half):
    """y with what each left half gives to its right half."""
    first, last, x = _halves(v, segment, half)
    matrix = _toeplitz(_window(k, half), half)
    contribution = _precise(
        "hts,bhns->bhnt", matrix, jnp.where(last, x[..., :1, :], 0)[..., 0, :]
    )
    return _added(y, jnp.where(first, contribution[..., None, :], 0), 1)


def _half_backward(dv, dk, v, k, segment, dy, half):
    first, last, x = _halves(v, segment, half)
    inputs = jnp.where(last, x[..., :1, :], 0)[..., 0, :]
    dy = jnp.where(first, dy.reshape(x.shape)[..., 1:, :], 0)[..., 0, :]
    matrix, diagonals = jax.vjp(partial(_toeplitz, half=half), _window(k, half))
    gradient = _precise("hts,bhnt->bhns", matrix, dy)[..., None, :]
    (window,) = diagonals(_precise("bhnt,bhns->hts", dy, inputs))
    return _added(dv, jnp.where(last, gradient, 0), 0), _add(dk, window, 0)


def _halves(v, segment, half):
    """Where right and left halves count, [B, 1, n, 1, half]; v [B, H, n, 2, half]."""
    number = segment.reshape(segment.shape[0], 1, -1, 2, half)
    middle = number[..., 1:, :1]
    first, last = number[..., 1:, :] == middle, number[..., :1, :] == middle
    return first, last, v.reshape(*v.shape[:2], -1, 2, half)


def _window(k, half):
    return jnp.pad(k[:, : 2 * half], ((0, 0), (0, max(0, 2 * half - k.shape[1]))))


def _toeplitz(window, half):
    """[H, half, half] of window[half + t - s], by reshapes: no gather, no scatter."""
    rows = jnp.broadcast_to(window[:, None, 1:], (window.shape[0], half, 2 * half - 1))
    flat = jnp.pad(rows.reshape(rows.shape[0], -1), ((0, 0), (0, half)))
    return flat.reshape(-1, half, 2 * half)[..., :half][..., ::-1]


def _added(y, contribution, start):
    """y [B, H, L] with `contribution` [B, H, groups, m, T] added to m blocks of each
    group, of which one, the first or the last, gets nothing.

    In a pass of its own: XLA would compute y anew for every part of the sum.
    """
    groups, block = contribution.shape[2], contribution.shape[-1]
    blocks = y.reshape(*y.shape[:2], groups, -1, block)
    stop = start + contribution.shape[3]
    parts = [blocks[..., :start, :], blocks[..., start:stop, :] + contribution]
    blocks = jnp.concatenate([*parts, blocks[..., stop:, :]], -2)
    return jax.lax.optimization_barrier(blocks.reshape(y.shape))


# Groups of blocks by transforms.


def _level(y, transform, v, k, segment, block, group, reach):
    """y with what all blocks of a group but the last give to all but the first."""
    first, last, same = _links(segment, block, group)
    plan = transform.plan(2 * block)
    X = _given(transform, plan, v, last, group, block)
    K = transform.forward(_windows(k, block, reach), plan)
    Y = _sum_over_distance(X, K, same, group, reach, back=True)
    contribution = jnp.where(
        first, transform.inverse(Y, plan)[..., block : 2 * block], 0
    )
    return _added(y, contribution, 1)


def _level_backward(dv, dk, transform, v, k, segment, dy, block, group, reach):
    first, last, same = _links(segment, block, group)
    plan = transform.plan(2 * block)
    X = pairs.conj(_given(transform, plan, v, last, group, block))
    dy = dy.reshape(*dy.shape[:2], -1, group, block)[..., 1:, :]
    dy = jnp.pad(jnp.where(first, dy, 0), ((0, 0),) * 4 + ((block, 0),))
    D = transform.forward(dy, plan)
    K = pairs.conj(transform.forward(_windows(k, block, reach), plan))
    dX = _sum_over_distance(D, K, same, group, reach, back=False)
    gradient = jnp.where(last, transform.inverse(dX, plan)[..., :block], 0)
    dK = _sum_over_blocks(X, D, same, group, reach)
    windows = transform.inverse(dK, plan)[..., : 2 * block]
    for d in range(reach):
        dk = _add(dk, windows[:, d], d * block)
    return _added(dv, gradient, 0), dk


def _links(segment, block, group):
    """Where outputs and inputs count, [B, 1, groups, n - 1, T], and whether block j, a
    later one, begins in the segment that ends block j-d: same(d) [B, 1, groups, n - d,
    1]."""
    number = segment.reshape(segment.shape[0], 1, -1, group, block)
    begin, end = number[..., 1:, :1], number[..., :-1, -1:]

    def same(d):
        return begin[..., d - 1 :, :] == end[..., : group - d, :]

    return number[..., 1:, :] == begin, number[..., :-1, :] == end, same


def _given(transform, plan, v, last, group, block):
    x = v.reshape(*v.shape[:2], -1, group, block)[..., :-1, :]
    return transform.forward(jnp.where(last, x, 0), plan)


def _windows(k, block, reach):
    """[H, reach, 2 block]: the taps that lead d = 1, ..., reach blocks on."""
    total = (reach + 1) * block
    k = jnp.pad(k[:, :total], ((0, 0), (0, max(0, total - k.shape[1]))))
    k = k.reshape(k.shape[0], reach + 1, block)
    return jnp.concatenate([k[:, :-1], k[:, 1:]], -1)


def _sum_over_distance(X, K, same, group, reach, back):
    """sum_d K[d] X[j-d] over linked blocks, or X[j+d] where not `back`."""
    gap = ((0, 0),) * 3 + ((reach - 1, 0) if back else (0, reach - 1), (0, 0))
    # padded once: padding inside the sum is computed anew for every term
    X = jax.lax.optimization_barrier(tuple(jnp.pad(p, gap) for p in X))
    total = None
    for d in range(1, reach + 1):
        start = reach - d if back else d - 1
        shifted = tuple(p[..., start : start + group - 1, :] for p in X)
        term = pairs.mul(tuple(p[:, None, d - 1 : d] for p in K), shifted)
        gap = ((0, 0),) * 3 + ((d - 1, 0) if back else (0, d - 1), (0, 0))
        links = jnp.pad(same(d), gap)
        term = tuple(jnp.where(links, p, 0) for p in term)
        total = term if total is None else pairs.add(total, term)
    return total


def _sum_over_blocks(X, D, same, group, reach):
    """[H, reach, points]: at d - 1 the sum of X[j-d] D[j] over linked blocks."""
    sums = []
    for d in range(1, reach + 1):
        before = tuple(p[..., : group - d, :] for p in X)
        products = pairs.mul(before, tuple(p[..., d - 1 :, :] for p in D))
        sums.append([jnp.where(same(d), p, 0).sum((0, 2, 3)) for p in products])
    return tuple(jnp.stack(parts, 1) for parts in zip(*sums, strict=True))
