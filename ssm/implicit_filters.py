"""Long filters from few numbers, and what shapes those that are given tap by tap.

A filter is [..., K], lag 0 first. What depends on the lag alone is made by the program
that uses it, from tables of a few hundred lags: a table of all of them would be a
constant in every program, of gigabytes for a million lags.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels import pairs

# The standard deviation of the first taps of a free filter, by how it starts.
SCALES = {"random": 0.002, "double_exp": 0.02}


def free(
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: jnp.dtype = jnp.float32,
    *,
    start: str = "random",
) -> jax.Array:
    """Initial taps [..., H, K] of a free filter: normal with a standard deviation of
    `SCALES[start]`; "double_exp" times exp(-(j / K) (H / 2)^(h / H)), so that later
    features forget faster. Source: https://arxiv.org/abs/2302.06646."""
    taps = SCALES[start] * jax.random.normal(key, shape, dtype)
    if start == "random":
        return taps
    H, K = shape[-2:]
    rate = (H / 2) ** (np.arange(H) / H)
    (fading,) = _exponentials(-rate / K, K, dtype)
    return taps * fading


def squash(k: jax.Array, threshold: float) -> jax.Array:
    """sign(k) max(|k| - threshold, 0): small taps become 0, and learn nothing there."""
    return jnp.sign(k) * jax.nn.relu(jnp.abs(k) - threshold)


def smooth_time(k: jax.Array, width: int) -> jax.Array:
    """Each tap the mean of the `width` (odd) around it; beyond the ends are zeros."""
    return _weighted(k, np.full(width, 1 / width))


def smooth_frequency(k: jax.Array, width: int) -> jax.Array:
    """Each of the K / 2 + 1 bins of the spectrum a sum over the `width` (odd) around
    it, i bins away weighted by exp(-i^2 / 2), not normalised, as published: a window
    over the lags, that amplifies both ends and attenuates the middle."""
    i = np.arange(width) - width // 2
    spectrum = _weighted(jnp.fft.rfft(k), np.exp(-0.5 * i**2))
    return jnp.fft.irfft(spectrum, k.shape[-1])


SMOOTHERS = {"time": smooth_time, "frequency": smooth_frequency}


