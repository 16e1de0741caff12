"""HiPPO matrices (https://arxiv.org/abs/2008.07669), in NumPy float64.

A is real [N, N], B real [N], of x' = A x + B u.
"""

import numpy as np


def legs(N):
    """HiPPO-LegS. A_nk = -sqrt((2n+1)(2k+1)) below the diagonal, -(n+1) on it, 0 above;
    B_n = sqrt(2n+1). Returns A [N, N], B [N]."""
    n = np.arange(N, dtype=np.float64)
    r = np.sqrt(2 * n + 1)
    A = -np.tril(np.outer(r, r), -1) - np.diag(n + 1)
    return A, r


def legs_low_rank(N):
    """P [N], P_n = sqrt(n + 1/2): A_legs + P P^T is normal, skew minus I/2."""
    return np.sqrt(np.arange(N, dtype=np.float64) + 0.5)


def normal_eigenpairs(A_normal):
    """Eigenpairs of a real matrix c I + skew, for an even size N.

    Returns lam [N/2] complex128, the half with negative imaginary parts in ascending
    order, and V [N, N/2] complex128 with orthonormal columns: A = 2 Re(V diag(lam) V*).
    The Hermitian problem of -i (A - c I) is solved, never the general one: that would
    neither order nor pair the eigenvalues reliably.
    """
    N = len(A_normal)
    if N % 2:
        raise ValueError(f"N: the state size must be even, got {N}")
    c = np.mean(np.diag(A_normal))
    omega, V = np.linalg.eigh(-1j * (A_normal - c * np.eye(N)))
    return c + 1j * omega[: N // 2], V[:, : N // 2]


def hippo_n(N):
    """HiPPO-N: eigenpairs of the normal part of LegS, A_legs + P P^T (N even)."""
    A, _ = legs(N)
    P = legs_low_rank(N)
    return normal_eigenpairs(A + np.outer(P, P))
