"""W shifted multiplies, which XLA fuses into one pass over the input."""

import jax.numpy as jnp


def unsupported(*arguments) -> str | None:
    return None


def short_conv(u, w, bias, state, segment):
    """u [B, L, H], state [B, W-1, H] in segment 0, segment [B, L] or None."""
    length, width = u.shape[1], w.shape[1]
    padded = jnp.concatenate([state, u.astype(state.dtype)], 1)
    w = w.astype(state.dtype)
    if segment is not None:
        before = jnp.zeros_like(state[:, :, 0], segment.dtype)
        number = jnp.concatenate([before, segment], 1)
    y = 0 if bias is None else bias.astype(state.dtype)
    for lag in range(width):
        start = width - 1 - lag
        shifted = padded[:, start : start + length]
        if segment is not None:
            same = number[:, start : start + length] == segment
            shifted = jnp.where(same[..., None], shifted, 0)
        y = y + w[:, lag] * shifted
    return y.astype(u.dtype)
