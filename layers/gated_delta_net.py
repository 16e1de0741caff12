"""Gated DeltaNet: the delta rule that also forgets (https://arxiv.org/abs/2412.06464)."""

import flax.linen as nn
import jax.numpy as jnp

from kernels import chunked_scan
from layers import heads
from layers.checks import also_empty, checked
from layers.delta_rule import (
    DeltaState,
    short_convolutions,
    write_strength,
    zero_delta_state,
)
from layers.facts import Placement, examples
from layers.inside import expose, record
from layers.parameters import at_least_float32, linear, logical, rates, softplus_dt
from ssm import sequence as seq


class GatedDeltaNet(nn.Module):
    """DeltaNet with a scalar decay per head, as in Mamba-2, and an output gate:

        q, k, v, beta as in DeltaNet
        g    = -exp(A_log) softplus(W_a x + dt_bias)          [heads]
        S[t] = (I - beta k k^T) exp(g[t]) S[t-1] + beta k v^T [heads, K, V]
        y    = W_out (RMSNorm(S[t]^T q[t]) silu(W_r x))

    Elapsed time multiplies g.

    Attributes:
        features: H.
        heads: their number.
        expand_k, expand_v: all keys together have expand_k H channels, values
            expand_v H.
        conv_width: W.
        dt_min, dt_max: range of the initial softplus(dt_bias), log-uniform.
        dtype: of activations; gates and states are float32 or better.
    """

    PLACEMENT = Placement("none", 8 / 3)
    EXAMPLES = examples(dict(heads=2))

    features: int
    heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 2.0
    conv_width: int = 4
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H], `DeltaState`. `ValueError` for a wrong shape, or
        widths that the heads do not divide."""
        del train
        sequence = checked(self, x, state, sequence)
        x, sequence, restore = seq.compact(x, sequence)
        q, k, v, tails = short_convolutions(self, x, state, sequence)
        beta = write_strength(self, x, sequence)
        g = self._log_decay(x, sequence)
        gate = nn.silu(linear(v.shape[2] * v.shape[3], "gate", self.dtype)(x))
        S = None if state is None else state.S
        v = expose(self, "values", v)
        o, S = chunked_scan(q, k, v, g, beta, S, sequence.reset)
        o = expose(self, "mixed", o)
        y = heads.gated_output(o, gate, self.features, self.dtype)
        return restore(y).astype(self.dtype), DeltaState(*tails, S)

    @nn.nowrap
    def init_state(self, batch_size: int) -> DeltaState:
        """Zeros."""
        return zero_delta_state(self, batch_size)

    def _log_decay(self, x, sequence):
        """g [B, L, heads], 0 on masked tokens."""
        bias = self.param("dt_bias", logical(softplus_dt(self), "heads"), (self.heads,))
        A_log = self.param("A_log", logical(rates, "heads"), (self.heads,))
        dt = linear(self.heads, "dt", at_least_float32(self.dtype), ("embed", "heads"))(
            x
        )
        dt = seq.stretched(nn.softplus(dt + bias), sequence)
        g = -jnp.exp(A_log) * dt
        record(self, sequence, dt=dt, log_decay=g)
        return g
