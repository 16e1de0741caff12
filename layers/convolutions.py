"""Long convolutions, their state and their filters, which several layers share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import fft_conv
from layers import checks
from layers.inside import expose
from layers.parameters import at_least_float32, dense, logical, uniform
from ssm import implicit_filters
from ssm import sequence as seq


def checked_filters(
    layer: nn.Module,
    x: jax.Array,
    state: jax.Array | None,
    sequence: seq.Sequence | None,
) -> seq.Sequence:
    """`layers.checks.checked` for a layer whose filters have `length` taps: no dt, and
    no call that is longer."""
    sequence = checks.checked(layer, x, state, sequence)
    checks.refuse_dt(layer, sequence, checks.TAPS)
    checks.within_length(layer, x)
    return sequence


def long_conv(
    u: jax.Array,
    k: jax.Array,
    state: jax.Array | None,
    sequence: seq.Sequence,
    skip: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y = k * u + skip u, and the last K-1 inputs that exist, the state [B, K-1, H].

    u [B, L, H] with right padding only, k [H, K], skip [H]; state None: no past.
    """
    y, _ = fft_conv(u, k, state, sequence.reset, skip=skip)
    if state is None:
        state = past_inputs(u.shape[0], k.shape[1], k.shape[0], u.dtype)
    return y, seq.window(state, u, sequence)


def both_ways(
    u: jax.Array, k: jax.Array, sequence: seq.Sequence, skip: jax.Array
) -> jax.Array:
    """y = k[0] * u + skip u, and k[1] over the future: sum_j k[1, j] u[t+1+j].

    u [B, L, H] with right padding only, k two filters [H, K], skip [H].
    """
    y, _ = fft_conv(u, k[0], None, sequence.reset, k_reverse=k[1], skip=skip)
    return y


def filtered(
    layer: nn.Module,
    x: jax.Array,
    k: jax.Array,
    skip: jax.Array,
    state: jax.Array | None,
    sequence: seq.Sequence,
) -> tuple[jax.Array, jax.Array | None]:
    """What a layer that is nothing but its filters k [1 or 2, H, length] answers to
    x [B, L, H]: y, and the state of `long_conv` (None if bidirectional)."""
    u, sequence, restore = seq.compact(x.astype(layer.dtype), sequence)
    u = expose(layer, "values", u)
    if layer.bidirectional:
        y = both_ways(u, k, sequence, skip)
    else:
        y, state = long_conv(u, k[0], state, sequence, skip)
    return restore(expose(layer, "mixed", y)), state


def zero_past(layer: nn.Module, batch_size: int) -> jax.Array:
    """The state of `filtered` before the first token, zeros [B, length-1, H].
    `ValueError` for a bidirectional layer, which has none."""
    checks.recurrent(layer)
    checks.at_least_one(layer, "length")
    return past_inputs(batch_size, layer.length, layer.features, layer.dtype)


def implicit_filter(layer: nn.Module, filters: int) -> jax.Array:
    """Taps [filters, length] as functions of the lag: a network of sines under a window
    of fields of `layer` (Hyena, https://arxiv.org/abs/2302.10866). `ValueError` for a
    field out of range."""
    checks.at_least_one(layer, "hidden", "bands")
    checks.at_least_zero(layer, "inner")
    checks.positive(layer, "fast", "slow")
    if not 0 < layer.target < 1:
        raise ValueError(f"target: must be between 0 and 1, got {layer.target}")
    dtype = at_least_float32(layer.dtype)
    kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    ones = nn.initializers.constant(layer.frequency)
    w = layer.param("frequency", logical(ones, "mlp"), (layer.hidden,))
    h = implicit_filters.positions(layer.length, layer.bands, dtype)
    for i in range(1 + layer.inner):
        bias = functools.partial(uniform, bound=h.shape[-1] ** -0.5)
        axes = (None, "mlp")
        project = dense(layer.hidden, f"filter_{i}", dtype, axes, bias, kernel)
        h = jnp.sin(w * project(h))
    k = dense(filters, "filter", dtype, ("mlp", "embed"), None, kernel)(h).T
    fade = layer.fast, layer.slow, layer.target, layer.shift, dtype
    return k * implicit_filters.exponential_window(layer.length, filters, *fade)


def past_inputs(
    batch_size: int, taps: int, features: int, dtype: jnp.dtype
) -> jax.Array:
    """The state of `long_conv` before the first token, zeros [B, K-1, H]."""
    return jnp.zeros((batch_size, taps - 1, features), at_least_float32(dtype))
