"""A call without a row: a batch of which nothing is left.

The forms divide by the batch, make blocks of it and launch kernels over it. So a call
for nothing is one for a row of zeros, of which nothing is kept: empty results, and
zeros as the gradients of what all rows share.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def none(call: Callable, *arguments):
    """call(*arguments), whose results all begin with the batch, for a batch of 0 rows;
    what begins with an empty axis, and may be None, is given one."""
    results = call(*jax.tree.map(_one, arguments))
    return jax.tree.map(lambda x: x[:0], results)


def _one(x):
    if x.shape[:1] != (0,):
        return x
    return jnp.zeros((1, *x.shape[1:]), x.dtype)
