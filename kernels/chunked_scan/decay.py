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

from kernels.chunked_scan.delta import stacked

FORGOTTEN = -1e4  # a log decay below is as good as this one: exp of both is 0


class Scalar(NamedTuple):
    """One decay per head: on the scores, and on what is read and written, so that the
    heads of a group share their matmuls."""

    between: jax.Array  # [N, R, T, T], 0 above the diagonal
    enter: jax.Array  # [N, R, T]

    def scores(self, rows, keys, precision):
        shared = (jnp.matmul(each, keys.mT, precision=precision) for each in rows)
        return [each[:, None] * self.between for each in shared]

    def read(self, rows, state, precision):
        found = jnp.matmul(rows[:, None], state, precision=precision)
        return self.enter[..., None] * found

    def write(self, keys, u):
        u = self.between[..., -1, :, None] * u
        return jnp.matmul(keys.mT[:, None], u, precision="highest")

    def keep(self, state):
        return self.enter[..., -1, None, None] * state


def scalar(g: jax.Array) -> Scalar:
    """From log decays [N, R, T].

    Differences of their cumulative sum would lose a small decay after a large one. So
    the sum is in two parts: multiples of 1/16, exact in float32, and what is left,
    which stays small.
    """
    g = jnp.maximum(g, FORGOTTEN)
    size = g.shape[-1]
    coarse = jnp.round(16 * g) / 16
    ones = jnp.triu(jnp.ones((size, size), g.dtype))
    parts = jnp.matmul(jnp.stack([coarse, g - coarse]), ones, precision="highest")
    past = jnp.tril(jnp.ones((size, size), bool), -1)
    # masked before the exponential, which overflows above the diagonal; the diagonal
    # is constant, or its two gradients would cancel with an error
    span = sum(part[..., :, None] - part[..., None, :] for part in parts)
    between = jnp.where(past, jnp.exp(jnp.where(past, span, 0)), 0)
    return Scalar(between + jnp.eye(size, dtype=g.dtype), jnp.exp(parts.sum(0)))


class Vector(NamedTuple):
    """One decay per head and key channel: on rows and keys, each brought to a point
    between them."""

    levels: list[tuple[jax.Array, jax.Array]]  # both [N * R, T, K], see `vector`
    heads: int

    def scores(self, rows, keys, precision):
        """Of blocks of 1, 2, 4, ... tokens: between two of them rows have decayed from
        where the right one begins, and keys up to there. All kinds of rows at once:
        their gradients, taken one by one, would be three times as slow."""
        rows = jnp.stack([self._per_head(each) for each in rows])
        keys = self._per_head(keys)
        kinds, _, length, _ = rows.shape
        scores = jnp.sum(rows * keys, -1).reshape(kinds, -1, 1, 1)
        for level, (enter, leave) in enumerate(self.levels[:-1]):
            size = 2**level
            _, right = _halves(rows * enter, size)
            left, _ = _halves(keys * leave, size)
            across = jnp.matmul(right, left.mT, precision=precision)
            scores = stacked(scores[:, 0::2], across, scores[:, 1::2])
        return scores.reshape(kinds, -1, self.heads, length, length)

    def read(self, rows, state, precision):
        rows = self._split(self._per_head(rows) * self.levels[-1][0])
        return jnp.matmul(rows, state, precision=precision)

    def write(self, keys, u):
        keys = self._split(self._per_head(keys) * self.levels[-1][1])
        return jnp.matmul(keys.mT, u, precision="highest")

    def keep(self, state):
        return self._split(self.levels[-1][0])[..., -1, :, None] * state

    def _per_head(self, x):
        groups, *rest = x.shape
        return jnp.broadcast_to(x[:, None], (groups, self.heads, *rest)).reshape(
            -1, *rest
        )

    def _split(self, x):
        return x.reshape(-1, self.heads, *x.shape[1:])


def vector(g: jax.Array) -> Vector:
    """From log decays [N, R, T, K], T a power of two.

    Level m has for blocks of 2^m tokens the decay from a block's beginning through each
    token, and after each token to the block's end. They are products in a tree: of
    numbers that may be 0, with m roundings.
    """
    enter = jnp.exp(g).reshape(-1, *g.shape[2:])
    leave = jnp.ones_like(enter)
    levels = [(enter, leave)]
    while 2 ** (len(levels) - 1) < enter.shape[1]:
        size = 2 ** (len(levels) - 1)
        first, second = _halves(enter, size)
        before, after = _halves(leave, size)
        enter = _joined(first, first[:, -1:] * second, enter.shape)
        leave = _joined(before * second[:, -1:], after, enter.shape)
        levels.append((enter, leave))
    return Vector(levels, g.shape[1])


def _halves(x, size):
    """The left and the right of each two blocks [size, K] of x [..., N, T, K]."""
    x = x.reshape(*x.shape[:-3], -1, 2, size, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def _joined(left, right, shape):
    return jnp.concatenate([left, right], 1).reshape(shape)
