"""Parameters of layers: their initialisers, dtypes, sharding, and projections."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


class Alike(nn.LogicallyPartitioned):
    """The box of a parameter that learns like those of another name.

    Attributes:
        like: that name. A pattern of `config.groups` that would match the parameter
            under it matches: "log_dt" or "A_re" are sensitive (a lower rate, no
            decay), "bias" does not decay, "kernel" is ordinary.
    """

    like: str = struct.field(default="", pytree_node=False)


def logical(init, *axes, like=""):
    """`init` whose parameter carries the logical axis names `axes` (for sharding) and
    is float32 unless it is asked for in another dtype: JAX's own initialisers would
    follow `jax_enable_x64` to float64. `like`: see `Alike`, "" where the parameter's
    own name says how it learns."""

    def in_float32(key, shape, dtype=jnp.float32):
        return init(key, shape, dtype=dtype)

    def alike(key, shape, dtype=jnp.float32):
        return Alike(in_float32(key, shape, dtype), axes, like=like)

    return alike if like else nn.with_logical_partitioning(in_float32, axes)


def constant(value):
    """Initialiser from a NumPy array, computed in float64 and cast once."""

    def init(key, shape, dtype=jnp.float32):
        del key
        return jnp.asarray(np.broadcast_to(value, shape), dtype)

    return init


def constant_pair(value):
    """Initialiser of [..., 2] real pairs from a complex NumPy array."""
    return constant(np.stack([np.real(value), np.imag(value)], axis=-1))


def complex_normal(std=1.0):
    """[..., 2] real pairs of a complex normal with E|z|^2 = std^2."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.normal(key, shape, dtype) * (std / math.sqrt(2))

    return init


def uniform(key, shape, dtype=jnp.float32, *, bound):
    """Initialiser U(-bound, bound)."""
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def dense(
    features,
    name,
    dtype,
    axes=("embed", "mlp"),
    bias_init=nn.initializers.zeros_init(),  # noqa: B008 (a pure function)
    kernel_init=nn.initializers.lecun_normal(),  # noqa: B008
):
    """`nn.Dense` with logical axes on its kernel and bias; bias_init None for none."""
    return nn.Dense(
        features,
        name=name,
        dtype=dtype,
        use_bias=bias_init is not None,
        kernel_init=logical(kernel_init, *axes),
        bias_init=None if bias_init is None else logical(bias_init, axes[1]),
    )


def linear(features, name, dtype, axes=("embed", "mlp")):
    """A projection without bias, as the families of gated mixers use them."""
    return dense(features, name, dtype, axes, bias_init=None)


def at_least_float32(dtype):
    """The dtype of gates, states and SSM parameters where activations are `dtype`:
    float32 or better."""
    return jnp.promote_types(dtype, jnp.float32)


def at_least_complex64(dtype):
    """The complex dtype of the same precision."""
    return jnp.promote_types(at_least_float32(dtype), jnp.complex64)
