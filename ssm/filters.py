"""Impulse responses of state-space models."""

from kernels import vandermonde


def diagonal(log_a, b, c, length, *, backend=None):
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
