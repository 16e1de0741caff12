"""What the mixers of the delta rule share: their inputs, the strength of a write, the
state."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers import heads
from layers.checks import at_least_one
from layers.inside import record
from layers.parameters import at_least_float32, dense
from layers.short_conv import ShortConv
from ssm import sequence as seq


class DeltaState(NamedTuple):
    """What the past leaves behind."""

    query: jax.Array  # [B, W-1, heads K] the last inputs of the short convolutions,
    key: jax.Array  # [B, W-1, heads K]
    value: jax.Array  # [B, W-1, heads V]
    S: jax.Array  # [B, heads, K, V]


def write_strength(layer: nn.Module, x: jax.Array, sequence: seq.Sequence) -> jax.Array:
    """beta [B, L, heads] in (0, 1), 0 on masked tokens."""
    project = dense(
        layer.heads, "beta", at_least_float32(layer.dtype), ("embed", "heads"), None
    )
    beta = nn.sigmoid(project(x))
    record(layer, sequence, gate=beta)
    return seq.zero_masked(beta, sequence)


def short_convolutions(
    layer: nn.Module, x: jax.Array, state: DeltaState | None, sequence: seq.Sequence
) -> tuple[jax.Array, jax.Array, jax.Array, list[jax.Array]]:
    """q and k [B, L, heads, K] of length 1, q / sqrt(K), v [B, L, heads, V], and what
    the convolutions keep."""
    K, V = heads.sizes(layer)
    at_least_one(layer, "conv_width")
    projections, tails = [], []
    for name, size in (("query", K), ("key", K), ("value", V)):
        z = heads.project(x, layer.heads, size, name, layer.dtype)
        conv = ShortConv(
            layer.heads * size,
            layer.conv_width,
            use_bias=False,
            dtype=layer.dtype,
            name=f"{name}_conv",
        )
        before = None if state is None else getattr(state, name)
        z, tail = conv(z.reshape(*x.shape[:2], -1), before, sequence)
        projections.append(heads.split(nn.silu(z), layer.heads))
        tails.append(tail)
    q, k, v = projections
    q, k = (heads.l2_normalise(z).astype(layer.dtype) for z in (q, k))
    return q * K**-0.5, k, v, tails


def zero_delta_state(layer: nn.Module, batch_size: int) -> DeltaState:
    """The `DeltaState` before the first token."""
    K, V = heads.sizes(layer)
    at_least_one(layer, "conv_width")
    tails = [
        (batch_size, layer.conv_width - 1, layer.heads * size) for size in (K, K, V)
    ]
    shapes = [*tails, (batch_size, layer.heads, K, V)]
    return DeltaState(
        *(jnp.zeros(shape, at_least_float32(layer.dtype)) for shape in shapes)
    )