def _weighted(x, weights):
    """y[j] = sum_i weights[i] x[j + i - width // 2]."""
    width, K = len(weights), x.shape[-1]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(width // 2, width // 2)])
    return sum(float(w) * padded[..., i : i + K] for i, w in enumerate(weights))


def scales(length: int, knots: int) -> int:
    """The least S with knots 2^(S-1) >= length."""
    return 1 + (-(-length // knots) - 1).bit_length()


def upsample(w: jax.Array, factor: int) -> jax.Array:
    """w [..., d] -> [..., d factor], linear between the middles of equal cells and
    constant beyond the first and the last; factor is a power of two."""
    if factor == 1:
        return w
    w = jnp.concatenate([w[..., :1], w, w[..., -1:]], -1)
    ramp = jnp.asarray((np.arange(factor) + 0.5) / factor, w.dtype)
    between = w[..., :-1, None] + (w[..., 1:] - w[..., :-1])[..., None] * ramp
    return between.reshape(*w.shape[:-1], -1)[..., factor // 2 : -(factor // 2)]


def concatenated(w: jax.Array, multiplier: jax.Array) -> jax.Array:
    """Scales one after the other, of lengths d, d, 2d, 4d, ...:

        k = concat_i multiplier^(S-1-i) upsample(w_i, 2^max(0, i-1))

    w [S, ..., H, d], multiplier [H] -> [..., H, d 2^(S-1)]. Source:
    https://arxiv.org/abs/2210.09298.
    """
    factors = [1, *(2**i for i in range(len(w) - 1))]
    return jnp.concatenate(_weighed(w, multiplier, factors), -1)


def summed(w: jax.Array, multiplier: jax.Array) -> jax.Array:
    """Scales on top of each other, of lengths d, 2d, 4d, ...:

        k = sum_i multiplier^(S-1-i) upsample(w_i, 2^i)

    Shapes and source as `concatenated`.
    """
    parts = _weighed(w, multiplier, [2**i for i in range(len(w))])
    longest, ndim = parts[-1].shape[-1], parts[-1].ndim
    return sum(
        jnp.pad(part, [(0, 0)] * (ndim - 1) + [(0, longest - part.shape[-1])])
        for part in parts
    )


LAYOUTS = {"cat": concatenated, "sum": summed}


def _weighed(w, multiplier, factors):
    return [
        upsample(part * (multiplier ** (len(w) - 1 - i))[:, None], factor)
        for i, (part, factor) in enumerate(zip(w, factors, strict=True))
    ]


def power_decay(k: jax.Array, exponent: jax.Array) -> jax.Array:
    """k[h, j] (j + 1)^-exponent[h]; k [..., H, K], exponent [H]."""
    dtype = jnp.promote_types(k.dtype, jnp.float32)
    log_lag = jnp.log1p(jnp.arange(k.shape[-1], dtype=dtype)).astype(k.dtype)
    return k * jnp.exp(-exponent[:, None] * log_lag)


def positions(length: int, bands: int, dtype: jnp.dtype = float) -> jax.Array:
    """What an implicit filter knows of lag j, [length, 1 + 2 bands]:

        t = j / (length - 1), and Re, Im exp(-2 pi i f j / length)

    for `bands` frequencies f from 1e-4 to bands - 1. The error is a few roundings in
    `dtype`, whatever the length. Source: https://arxiv.org/abs/2302.10866.
    """
    f = np.linspace(1e-4, bands - 1, bands)
    waves = _exponentials(-2j * np.pi / length * f, length, dtype)
    t = jnp.arange(length, dtype=dtype) / max(1, length - 1)
    return jnp.concatenate([t[None], *waves]).T


def exponential_window(
    length: int,
    features: int,
    fast: float,
    slow: float,
    target: float,
    shift: float,
    dtype: jnp.dtype = float,
) -> jax.Array:
    """exp(-t |delta|) + shift [features, length], t from 0 to 1: without the shift it
    falls to `target` at t = slow in the first feature and at t = fast in the last, with
    delta evenly spaced between. The error is a few roundings in `dtype`, however far
    the window falls. Source: https://arxiv.org/abs/2302.10866."""
    delta = np.log(target) * np.linspace(1 / slow, 1 / fast, features)
    (window,) = _exponentials(-np.abs(delta) / max(1, length - 1), length, dtype)
    return window + shift


DIGIT = 128  # lags in one table


def _exponentials(rate, length, dtype):
    """exp(j rate), j < length: [*S, length] from rates [*S] of NumPy, a pair if they
    are complex, else (re,).

    The product over the digits of j to base DIGIT, of tables that float64 made: an
    exponent made in float32 would be rounded as much as it is large. The barrier keeps
    the compiler from multiplying the tables out.
    """
    table, stride = None, 1
    while table is None or stride < length:
        count = min(DIGIT, -(-length // stride))
        factor = np.exp(np.multiply.outer(rate, stride * np.arange(count)))
        parts = (factor.real, factor.imag) if np.iscomplexobj(rate) else (factor,)
        parts = tuple(jnp.asarray(part, dtype) for part in parts)
        parts = jax.lax.optimization_barrier(parts)
        table = parts if table is None else _outer(parts, table)
        stride *= count
    return tuple(part[..., :length] for part in table)


def _outer(high, low):
    """Pairs [*S, n] and [*S, m] -> [*S, n m]."""
    product = pairs.mul(
        tuple(part[..., None] for part in high),
        tuple(part[..., None, :] for part in low),
    )
    shape = (*low[0].shape[:-1], -1)
    return tuple(part.reshape(shape) for part in product)
