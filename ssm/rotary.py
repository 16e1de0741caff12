"""Rotary positions: what a query sees of a key depends on their distance alone
(https://arxiv.org/abs/2104.09864)."""

import functools
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DIGIT = 256  # positions in one table
FURTHEST = 2**31  # no position is further from 0
PI = Fraction("3.14159265358979323846264338327950288419716939937510582097494459230781")


class Time(NamedTuple):
    """whole + part: a position that stays exact where one float32 would round it."""

    whole: jax.Array  # int32
    part: jax.Array  # real, small


def summed(steps: jax.Array) -> Time:
    """The `Time` of every token, the sum of the steps [B, L] up to its own.

    Differentiable in the steps. The error does not grow with the sum.
    """

    def add(before, step):
        part = before.part + step.part
        carried = jnp.floor(part)
        whole = before.whole + step.whole + carried.astype(jnp.int32)
        return Time(whole, part - carried)

    return jax.lax.associative_scan(add, _split(steps), axis=1)


def _split(positions):
    whole = jnp.floor(positions)
    return Time(whole.astype(jnp.int32), positions - whole)


def frequencies(size: int, base: float = 10_000.0) -> np.ndarray:
    """base^(-2i / size), i < size / 2: radians per token of every rotated pair."""
    if size % 2:
        raise ValueError(f"size: must be even to rotate pairs, got {size}")
    if base <= 0:
        raise ValueError(f"base: must be positive, got {base}")
    return base ** (-np.arange(0, size, 2) / size)


@functools.lru_cache
def _tables(size, base, places):
    """d DIGIT^i times every frequency, modulo 2 pi, for the digits d at the places i:
    [places, DIGIT, size / 2] float64, right to its last digits whatever the place."""
    turn = 2 * PI
    units = [
        [float((DIGIT**i * Fraction(theta) + PI) % turn - PI) for theta in row]
        for i, row in enumerate([frequencies(size, base)] * places)
    ]
    angle = np.arange(DIGIT)[:, None] * np.array(units).reshape(places, 1, size // 2)
    return angle - 2 * np.pi * np.rint(angle / (2 * np.pi))


def angles(
    positions: jax.Array | Time,
    size: int,
    base: float = 10_000.0,
    dtype: jnp.dtype = jnp.float32,
    below: int = FURTHEST,
) -> jax.Array:
    """position x frequency modulo 2 pi, [..., size / 2]: as exact for a position of
    2^31 as for one of 1, where a product in float32 would be off by 100 radians.

    A position is the sum of its digits to the base DIGIT times their place values, and
    its angle that of one entry of a small table for each.

    Args:
        positions: [...] integers, or real, or a `Time`.
        size, base: of the `frequencies`.
        dtype: of the result.
        below: a bound of |positions|, where one is known, which saves tables.
    """
    if not isinstance(positions, Time):
        positions = jnp.asarray(positions)
        if jnp.issubdtype(positions.dtype, jnp.integer):
            positions = Time(positions, None)
        else:
            positions = _split(positions)
    places = max(1, -(-(int(below) - 1).bit_length() // (DIGIT - 1).bit_length()))
    tables = jnp.asarray(_tables(size, base, places), dtype)
    left, angle = jnp.abs(positions.whole), 0
    for table in tables:
        angle = angle + jnp.take(table, left % DIGIT, axis=0, mode="clip")
        left = left // DIGIT
    angle = jnp.where(positions.whole[..., None] < 0, -angle, angle)
    if positions.part is None:
        return angle
    theta = jnp.asarray(frequencies(size, base), dtype)
    return angle + positions.part[..., None].astype(dtype) * theta


def rotate(
    x: jax.Array,
    positions: jax.Array | Time,
    base: float = 10_000.0,
    size: int | None = None,
    below: int = FURTHEST,
) -> jax.Array:
    """Turns the pairs (i, i + size/2) of x [B, L, heads, K] by position x frequency.

    Args:
        x: queries or keys.
        positions: [B, L] or [L], see `angles`; only differences matter.
        base: of the frequencies.
        size: how many of the K channels turn, the first ones; all if None.
        below: see `angles`.

    Angles and products are float32 or better; the result has x's dtype.
    """
    size = x.shape[-1] if size is None else size
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    angle = angles(positions, size, base, dtype, below)[..., None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b, rest = jnp.split(x, [size // 2, size], axis=-1)
    turned = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate([*(t.astype(x.dtype) for t in turned), rest], axis=-1)
