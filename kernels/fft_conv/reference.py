"""The definition as a loop over lags."""

import jax
import jax.numpy as jnp


def unsupported(*arguments) -> str | None:
    return None


def convolve(v, k, k_reverse, state, segment):
    """y[t] = sum_j k[j] v[t-j] + sum_j k_reverse[j] v[t+1+j], s and t in one segment.

    v [B, L, H], k [H, K], state [B, K-1, H] (segment 0) or None, segment [B, L] or
    None.
    """
    batch, length, channels = v.shape
    taps = k.shape[1]
    if state is None:
        state = jnp.zeros((batch, taps - 1, channels), v.dtype)
    if segment is None:
        segment = jnp.zeros((batch, length), jnp.int32)
    number = jnp.pad(segment, ((0, 0), (taps - 1, 0)))
    y = _lags(jnp.concatenate([state, v], 1), number, segment, k[:, ::-1])
    if k_reverse is not None:
        ahead = k_reverse.shape[1]
        later = jnp.pad(v[:, 1:], ((0, 0), (0, ahead), (0, 0)))
        number = jnp.pad(segment[:, 1:], ((0, 0), (0, ahead)), constant_values=-1)
        y = y + _lags(later, number, segment, k_reverse)
    return y


def _lags(whole, number, segment, taps):
    """sum_j taps[j] whole[t+j], where the segment of t+j is the segment of t."""
    length = segment.shape[1]

    def add(y, inputs):
        j, tap = inputs
        here = jax.lax.dynamic_slice_in_dim(whole, j, length, 1)
        same = jax.lax.dynamic_slice_in_dim(number, j, length, 1) == segment
        return y + jnp.where(same[..., None], tap * here, 0), None

    y = jnp.zeros((*segment.shape, whole.shape[2]), whole.dtype)
    return jax.lax.scan(add, y, (jnp.arange(taps.shape[1]), taps.T))[0]
