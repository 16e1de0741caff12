"""Rotary positions: what a query sees of a key depends on their distance alone
(https://arxiv.org/abs/2104.09864)."""

import jax.numpy as jnp
import numpy as np


def frequencies(size, base=10_000.0):
    """base^(-2i / size), i < size / 2: radians per token of every rotated pair."""
    if size % 2:
        raise ValueError(f"size: must be even to rotate pairs, got {size}")
    if base <= 0:
        raise ValueError(f"base: must be positive, got {base}")
    return base ** (-np.arange(0, size, 2) / size)


def rotate(x, positions, base=10_000.0, size=None):
    """Turns the pairs (i, i + size/2) of x [B, L, heads, K] by position x frequency.

    Args:
        x: queries or keys.
        positions: [B, L] or [L], real; only differences matter.
        base: of the frequencies.
        size: how many of the K channels turn, the first ones; all if None.

    Angles and products are float32 or better; the result has x's dtype.
    """
    size = x.shape[-1] if size is None else size
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    theta = jnp.asarray(frequencies(size, base), dtype)
    angle = jnp.asarray(positions, dtype)[..., None, None] * theta
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b, rest = jnp.split(x, [size // 2, size], axis=-1)
    turned = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate([*(t.astype(x.dtype) for t in turned), rest], axis=-1)
