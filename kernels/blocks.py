"""How [B, L, D] is cut for a TPU, whose arrays lie in tiles of 8 steps x 128 channels.

The last block of an axis may hang over its end: what is read there is arbitrary, what
is written there is lost. So nothing is padded in memory, and a kernel that carries or
sums over an axis leaves out what does not exist.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import compat

TILE = 8  # rows of a float32 register
GROUP = 16  # rows that lie together in bfloat16
LANES = 512  # channels of a block at most, a multiple of 128
ELEMENTS = 64 * 1024  # of one array in a block: 256 kB in float32


def unsupported(*arrays) -> str | None:
    wide = {"float64", "complex128"} & {jnp.dtype(x.dtype).name for x in arrays}
    if wide and compat.platform() == "tpu":
        return "a TPU has no float64"
    return None


def lanes(channels: int, limit: int) -> int:
    """The width of a block of channels: all of them, or a multiple of 128."""
    if channels <= limit:
        return channels
    widths = range(limit, 0, -128)
    return next((width for width in widths if channels % width == 0), limit)


def steps(length: int, width: int) -> int:
    """The length of a block of time, a multiple of GROUP."""
    longest = ELEMENTS // (-(-width // 128) * 128) // GROUP * GROUP
    return min(max(longest, GROUP), -(-length // GROUP) * GROUP)


class Walk(NamedTuple):
    """The blocks of [B, L, D] in the order in which a kernel visits them: time is the
    last axis of the grid, visited in order or, `descending`, from its end."""

    batch: int
    length: int
    channels: int
    steps: int  # of a block
    width: int  # of a block
    descending: bool

    @classmethod
    def over(cls, x, descending: bool) -> "Walk":
        width = lanes(x.shape[2], LANES)
        return cls(*x.shape, steps(x.shape[1], width), width, descending)

    @property
    def grid(self) -> tuple[int, int, int]:
        widths, count = pl.cdiv(self.channels, self.width), self.count
        return self.batch, widths, count

    @property
    def count(self) -> int:
        """How many blocks there are in time."""
        return pl.cdiv(self.length, self.steps)

    def at(self, k):
        """The block of time that is visited k-th."""
        return self.count - 1 - k if self.descending else k

    def call(self, kernel: Callable, **options):
        return compat.pallas_tpu_call(
            kernel,
            grid=self.grid,
            semantics=("parallel", "parallel", "arbitrary"),
            **options,
        )

    def sequence(self) -> pl.BlockSpec:
        """Of [B, L, D]."""
        return pl.BlockSpec(
            (None, self.steps, self.width), lambda b, j, k: (b, self.at(k), j)
        )

    def still(self, rows: int) -> pl.BlockSpec:
        """Of [B, rows, D]; an output stays in VMEM until its last block of time."""
        return pl.BlockSpec((None, rows, self.width), lambda b, j, k: (b, 0, j))

    def shared(self, rows: int) -> pl.BlockSpec:
        """Of [rows, D]."""
        return pl.BlockSpec((rows, self.width), lambda b, j, k: (0, j))

    def row(self, size: int) -> pl.BlockSpec:
        """Of what `rows` makes: one value per step."""
        return pl.BlockSpec(
            (None, None, 1, size), lambda b, j, k: (b, self.at(k), 0, 0)
        )

    def inside(self, first, rows: int):
        """[rows, width], which of the rows from step `first` on exist; None: all."""
        if self.length % self.steps == 0:
            return None
        step = jax.lax.broadcasted_iota(jnp.int32, (rows, self.width), 0)
        return first + step < self.length


def rows(x: jax.Array, size: int, fill: float = 0) -> jax.Array:
    """[B, L] -> [B, blocks, 1, size], padded: one value per step, along the lanes.

    [B, L, 1] would take 128 times its size in memory; `column` turns a row in VMEM.
    """
    batch, length = x.shape
    count = pl.cdiv(length, size)
    x = jnp.pad(x, ((0, 0), (0, count * size - length)), constant_values=fill)
    return x.reshape(batch, count, 1, size)


# Inside a kernel.


def column(row: jax.Array) -> jax.Array:
    """[1, T] -> [T, 1]."""
    return jnp.broadcast_to(row, (TILE, row.shape[1])).T[:, :1]


def turn(x: jax.Array, shift: int, axis: int) -> jax.Array:
    """jnp.roll."""
    # a Python int would be 64 bits wide under jax.enable_x64, which a TPU has not
    return pltpu.roll(x, jnp.int32(shift % x.shape[axis]), axis)


def for_each(count: int, body: Callable, carry):
    """carry = body(i, carry) for i < count."""
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), body, carry)
