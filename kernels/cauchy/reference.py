"""The definition, one reciprocal per node, frequency and numerator."""

import jax.numpy as jnp
import numpy as np


def unsupported(*arguments) -> str | None:
    return None


def grid(length, dtype):
    """s = 2 cos(theta / 2) and mu = w / i = 4 sin(theta / 2) for m <= length / 2.

    In float64 before the cast: near theta = pi, s is a small difference.
    """
    half = np.pi * np.arange(length // 2 + 1) / length
    # cos(x) = sin(pi/2 - x), which is exact to the last bit where it is small
    s = 2 * np.sin(np.pi * (length - 2 * np.arange(length // 2 + 1)) / (2 * length))
    return s.astype(dtype), (4 * np.sin(half)).astype(dtype)


def cauchy(v, z, length):
    """k[m] = sum_n v / (w_m - s_m z) + conj(v) / (w_m - s_m conj(z))."""
    s, mu = grid(length, z.real.dtype)
    w = 1j * mu.astype(z.dtype)
    v, z = v[..., None], z[..., None]
    return jnp.sum(v / (w - s * z) + v.conj() / (w - s * z.conj()), -2)
