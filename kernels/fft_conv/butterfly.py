"""FlashButterfly: a long convolution in which the transform itself is learned."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels import checks, dispatch, rows, shards, varying
from kernels.fft_conv import monarch, reference, taps

BACKENDS = {"monarch": monarch, "reference": reference}


def butterfly_conv(
    u: jax.Array,
    k: jax.Array,
    u_factors: Sequence[jax.Array],
    k_factors: Sequence[jax.Array],
    *,
    k_reverse: jax.Array | None = None,
    skip: jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """y = Re W^-1 (T(k) * T(u)) + skip u, T a block FFT with factors of one's own.

    A block FFT of N = n_1 M points takes j = j_1 M + m to (k_1, kappa) in three steps,

        X[k_1, m] = exp(-2 pi i k_1 m / N) sum_{j_1} F_1[k_1, j_1] x[j_1 M + m]
        X[k_1, kappa] = the block FFT of M points of X[k_1, :], with F_2, ..., F_p

    W is the one whose factors are those of the DFT. With these also in T, as
    `dft_factors` gives them, y is `fft_conv(u, k, k_reverse=k_reverse, skip=skip)`.
    With others y is linear in u, but no convolution: it is not causal and has no state
    or resets. (https://arxiv.org/abs/2302.06646)

    Args:
        u: [B, L, H] real input.
        k: [H, K] real filter, of which the first L taps are used.
        u_factors, k_factors: for each of the p steps [n_i, n_i, 2] or [H, n_i, n_i, 2],
            real and imaginary parts, of the same sizes in both, with at least
            L + max(K - 1, K2) points in all.
        k_reverse: [H, K2] real filter of the future, as in `fft_conv`, or None.
        skip: [H] or None.
        backend: "monarch", or "reference", which makes [N, N] matrices.

    Returns:
        y: [B, L, H] in u's dtype. With bfloat16 u the matmuls are in bfloat16.

    Reverse-mode differentiable in all floating arguments; of the steps nothing is kept
    for the gradient. From four factors on the rows k_1 are processed one after the
    other.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the backend cannot run.
    """
    op = "butterfly_conv"
    points = _check(op, u, k, u_factors, k_factors, k_reverse, skip)
    arguments = u, k, u_factors, k_factors, k_reverse, skip

    def call(u, k, u_factors, k_factors, k_reverse, skip):
        options = dict(k_reverse=k_reverse, skip=skip, backend=backend)
        return butterfly_conv(u, k, u_factors, k_factors, **options)

    if not u.shape[0]:
        return rows.none(call, *arguments)
    if shards.active():
        each, channel = shards.LONG, shards.BY_SPREAD
        factors = [
            [channel if f.ndim == 4 else shards.WHOLE for f in some]
            for some in (u_factors, k_factors)
        ]
        specs = each, channel, *factors, channel, channel
        return shards.run(call, arguments, specs, each)
    module = dispatch.pick(op, BACKENDS, backend, u, k)
    dtype = checks.state_dtype(u, k, k_reverse, skip, *u_factors, *k_factors)
    length = u.shape[1]
    u, k, u_factors, k_factors, k_reverse, skip = varying.together(
        u, k, u_factors, k_factors, k_reverse, skip
    )
    v = u.swapaxes(1, 2).astype(dtype)
    kernel = k[:, :length].astype(dtype)
    if k_reverse is not None:
        ahead = k_reverse[:, : length - 1].astype(dtype)[:, ::-1]
        gap = points - kernel.shape[1] - ahead.shape[1]
        kernel = jnp.concatenate([jnp.pad(kernel, ((0, 0), (0, gap))), ahead], 1)
    factors = (
        [(f[..., 0].astype(dtype), f[..., 1].astype(dtype)) for f in step_factors]
        for step_factors in (u_factors, k_factors)
    )
    y = module.butterfly(v, kernel, *factors, u.dtype == jnp.bfloat16)
    y = y.swapaxes(1, 2)
    if skip is not None:
        y = y + skip.astype(dtype) * u.astype(dtype)
    return y.astype(u.dtype)


def dft_factors(sizes: Sequence[int], dtype=jnp.float32) -> list[jax.Array]:
    """The factors [n, n, 2] with which a block FFT is the FFT, for sizes of one's own
    or `block_sizes(points, order)`.

    Raises:
        ValueError: a size is not an integer >= 1.
    """
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        raise ValueError(
            f"dft_factors: sizes must be a sequence of integers >= 1, got {sizes!r}"
        )
    sizes = [checks.positive("dft_factors", "every size", n) for n in sizes]
    return [jnp.stack(monarch.dft(n, dtype), -1) for n in sizes]


def block_sizes(points: int, order: int | None = None) -> tuple[int, ...]:
    """Sizes n_1, ..., n_p of the factors of a block FFT of `points` or a little more.

    Args:
        points: at least this many; L + max(K - 1, K2) for a convolution.
        order: p; None takes 2 up to 1024 points, 3 up to 65536, and beyond that 4:
            16 to 128 rows, each a block FFT of three factors.

    Raises:
        ValueError: points or order is not an integer >= 1.
    """
    points = checks.positive("block_sizes", "points", points)
    if order is not None:
        order = checks.positive("block_sizes", "order", order)
    return monarch.block_sizes(points, order)


def _check(op, u, k, u_factors, k_factors, k_reverse, skip):
    """The number of points, N."""
    checks.rows(op, u=u)
    checks.arrays(op, k=k)
    checks.arrays_or_none(op, k_reverse=k_reverse, skip=skip)
    checks.floating(op, real=True, u=u, k=k, k_reverse=k_reverse, skip=skip)
    checks.sequence(op, "u", u, "[B, L, H]", ndim=3)
    length, channels = u.shape[1:]
    taps.check(op, "k", k, channels)
    taps.check(op, "k_reverse", k_reverse, channels)
    checks.shape(op, "skip", skip, (channels,), "[H]")
    sizes = []
    for name, factors in (("u_factors", u_factors), ("k_factors", k_factors)):
        if not isinstance(factors, list | tuple):
            raise ValueError(
                f"{op}: {name} must be a list of arrays, one per step, got "
                f"{type(factors).__name__}"
            )
        if not factors:
            raise ValueError(f"{op}: {name} must hold at least one factor, got none")
        for i, factor in enumerate(factors):
            checks.arrays(op, **{f"{name}[{i}]": factor})
            checks.floating(op, real=True, **{f"{name}[{i}]": factor})
            n = factor.shape[-2] if factor.ndim >= 2 else 0
            if factor.shape not in ((n, n, 2), (channels, n, n, 2)) or n < 1:
                raise ValueError(
                    f"{op}: {name}[{i}] must be [n, n, 2] or [H, n, n, 2] with "
                    f"H = {channels}, got {factor.shape}"
                )
        sizes.append([factor.shape[-2] for factor in factors])
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{op}: k_factors must have the sizes of u_factors {sizes[0]}, "
            f"got {sizes[1]}"
        )
    ahead = 0 if k_reverse is None else min(k_reverse.shape[1], length - 1)
    needed = length + max(min(k.shape[1], length) - 1, ahead)
    points = math.prod(sizes[0])
    if points < needed:
        raise ValueError(
            f"{op}: u_factors must have at least L + max(K - 1, K2) = {needed} points "
            f"in all, got {points} from sizes {sizes[0]}"
        )
    return points
