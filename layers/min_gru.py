"""minGRU, a GRU whose gates do not see the state (https://arxiv.org/abs/2410.01201)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import linear_scan
from layers.checks import also_empty, checked, refuse_dt
from layers.facts import Placement, examples
from layers.inside import expose, record
from layers.parameters import at_least_float32, dense, zeros
from ssm import sequence as seq


class MinGRU(nn.Module):
    """The gated recurrent unit without the state in its gates, so that it is a scan:

        z[t] = sigmoid(W_z x[t] + b_z)                        [B, L, H]
        c[t] = W_c x[t] + b_c
        h[t] = (1 - z[t]) h[t-1] + z[t] c[t],   y = h

    The candidate c is linear: its other form in the paper, g(c) with g > 0, is for a
    scan in logarithms, which is not needed here. Nor is there what the public code has
    around it by option: a convolution before it, a wider state with a projection behind
    it, an initial state that is learned. Elapsed times have no meaning for it: `dt` is
    a `ValueError`.

    Attributes:
        features: H, of the input, the state and the output.
        dtype: of activations; gates and states are float32 or better.
    """

    REFUSES = ("dt",)
    PLACEMENT = Placement("none", 2.0)
    EXAMPLES = examples({})

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H], state [B, H]. `ValueError` for a wrong shape or a
        dt."""
        del train
        sequence = checked(self, x, state, sequence)
        refuse_dt(self, sequence)
        x = seq.zero_masked(x, sequence)
        H, dtype = self.features, at_least_float32(self.dtype)
        z = nn.sigmoid(dense(H, "gate", dtype)(x))
        record(self, sequence, gate=z)
        z = seq.zero_masked(z, sequence)  # a masked token leaves the state as it was
        c = expose(self, "values", dense(H, "candidate", self.dtype)(x))
        h, state = linear_scan(1 - z, z * c, state, sequence.reset)
        y = seq.zero_masked(expose(self, "mixed", h), sequence)
        return y.astype(self.dtype), state

    @nn.nowrap
    def init_state(self, batch_size: int) -> jax.Array:
        """Zeros [B, H]."""
        return zeros(self, (batch_size, self.features))[0]
