"""Lightning attention of TransNormerLLM (https://arxiv.org/abs/2401.04658)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels import chunked_scan
from layers import heads
from layers.checks import also_empty, at_least_zero, checked
from layers.facts import Placement, examples
from layers.inside import expose, record
from layers.parameters import at_least_float32, linear
from ssm import sequence as seq


def slopes(count: int) -> np.ndarray:
    """ALiBi's 2^(-8 (h + 1) / count), h < count; where count is no power of 2, those of
    the power below, then every second one of the power above."""
    power = 2 ** math.floor(math.log2(count))
    first = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8 * np.arange(1, 2 * power, 2) / (2 * power))
    return np.concatenate([first, between[: count - power]])


class Lightning(nn.Module):
    """Linear attention without a denominator, one fixed decay per head:

        q, k = silu(W x), v, g = W x
        S[t] = exp(-s) S[t-1] + k[t] v[t]^T                   [heads, K, V]
        y    = W_out (RMSNorm(S[t]^T q[t]) sigmoid(g))

    s = slope_scale times ALiBi's slope of the head. Elapsed time multiplies s. The norm
    is that of every head by itself, as in RetNet; the published one is over all heads,
    where the rounding of bfloat16 weighs too much after few tokens.

    Attributes:
        features: H.
        heads: their number.
        expand_k, expand_v: all keys together have expand_k H channels, values
            expand_v H.
        slope_scale: of all s; published models lower it from layer to layer.
        dtype: of activations; decays and states are float32 or better.
    """

    PLACEMENT = Placement("none", 2.0)
    EXAMPLES = examples(dict(heads=3))

    features: int
    heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 1.0
    slope_scale: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H], state [B, heads, K, V]. `ValueError` for a wrong
        shape, or widths that the heads do not divide."""
        del train
        sequence = checked(self, x, state, sequence)
        at_least_zero(self, "slope_scale")
        x, sequence, restore = seq.compact(x, sequence)
        K, V = heads.sizes(self)
        q = nn.silu(heads.project(x, self.heads, K, "query", self.dtype))
        k = nn.silu(heads.project(x, self.heads, K, "key", self.dtype))
        v = expose(self, "values", heads.project(x, self.heads, V, "value", self.dtype))
        gate = nn.sigmoid(linear(self.heads * V, "gate", self.dtype)(x))
        log_decay = jnp.asarray(
            -self.slope_scale * slopes(self.heads), at_least_float32(self.dtype)
        )
        elapsed = seq.elapsed(sequence)
        if elapsed is not None:
            log_decay = elapsed[..., None] * log_decay
        record(self, sequence, gate=gate)
        o, S = chunked_scan(q, k, v, log_decay, None, state, sequence.reset)
        o = expose(self, "mixed", o)
        y = heads.gated_output(o, gate, self.features, self.dtype)
        return restore(y).astype(self.dtype), S

    @nn.nowrap
    def init_state(self, batch_size: int) -> jax.Array:
        """Zeros [B, heads, K, V]."""
        return jnp.zeros(
            (batch_size, self.heads, *heads.sizes(self)), at_least_float32(self.dtype)
        )
