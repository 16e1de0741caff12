"""DeltaNet, linear attention that corrects itself (https://arxiv.org/abs/2406.06484)."""

import flax.linen as nn
import jax.numpy as jnp

from kernels import chunked_scan
from layers import heads
from layers.checks import also_empty, checked, refuse_dt
from layers.delta_rule import (
    DeltaState,
    short_convolutions,
    write_strength,
    zero_delta_state,
)
from layers.facts import Placement, examples
from layers.inside import expose
from ssm import sequence as seq


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
    EXAMPLES = examples(dict(heads=2))

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
        refuse_dt(self, sequence)
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
    def init_state(self, batch_size: int) -> DeltaState:
        """Zeros."""
        return zero_delta_state(self, batch_size)
