"""Impulse responses of state-space models."""

import jax
import jax.numpy as jnp

from kernels import dplr_filter, vandermonde
from ssm.dplr import DPLR


def diagonal(
    log_a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    length: int,
    *,
    backend: str | None = None,
) -> jax.Array:
    """K[h, l] = Re sum_n c[h, n] b[h, n] a[h, n]^l, the response of a diagonal system.

    Args:
        log_a: [H, n] log of the decay per token.
        b, c: [H, n] discrete input gain and output weight (with a factor 2 in c where
            only one of each conjugate pair is stored).
        length: L, the number of taps.

    Returns:
        K [H, L] real. Memory O(H (n + L)): the powers are never materialised.
    """
    return vandermonde(c * b, log_a, length, backend=backend)


def dplr(
    system: DPLR, C_tilde: jax.Array, length: int, *, backend: str | None = None
) -> jax.Array:
    """K[c, h, l] = 2 Re(C A_bar^l B_bar), l < length, of a bilinear `ssm.dplr.DPLR`.

    Args:
        system: lam, B [H, n], P [R, H, n], dt [H, 1].
        C_tilde: [channels, H, n], C (I - A_bar^length).

    Returns:
        K [channels, H, length]. Memory O(H (n + length)); see `kernels.dplr_filter`.
    """
    lam, P, B, dt = system
    root = jnp.sqrt(dt)
    return dplr_filter(C_tilde, dt * B, root * P, dt * lam, length, backend=backend)
