"""What a reset means, in the forms the operations need.

reset[t] cuts the link between t-1 and t. A call over L tokens has L+1 links: link 0 brings the
initial state in, link L (in the order of processing) hands the final state out. Running forward,
reset[0] cuts the way in and the way out is free; running in reverse the way in, at L-1, is free
and reset[0] cuts the way out. So a call split in two equals the whole in both directions.
"""

import jax
import jax.numpy as jnp


def links(reset: jax.Array, reverse: bool) -> tuple[jax.Array, jax.Array]:
    """(into, out): into[b, t] cuts the carry into step t, out[b] the final state; bool."""
    free = jnp.zeros_like(reset[:, :1])
    if reverse:
        return jnp.concatenate([reset[:, 1:], free], 1), reset[:, 0]
    return reset, free[:, 0]


def ids(into: jax.Array) -> jax.Array:
    """[B, L] segment numbers in the order of processing; 0 belongs to the initial state."""
    return jnp.cumsum(into.astype(jnp.int32), 1)
