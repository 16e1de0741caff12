"""DeltaNet, linear attention that corrects itself (https://arxiv.org/abs/2406.06484)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import chunked_scan
from layers import heads
from layers.checks import also_empty, at_least_one, checked
from layers.facts import Examples, Placement
from layers.inside import expose, record
from layers.parameters import at_least_float32, dense
from layers.short_conv import ShortConv
from ssm import sequence as seq


class DeltaState(NamedTuple):
    """What the past leaves behind."""

    query: jax.Array  # [B, W-1, heads K] the last inputs of the short convolutions,
    key: jax.Array  # [B, W-1, heads K]
    value: jax.Array  # [B, W-1, heads V]
    S: jax.Array  # [B, heads, K, V]


class DeltaNet(nn.Module):
    """Linear attention that writes what the state does not know yet:

        q, k, v = silu(short convolutions of W x), q and k of length 1, q / sqrt(K)
        beta    = sigmoid(W x)                                [heads]
        S[t]    = (I - beta k k^T) S[t-1] + beta k v^T        [heads, K, V]
        y       = W_out RMSNorm(S[t]^T q[t])

    Elapsed times have no meaning for it: `dt` is a `ValueError`.

    Attributes:
        features: H.
        heads: their number.
        expand_k, expand_v: all keys together have expand_k H channels, values
            expand_v H.
        conv_width: W.
        dtype: of activations; beta and states are float32 or better.
    """

    REFUSES = ("dt",)
    PLACEMENT = Placement("none", 8 / 3)
    EXAMPLES = Examples({"": dict(heads=2)})

    features: int
    heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 1.0
    conv_width: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H], `DeltaState`. `ValueError` for a wrong shape, a
        dt, or widths that the heads do not divide."""
        del train
        sequence = checked(self, x, state, sequence)
        if sequence.dt is not None:
            raise ValueError("dt: DeltaNet has no notion of elapsed time; pass None")
        x, sequence, restore = seq.compact(x, sequence)
        q, k, v, tails = short_convolutions(self, x, state, sequence)
        beta = write_strength(self, x, sequence)
        S = None if state is None else state.S
        v = expose(self, "values", v)
        o, S = chunked_scan(q, k, v, None, beta, S, sequence.reset)
        o = expose(self, "mixed", o)
        y = heads.gated_output(o, None, self.features, self.dtype)
        return restore(y).astype(self.dtype), DeltaState(*tails, S)

    @nn.nowrap
    def init_state(self, batch_size):
        """Zeros."""
        return zero_state(self, batch_size)


def write_strength(layer, x, sequence):
    """beta [B, L, heads] in (0, 1), 0 on masked tokens."""
    project = dense(
        layer.heads, "beta", at_least_float32(layer.dtype), ("embed", "heads"), None
    )
    beta = nn.sigmoid(project(x))
    record(layer, sequence, gate=beta)
    return seq.zero_masked(beta, sequence)


def short_convolutions(layer, x, state, sequence):
    """q and k [B, L, heads, K] of length 1, q / sqrt(K), v [B, L, heads, V], and what
    the convolutions keep."""
    K, V = heads.sizes(layer)
    at_least_one(layer, "conv_width")
    found, tails = [], []
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
        found.append(heads.split(nn.silu(z), layer.heads))
        tails.append(tail)
    q, k, v = found
    q, k = (heads.l2_normalise(z).astype(layer.dtype) for z in (q, k))
    return q * K**-0.5, k, v, tails


def zero_state(layer, batch_size):
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
