"""The filter of a diagonal plus low rank system, of sums that `cauchy` makes."""

import jax.numpy as jnp
import numpy as np


def small_solve(G, X):
    """G^-1 X for G [R, R, ...] and X [R, ...], R small, by elimination without pivots.

    Safe for I + (an operator with a non-negative real part), as here: no leading minor
    of such a matrix vanishes.
    """
    R = len(G)
    G, X = [list(row) for row in G], list(X)
    for i in range(R):
        for j in range(i + 1, R):
            factor = G[j][i] / G[i][i]
            G[j] = [g - factor * p for g, p in zip(G[j], G[i], strict=True)]
            X[j] = X[j] - factor * X[i]
    for i in reversed(range(R)):
        for j in range(i + 1, R):
            X[i] = X[i] - G[i][j] * X[j]
        X[i] = X[i] / G[i][i]
    return X


def filter_of_sums(g, R, length):
    """K [E, *H, length] from g [E + R, 1 + R, *H, F], the Cauchy sums of all products
    of (c, p*) with (b, p)."""
    theta = 2 * np.pi * np.arange(length // 2 + 1) / length
    outputs = g.shape[0] - R
    spectrum = g[:outputs, 0]
    if R:
        s = 2 * np.sin((np.pi - theta) / 2).astype(g.real.dtype)
        identity = np.eye(R, dtype=s.dtype).reshape(R, R, *[1] * (g.ndim - 2))
        solved = small_solve(identity + s * g[outputs:, 1:], g[outputs:, 0])
        through = sum(g[:outputs, 1 + r] * solved[r] for r in range(R))
        spectrum = spectrum - s * through
    turn = 2 * np.exp(0.5j * theta).astype(g.dtype)
    return jnp.fft.irfft(turn * spectrum, length)
