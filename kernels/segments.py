"""State, resets and direction, in the forms the operations need.

reset[t] cuts the link between t-1 and t. A call over L tokens has L+1 links: link 0
brings the initial state in, link L (in the order of processing) hands the final state
out. Running forward, reset[0] cuts the way in and the way out is free; running in
reverse the way in, at L-1, is free and reset[0] cuts the way out. So a call split in
two equals the whole in both directions.
"""

import jax
import jax.numpy as jnp

from kernels import varying


def initial(state, shape, dtype, like):
    """The initial state of a call for its loop: in `dtype`, zeros where it is None,
    which vary over a mesh as `like` does."""
    if state is None:
        return varying.like(jnp.zeros(shape, dtype), like)
    return state.astype(dtype)


def flipped(reverse: bool, *sequences):
    """All of them [B, L, ...] (or None), turned round in time if `reverse`; one alone
    is no tuple."""
    if reverse:
        sequences = jax.tree.map(lambda x: jnp.flip(x, 1), sequences)
    return sequences if len(sequences) > 1 else sequences[0]


def links(reset: jax.Array | None, reverse: bool) -> tuple:
    """(into, out), bool: into[b, t] cuts the carry into step t, out[b] the way out;
    None both without resets."""
    if reset is None:
        return None, None
    free = jnp.zeros_like(reset[:, :1])
    if reverse:
        return jnp.concatenate([reset[:, 1:], free], 1), reset[:, 0]
    return reset, free[:, 0]


def ids(into: jax.Array) -> jax.Array:
    """[B, L] segment numbers in the order of processing; 0 has the initial state."""
    return jnp.cumsum(into.astype(jnp.int32), 1)


def cut(array: jax.Array, rows: jax.Array | None) -> jax.Array:
    """[B, ...], 0 in those of the rows [B] that are True; none are where it is None."""
    if rows is None:
        return array
    return jnp.where(jnp.expand_dims(rows, tuple(range(1, array.ndim))), 0, array)


def through(transition: jax.Array, reset: jax.Array | None) -> jax.Array:
    """The transition [B, ...] of a call: 0 where a reset lies inside."""
    return cut(transition, None if reset is None else reset.any(1))


def tail(u, state, segment, out):
    """The last inputs of the call, as many as `state` [B, K, H] holds, in its dtype.

    Inputs before the last segment, and everything where `out` cuts the way out, are
    zero.
    """
    count, length = state.shape[1], u.shape[1]
    recent = min(count, length)
    last = u[:, length - recent :].astype(state.dtype)
    early = state[:, recent:]
    if segment is not None:
        final = segment[:, -1:]
        last = jnp.where((segment[:, length - recent :] == final)[..., None], last, 0)
        early = jnp.where((final == 0)[..., None], early, 0)
    inputs = jnp.concatenate([early, last], 1)
    return inputs if out is None else jnp.where(out[:, None, None], 0, inputs)
