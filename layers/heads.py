"""What the mixers with several heads share: widths, projections, output."""

import flax.linen as nn
import jax.numpy as jnp

from layers.checks import at_least_one
from layers.parameters import linear


def sizes(layer):
    """K and V per head: features times expand_k or expand_v, over the heads.
    `ValueError` names the field that does not divide."""
    at_least_one(layer, "heads")
    found = []
    for name in ("expand_k", "expand_v"):
        width = layer.features * getattr(layer, name)
        if width < layer.heads or width % layer.heads:
            raise ValueError(
                f"heads: must divide features x {name} = {width:g}, got {layer.heads}"
            )
        found.append(int(width) // layer.heads)
    return found


def split(x, heads):
    """[..., heads x size] -> [..., heads, size]."""
    return x.reshape(*x.shape[:-1], heads, -1)


def project(x, heads, size, name, dtype):
    """A projection without bias to [..., heads, size]."""
    return split(linear(heads * size, name, dtype)(x), heads)


def l2_normalise(x, epsilon=1e-6):
    """x / |x| over the last axis, in float32 or better."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + epsilon)


def gated_output(o, gate, features, dtype, epsilon=1e-5):
    """W_out (RMSNorm of every head of o [B, L, heads, V], times gate [B, L, heads V])
    -> [B, L, features]; gate None for none. One scale [V] serves all heads."""
    o = nn.RMSNorm(epsilon=epsilon, dtype=dtype, name="norm")(o)
    o = o.reshape(*o.shape[:2], -1)
    o = o if gate is None else o * gate
    return linear(features, "out", dtype, ("mlp", "embed"))(o)
