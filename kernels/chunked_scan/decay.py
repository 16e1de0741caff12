"""What decays do inside a chunk of T tokens, without a division and without any
exponential of a positive number.

Both kinds offer, for rows and keys [N, T, K] of N groups and states [N, R, K, V] of
their R heads,

    scores  [N, R, T, T]  rows[i] . w[i, j] keys[j], j <= i; w the decay from j to i
    read    [N, R, T, V]  the entering state as each row finds it
    write   [N, R, K, V]  what keys, each with its u [N, R, T, V], leave at the end
    keep    [N, R, K, V]  what the end has of the entering state
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.chunked_scan.delta import stacked

FORGOTTEN = -1e4  # a log decay below is as good as this one: exp of both is 0


class Scalar(NamedTuple):
    """One decay per head: on the scores, and on what is read and written, so that the
    heads of a group share their matmuls."""

    between: jax.Array  # [N, R, T, T], 0 above the diagonal
    enter: jax.Array  # [N, R, T]
    total: jax.Array  # [N, R], the log decay of all tokens

    def scores(self, rows, keys, precision):
        shared = jnp.matmul(rows, keys.mT, precision=precision)
        return shared[:, None] * self.between

    def read(self, rows, state, precision):
        product = jnp.matmul(rows[:, None], state, precision=precision)
        return self.enter[..., None] * product

    def write(self, keys, u):
        u = self.between[..., -1, :, None] * u
        return jnp.matmul(keys.mT[:, None], u, precision="highest")

    def keep(self, state):
        return _passed(self.total[..., None, None], state)


def scalar(g: jax.Array) -> Scalar:
    """From log decays [N, R, T]."""
    g = jnp.maximum(g, FORGOTTEN)
    return Scalar(*_weights(g), g.sum(-1))


def _passed(log_decay, state):
    """exp(log_decay) state.

    A decay near 1 would be rounded in the same direction in every chunk, so what it
    takes away is subtracted.
    """
    near = log_decay > -0.5
    lost = jnp.expm1(jnp.where(near, log_decay, 0))
    decay = jnp.exp(jnp.where(near, -jnp.inf, log_decay))
    return jnp.where(near, state + lost * state, decay * state)


@jax.custom_jvp
def _weights(g):
    """`between` and `enter`.

    Differences of the cumulative sum of g would lose a small decay after a large one.
    So the sum is in two parts: multiples of 1/16, exact in float32, and what is left,
    which stays small.
    """
    size = g.shape[-1]
    coarse = jnp.round(16 * g) / 16
    ones = jnp.triu(jnp.ones((size, size), g.dtype))
    parts = jnp.matmul(jnp.stack([coarse, g - coarse]), ones, precision="highest")
    past = jnp.tril(jnp.ones((size, size), bool), -1)
    # masked before the exponential, which would overflow above the diagonal
    span = sum(part[..., :, None] - part[..., None, :] for part in parts)
    between = jnp.exp(jnp.where(past, span, -jnp.inf)) + jnp.eye(size, dtype=g.dtype)
    return between, jnp.exp(parts.sum(0))


@_weights.defjvp
def _weights_jvp(primals, tangents):
    """The decay from j to i moves with the sum of dg[t], j < t <= i.

    Taken as that sum, so that the gradient of g[t] is one over pairs i >= t > j. Those
    of the cumulative sum would be differences: under a strong decay of numbers that
    are larger than what is left by any factor.
    """
    (g,), (dg,) = primals, tangents
    between, enter = _weights(g)
    until = jnp.triu(jnp.ones((g.shape[-1],) * 2, g.dtype))
    total = jnp.matmul(dg, until, precision="highest")
    return (between, enter), (between * _sums_between(dg), enter * total)


BLOCK = 8  # tokens


def _sums_between(g):
    """[..., i, j], the sum of g[t] over j < t <= i, from [..., T]; above the diagonal
    anything that is finite.

    A matmul for all i and j would cost T^3. So what lies between two blocks is one
    number for all pairs of theirs, beside the ends of both.
    """
    size = min(BLOCK, g.shape[-1])
    g = g.reshape(*g.shape[:-1], -1, size)
    count = g.shape[-2]
    steps, blocks = np.arange(size), np.arange(count)

    def sums(equation, x, mask):
        return jnp.einsum(equation, x, mask.astype(g.dtype), precision="highest")

    until = sums("...bt,ti->...bi", g, steps[:, None] <= steps)
    after = sums("...bt,tj->...bj", g, steps[:, None] > steps)
    e, b, c = np.ix_(blocks, blocks, blocks)
    middle = sums("...e,ebc->...bc", g.sum(-1), (c < e) & (e < b))
    t, i, j = np.ix_(steps, steps, steps)
    near = sums("...bt,tij->...bij", g, (j < t) & (t <= i))
    far = (
        until[..., :, :, None, None]
        + middle[..., :, None, :, None]
        + after[..., None, None, :, :]
    )
    same = (blocks[:, None] == blocks)[:, None, :, None]
    table = jnp.where(same, near[..., :, :, None, :], far)
    return table.reshape(*g.shape[:-2], count * size, count * size)


class Vector(NamedTuple):
    """One decay per head and key channel: on rows and keys, each brought to a point
    between them."""

    weights: list[jax.Array]  # [N * R, T, K] for blocks of 1, 2, 4, ... T / 2 tokens
    enter: jax.Array  # [N * R, T, K]
    leave: jax.Array  # [N * R, T, K]
    total: jax.Array  # [N, R, K], the log decay of all tokens

    def scores(self, rows, keys, precision):
        """Between two neighbouring blocks rows have decayed from where the right one
        begins, and keys up to there; both blocks together are one of twice the size."""
        rows, keys = self._per_head(rows), self._per_head(keys)
        length = rows.shape[1]
        scores = jnp.sum(rows * keys, -1)[..., None]
        for weight in self.weights:
            size = scores.shape[-1]
            left, _ = _halves(keys * weight, size)
            _, right = _halves(rows * weight, size)
            across = jnp.matmul(right, left.mT, precision=precision)
            scores = stacked(*_halves(scores, size), across)
        return scores.reshape(-1, self.total.shape[1], length, length)

    def read(self, rows, state, precision):
        rows = self._split(self._per_head(rows) * self.enter)
        return jnp.matmul(rows, state, precision=precision)

    def write(self, keys, u):
        keys = self._split(self._per_head(keys) * self.leave)
        return jnp.matmul(keys.mT, u, precision="highest")

    def keep(self, state):
        return _passed(self.total[..., None], state)

    def _per_head(self, x):
        x = jnp.broadcast_to(
            x[:, None], (x.shape[0], self.total.shape[1], *x.shape[1:])
        )
        return x.reshape(-1, *x.shape[2:])

    def _split(self, x):
        return x.reshape(-1, self.total.shape[1], *x.shape[1:])


def vector(g: jax.Array) -> Vector:
    """From log decays [N, R, T, K], T a power of two.

    For blocks of doubling size: the decay from a block's beginning through each token
    (`enter`), and after each token to its end (`leave`). They are products in a tree:
    of numbers that may be 0, with as many roundings as there are sizes.
    """
    enter = jnp.exp(g).reshape(-1, *g.shape[2:])
    leave = jnp.ones_like(enter)
    shape, weights = enter.shape, []
    while 2 ** len(weights) < shape[1]:
        size = 2 ** len(weights)
        left, right = _halves(enter, size)
        before, after = _halves(leave, size)
        weights.append(_joined(before, right, shape))
        enter = _joined(left, left[:, -1:] * right, shape)
        leave = _joined(before * right[:, -1:], after, shape)
    return Vector(weights, enter, leave, g.sum(2))


def _halves(x, size):
    """The left and the right of each two blocks [size, K] that follow one another.

    Split, not indexed: the gradients are joined again, where those of slices would be
    padded with zeros and added up, which is slow.
    """
    left, right = jnp.split(x.reshape(-1, 2, size, x.shape[-1]), 2, 1)
    return left[:, 0], right[:, 0]


def _joined(left, right, shape):
    return jnp.concatenate([left, right], 1).reshape(shape)
