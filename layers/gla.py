"""GLA, gated linear attention (https://arxiv.org/abs/2312.06635)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import chunked_scan
from layers import heads
from layers.checks import also_empty, at_least_one, checked
from layers.facts import Placement, examples
from layers.inside import expose, record
from layers.parameters import at_least_float32, dense, linear
from ssm import sequence as seq


class GLA(nn.Module):
    """Linear attention in which every key channel forgets at a rate of its own:

        q, k, v, r = W x, q / sqrt(K)
        g          = log sigmoid(W_2 W_1 x + b) / normaliser  [heads, K]
        S[t]       = diag(exp(g[t])) S[t-1] + k[t] v[t]^T     [heads, K, V]
        y          = W_out (RMSNorm(S[t]^T q[t]) silu(r))

    Elapsed time multiplies g.

    Attributes:
        features: H.
        heads: their number.
        expand_k, expand_v: all keys together have expand_k H channels, values
            expand_v H.
        rank: rank of the product W_2 W_1, the width between the two.
        normaliser: brings the initial decay near 1.
        dtype: of activations; decays and states are float32 or better.
    """

    PLACEMENT = Placement("none", 8 / 3)
    EXAMPLES = examples(dict(heads=3, rank=2))

    features: int
    heads: int = 4
    expand_k: float = 0.5
    expand_v: float = 1.0
    rank: int = 16
    normaliser: float = 16.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H], state [B, heads, K, V]. `ValueError` for a wrong
        shape, or widths that the heads do not divide."""
        del train
        sequence = checked(self, x, state, sequence)
        at_least_one(self, "rank")
        if self.normaliser <= 0:
            raise ValueError(f"normaliser: must be positive, got {self.normaliser}")
        x, sequence, restore = seq.compact(x, sequence)
        K, V = heads.sizes(self)
        q = heads.project(x, self.heads, K, "query", self.dtype) * K**-0.5
        k = heads.project(x, self.heads, K, "key", self.dtype)
        v = expose(self, "values", heads.project(x, self.heads, V, "value", self.dtype))
        gate = nn.silu(linear(self.heads * V, "gate", self.dtype)(x))
        low = linear(self.rank, "decay_in", self.dtype, ("embed", None))(x)
        g = dense(self.heads * K, "decay", at_least_float32(self.dtype), (None, "mlp"))(
            low
        )
        g = heads.split(nn.log_sigmoid(g) / self.normaliser, self.heads)
        g = seq.stretched(g, sequence)
        record(self, sequence, log_decay=g)
        o, S = chunked_scan(q, k, v, g, None, state, sequence.reset)
        o = expose(self, "mixed", o)
        y = heads.gated_output(o, gate, self.features, self.dtype)
        return restore(y).astype(self.dtype), S

    @nn.nowrap
    def init_state(self, batch_size: int) -> jax.Array:
        """Zeros [B, heads, K, V]."""
        return jnp.zeros(
            (batch_size, self.heads, *heads.sizes(self)), at_least_float32(self.dtype)
        )
