"""The definition, one step after another with the window as the state."""

import jax
import jax.numpy as jnp

from kernels import varying


def unsupported(*arguments) -> str | None:
    return None


def short_conv(u, w, bias, state, segment):
    """y[t] = bias + sum_j w[:, j] u[t-j] in one segment; `state` is in segment 0."""
    wide, w = u.astype(state.dtype), w.astype(state.dtype)
    if segment is None:
        segment = varying.like(jnp.zeros(u.shape[:2], jnp.int32), u)
    bias = 0 if bias is None else bias.astype(state.dtype)

    def step(carry, inputs):
        window, before = carry
        u, number = inputs
        window = jnp.where((number == before)[:, None, None], window, 0)
        window = jnp.concatenate([window, u[:, None]], 1)  # oldest first
        y = jnp.einsum("bwh,hw->bh", window, w[:, ::-1]) + bias
        return (window[:, 1:], number), y

    carry = (state, jnp.zeros_like(segment[:, 0]))
    _, y = jax.lax.scan(step, carry, (wide.swapaxes(0, 1), segment.T))
    return y.swapaxes(0, 1).astype(u.dtype)
