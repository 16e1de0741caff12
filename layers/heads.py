"""What the mixers with several heads share: widths, projections, output."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.checks import at_least_one, divides
from layers.parameters import linear, logical


def sizes(layer: nn.Module) -> list[int]:
    """K and V per head: features times expand_k or expand_v, over the heads.
    `ValueError` names the field that does not divide."""
    at_least_one(layer, "heads")
    per_head = []
    for name in ("expand_k", "expand_v"):
        width = layer.features * getattr(layer, name)
        divides(layer, "heads", f"features x {name}", width)
        per_head.append(int(width) // layer.heads)
    return per_head


def split(x: jax.Array, heads: int) -> jax.Array:
    """[..., heads x size] -> [..., heads, size]."""
    return x.reshape(*x.shape[:-1], heads, -1)


def project(
    x: jax.Array, heads: int, size: int, name: str, dtype: jnp.dtype
) -> jax.Array:
    """A projection without bias to [..., heads, size]."""
    return split(linear(heads * size, name, dtype)(x), heads)


def block_diagonal(layer: nn.Module, x: jax.Array, name: str) -> jax.Array:
    """W x + b in which every head of x [B, L, E] is projected by itself: parameters
    `name`_kernel [heads, E / heads, E / heads] and `name`_bias [E]."""
    blocks = split(x, layer.heads)
    size = blocks.shape[-1]
    normal = logical(nn.initializers.normal(size**-0.5), "heads", None, None)
    W = layer.param(f"{name}_kernel", normal, (layer.heads, size, size))
    zero = logical(nn.initializers.zeros_init(), "mlp")
    b = layer.param(f"{name}_bias", zero, x.shape[-1:])
    return jnp.einsum("blhi,hij->blhj", blocks, W).reshape(x.shape) + b


def l2_normalise(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """x / |x| over the last axis, in float32 or better."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + epsilon)


def gated_output(
    o: jax.Array,
    gate: jax.Array | None,
    features: int,
    dtype: jnp.dtype,
    epsilon: float = 1e-5,
) -> jax.Array:
    """W_out (RMSNorm of every head of o [B, L, heads, V], times gate [B, L, heads V])
    -> [B, L, features]; gate None for none. One scale [V] serves all heads."""
    o = nn.RMSNorm(epsilon=epsilon, dtype=dtype, name="norm")(o)
    o = o.reshape(*o.shape[:2], -1)
    o = o if gate is None else o * gate
    return linear(features, "out", dtype, ("mlp", "embed"))(o)
