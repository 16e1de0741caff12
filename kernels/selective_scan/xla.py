"""Chunks of time: their decays, inputs and states exist for one chunk only.

Inside a chunk everything but the recurrence itself is elementwise or a contraction over
all its steps at once, and the recurrence is the linear scan. The backward pass keeps
the states between chunks and makes a chunk's own again.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.linear_scan import gradient, xla

CHUNK = 32  # steps whose states exist at once


def unsupported(*arguments) -> str | None:
    return None


def selective_scan(u, dt, A, B, C, state, into):
    """y [B, L, D] and the final state; see reference.selective_scan."""
    keep = None if into is None else (~into).astype(state.dtype)
    batch, length, channels = u.shape

    @partial(jax.checkpoint, prevent_cse=False)
    def chunk(A, state, inputs):
        return _chunk(A, state, *inputs)

    inputs = (u, dt, B, C, keep)
    whole = length // CHUNK * CHUNK
    outputs = []
    if whole:

        def fold(x):
            return x[:, :whole].reshape(batch, -1, CHUNK, *x.shape[2:]).swapaxes(0, 1)

        state, y = jax.lax.scan(
            lambda state, inputs: chunk(A, state, inputs),
            state,
            jax.tree.map(fold, inputs),
        )
        outputs.append(y.swapaxes(0, 1).reshape(batch, whole, channels))
    if whole < length:
        state, y = chunk(A, state, jax.tree.map(lambda x: x[:, whole:], inputs))
        outputs.append(y)
    return jnp.concatenate(outputs, 1) if len(outputs) > 1 else outputs[0], state


def _chunk(A, state, u, dt, B, C, keep):
    """The state after a chunk and its y, through its states [B, T, D, N]."""
    decay = jnp.exp(dt[..., None] * A)
    given = (dt * u)[..., None] * B[:, :, None]
    h, last = gradient.solve(xla, False, decay, given, state, keep)
    return last, jnp.sum(h * C[:, :, None], -1)
