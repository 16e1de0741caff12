"""The definitions: a loop over lags, and the block FFT as one dense matrix."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from kernels import varying


def unsupported(*arguments) -> str | None:
    return None


def convolve(v, k, k_reverse, state, segment, low):
    """y[t] = sum_j k[j] v[t-j] + sum_j k_reverse[j] v[t+1+j], s and t in one segment.

    v [B, L, H], k [H, K], state [B, K-1, H] (segment 0) or None, segment [B, L] or
    None. `low` allows matmuls of bfloat16, which are not used here.
    """
    batch, length, channels = v.shape
    taps = k.shape[1]
    if state is None:
        state = varying.like(jnp.zeros((batch, taps - 1, channels), v.dtype), v)
    if segment is None:
        segment = varying.like(jnp.zeros((batch, length), jnp.int32), v)
    number = jnp.pad(segment, ((0, 0), (taps - 1, 0)))
    y = _lags(jnp.concatenate([state, v], 1), number, segment, k[:, ::-1])
    if k_reverse is not None:
        ahead = k_reverse.shape[1]
        padded = jnp.pad(v[:, 1:], ((0, 0), (0, ahead), (0, 0)))
        number = jnp.pad(segment[:, 1:], ((0, 0), (0, ahead)), constant_values=-1)
        y = y + _lags(padded, number, segment, k_reverse)
    return y


def _lags(padded, number, segment, taps):
    """sum_j taps[j] padded[t+j], where the segment of t+j is the segment of t."""
    length = segment.shape[1]

    def add(y, inputs):
        j, tap = inputs
        window = jax.lax.dynamic_slice_in_dim(padded, j, length, 1)
        same = jax.lax.dynamic_slice_in_dim(number, j, length, 1) == segment
        return y + jnp.where(same[..., None], tap * window, 0), None

    y = jnp.zeros((*segment.shape, padded.shape[2]), padded.dtype)
    y = varying.like(y, padded)
    return jax.lax.scan(add, y, (jnp.arange(taps.shape[1]), taps.T))[0]


def butterfly(u, k, u_factors, k_factors, low):
    """Re W^-1 (T_k k * T_u u), T and W as in `butterfly.butterfly_conv`, as matrices.

    u [B, H, L], k [H, K], each factor a pair [n, n] or [H, n, n]; `low` as above.
    """
    sizes = [re.shape[-1] for re, _ in u_factors]
    points = math.prod(sizes)
    T_u, T_k = (
        _block_matrix([jax.lax.complex(*factor) for factor in factors])
        for factors in (u_factors, k_factors)
    )
    W = _block_matrix([jnp.asarray(_dft(n), T_u.dtype) for n in sizes])
    u_full, k_full = (
        jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, points - x.shape[-1]),))
        for x in (u, k[None])
    )
    U = jnp.einsum("...kj,b...j->b...k", T_u, u_full)
    K = jnp.einsum("...kj,b...j->b...k", T_k, k_full)
    return (U * K @ W.conj() / points).real[..., : u.shape[-1]]


def _dft(n):
    return np.exp(-2j * np.pi * (np.outer(np.arange(n), np.arange(n)) % n) / n)


def _block_matrix(factors):
    """[N, N], or [H, N, N], over (k_1, kappa) and (j_1, m):

    F_1[k_1, j_1] exp(-2 pi i k_1 m / N) T[kappa, m], T that of the other factors.
    """
    first, *rest = factors
    if not rest:
        return first
    T = _block_matrix(rest)
    n, M = first.shape[-1], T.shape[-1]
    twiddle = jnp.asarray(_dft(n * M)[:n, :M], T.dtype)
    product = jnp.einsum("...kj,km,...cm->...kcjm", first, twiddle, T)
    return product.reshape(*product.shape[:-4], n * M, n * M)
