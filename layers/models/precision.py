"""Which dtype is used where."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Policy(NamedTuple):
    """The dtypes of a model.

    parameter: of what is trained, and of the optimiser's moments.
    compute: of activations and the matmuls between them, `dtype` of every layer.
    state: of SSM parameters, filters, gates and states inside a layer; a layer takes it
        from its dtype, by `layers.parameters.at_least_float32`.
    """

    parameter: jnp.dtype
    compute: jnp.dtype
    state: jnp.dtype


POLICIES = {
    "float32": Policy(jnp.float32, jnp.float32, jnp.float32),
    "bfloat16": Policy(jnp.float32, jnp.bfloat16, jnp.float32),
    "float64": Policy(jnp.float64, jnp.float64, jnp.float64),  # with jax.enable_x64
}


def get(name: str) -> Policy:
    """The policy called `name`; a `ValueError` lists the valid names, and refuses one
    that JAX would quietly narrow."""
    if name not in POLICIES:
        raise ValueError(f"dtype: must be one of {sorted(POLICIES)}, got {name!r}")
    policy = POLICIES[name]
    if jax.dtypes.canonicalize_dtype(policy.compute) != policy.compute:
        raise ValueError(f"dtype: {name!r} needs jax.enable_x64(True) around the call")
    return policy


def cast(variables: Any, policy: Policy) -> Any:
    """Real numbers of `variables` in the policy's parameter dtype."""
    return jax.tree.map(
        lambda x: (
            x.astype(policy.parameter) if jnp.issubdtype(x.dtype, jnp.floating) else x
        ),
        variables,
    )
