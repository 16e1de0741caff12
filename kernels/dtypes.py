"""The one rule for the dtype in which states and sums are kept."""

import jax.numpy as jnp


def state(*arrays) -> jnp.dtype:
    """That of all floating arrays together, float32 or wider; None is left out.

    So one argument of float64 makes the whole call float64, an initial state too.
    """
    given = (x.dtype for x in arrays if x is not None)
    return jnp.result_type(jnp.float32, *given)
