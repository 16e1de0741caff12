"""Parameters of layers: their initialisers, dtypes, sharding, and projections."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ssm import spectra


class Logical(nn.LogicallyPartitioned):
    """The box of a parameter: the logical names of its axes.

    In `nnx.bridge` they are mere notes: as a sharding, which they are in Flax's own
    box, they would ask for a mesh with axes of these names wherever a variable is made.
    """

    def to_nnx_metadata(self) -> dict[str, Any]:
        """What the variable of `nnx.bridge` is made of, with the class of the box."""
        return {"logical_axes": self.names, "value": self.value}

    @classmethod
    def from_nnx_metadata(cls: type["Logical"], metadata: dict[str, Any]) -> "Logical":
        """The box again, of what the variable knows."""
        fields = {field.name for field in dataclasses.fields(cls)}
        kept = {key: value for key, value in metadata.items() if key in fields}
        return cls(names=metadata["logical_axes"], **kept)


class Alike(Logical):
    """The box of a parameter that learns like those of another name.

    Attributes:
        like: that name. A pattern of `config.groups` that would match the parameter
            under it matches: "log_dt" or "A_re" are sensitive (a lower rate, no
            decay), "bias" does not decay, "kernel" is ordinary.
    """

    like: str = struct.field(default="", pytree_node=False)

    def to_nnx_metadata(self) -> dict[str, Any]:
        """Its name too."""
        return {**super().to_nnx_metadata(), "like": self.like}


def logical(init: Callable, *axes: str | None, like: str = "") -> Callable:
    """`init` whose parameter carries the logical axis names `axes` (for sharding) and
    is float32 unless it is asked for in another dtype: JAX's own initialisers would
    follow `jax_enable_x64` to float64. `like`: see `Alike`, "" where the parameter's
    own name says how it learns."""

    def boxed(key, shape, dtype=jnp.float32):
        value = init(key, shape, dtype=dtype)
        return Alike(value, axes, like=like) if like else Logical(value, axes)

    return boxed


def constant(value: np.ndarray) -> nn.initializers.Initializer:
    """Initialiser from a NumPy array, computed in float64 and cast once."""

    def init(key, shape, dtype=jnp.float32):
        del key
        return jnp.asarray(np.broadcast_to(value, shape), dtype)

    return init


def constant_pair(value: np.ndarray) -> nn.initializers.Initializer:
    """Initialiser of [..., 2] real pairs from a complex NumPy array."""
    return constant(np.stack([np.real(value), np.imag(value)], axis=-1))


def complex_normal(std: float = 1.0) -> nn.initializers.Initializer:
    """[..., 2] real pairs of a complex normal with E|z|^2 = std^2."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.normal(key, shape, dtype) * (std / math.sqrt(2))

    return init


def uniform(
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: jnp.dtype = jnp.float32,
    *,
    bound: float,
) -> jax.Array:
    """Initialiser U(-bound, bound)."""
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def rates(
    key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Initialiser of the log of rates that are uniform in [1, 16] (Mamba-2)."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


def softplus_dt(layer: nn.Module, floor: float = 1e-4) -> nn.initializers.Initializer:
    """Initialiser of a bias whose softplus is log-uniform in the range of the fields
    dt_min and dt_max of `layer`, and not below `floor`."""
    dt_min, dt_max = layer.dt_min, layer.dt_max
    return functools.partial(
        spectra.softplus_dt, dt_min=dt_min, dt_max=dt_max, floor=floor
    )


def log_dt(
    layer: nn.Module, name: str = "log_dt", axis: str = "embed", size: int | None = None
) -> jax.Array:
    """The parameter log dt [`size`, or H], initially log-uniform in the range of the
    fields dt_min and dt_max of `layer`."""
    start = functools.partial(spectra.log_dt, dt_min=layer.dt_min, dt_max=layer.dt_max)
    return layer.param(name, logical(start, axis), (size or layer.features,))


def skip(layer: nn.Module) -> jax.Array:
    """The parameter D [H], the weight of the input in the output, initially normal."""
    normal = nn.initializers.normal(1.0)
    return layer.param("D", logical(normal, "embed"), (layer.features,))


def dense(
    features: int,
    name: str,
    dtype: jnp.dtype,
    axes: tuple[str | None, str | None] = ("embed", "mlp"),
    bias_init: nn.initializers.Initializer | None = nn.initializers.zeros_init(),  # noqa: B008 (a pure function)
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal(),  # noqa: B008
) -> nn.Dense:
    """`nn.Dense` with logical axes on its kernel and bias; bias_init None for none."""
    return nn.Dense(
        features,
        name=name,
        dtype=dtype,
        use_bias=bias_init is not None,
        kernel_init=logical(kernel_init, *axes),
        bias_init=None if bias_init is None else logical(bias_init, axes[1]),
    )


def linear(
    features: int,
    name: str,
    dtype: jnp.dtype,
    axes: tuple[str | None, str | None] = ("embed", "mlp"),
) -> nn.Dense:
    """A projection without bias, as the families of gated mixers use them."""
    return dense(features, name, dtype, axes, bias_init=None)


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of gates, states and SSM parameters where activations are `dtype`:
    float32 or better."""
    return jnp.promote_types(dtype, jnp.float32)


def zeros(layer: nn.Module, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Zeros of these shapes, a state before the first token: float32 or better."""
    return [jnp.zeros(shape, at_least_float32(layer.dtype)) for shape in shapes]


def at_least_complex64(dtype: jnp.dtype) -> jnp.dtype:
    """The complex dtype of the same precision."""
    return jnp.promote_types(at_least_float32(dtype), jnp.complex64)
