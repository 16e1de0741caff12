"""What a reset means, in the forms the operations need.

reset[t] cuts the link between t-1 and t. A call over L tokens has L+1 links: link 0
brings the initial state in, link L (in the order of processing) hands the final state
out. Running forward, reset[0] cuts the way in and the way out is free; running in
reverse the way in, at L-1, is free and reset[0] cuts the way out. So a call split in
two equals the whole in both directions.
"""

import jax
import jax.numpy as jnp


def links(reset: jax.Array, reverse: bool) -> tuple[jax.Array, jax.Array]:
    """(into, out), bool: into[b, t] cuts the carry into step t, out[b] the way out."""
    free = jnp.zeros_like(reset[:, :1])
    if reverse:
        return jnp.concatenate([reset[:, 1:], free], 1), reset[:, 0]
    return reset, free[:, 0]


def ids(into: jax.Array) -> jax.Array:
    """[B, L] segment numbers in the order of processing; 0 has the initial state."""
    return jnp.cumsum(into.astype(jnp.int32), 1)


def tail(u, state, segment, out):
    """The last inputs of the call, as many as `state` [B, K, H] holds, in its dtype.

    Inputs before the last segment, and everything where `out` cuts the way out, are
    zero.
    """
    count, length = state.shape[1], u.shape[1]
    kept = min(count, length)
    last = u[:, length - kept :].astype(state.dtype)
    early = state[:, kept:]
    if segment is not None:
        final = segment[:, -1:]
        last = jnp.where((segment[:, length - kept :] == final)[..., None], last, 0)
        early = jnp.where((final == 0)[..., None], early, 0)
    whole = jnp.concatenate([early, last], 1)
    return whole if out is None else jnp.where(out[:, None, None], 0, whole)
