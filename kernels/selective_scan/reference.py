"""The definition as a loop over time."""

import jax
import jax.numpy as jnp

from kernels.selective_scan import wide


def unsupported(*arguments) -> str | None:
    return None


@wide.in_state_dtype
def selective_scan(u, dt, A, B, C, state, into):
    """h[t] = exp(dt[t] A) h[t-1] + dt[t] u[t] B[t], y[t] = sum_n C[t] h[t] + skip u[t].

    u, dt [B, L, D], A [D, N], B, C [B, L, N], skip [D] or None, state [B, D, N]; into
    [B, L] bool cuts the carry into a step, or None.
    """

    def step(h, token):
        u, dt, B, C, cut = token
        if cut is not None:
            h = jnp.where(cut[:, None, None], 0, h)
        h = jnp.exp(dt[..., None] * A) * h + (dt * u)[..., None] * B[:, None]
        return h, jnp.sum(h * C[:, None], -1)

    tokens = jax.tree.map(lambda x: x.swapaxes(0, 1), (u, dt, B, C, into))
    final, y = jax.lax.scan(step, state, tokens)
    return y.swapaxes(0, 1), final
