"""GRU, the recurrent baseline (https://arxiv.org/abs/1406.1078)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.checks import also_empty, checked, refuse_dt
from layers.facts import NONLINEAR
from layers.parameters import at_least_float32, dense, logical
from ssm import sequence as seq


def _orthogonal_per_gate(key, shape, dtype=jnp.float32):
    """[H, 3 H]: three orthogonal matrices side by side."""
    one = nn.initializers.orthogonal()
    H = shape[0]
    gates = [one(k, (H, H), dtype) for k in jax.random.split(key, 3)]
    return jnp.concatenate(gates, axis=1)


class GRU(nn.Module):
    """Gated recurrent unit, sequential in every mode:

        r, z = sigmoid(W_r u + U_r h), sigmoid(W_z u + U_z h)
        c    = tanh(W_c u + r (U_c h + b))
        h[t] = (1 - z) c + z h[t-1],   y = h

    Elapsed times have no meaning for it: `dt` is a `ValueError`.

    Attributes:
        features: H, of the input, the state and the output.
        dtype: of the output; the recurrence is float32 or better.
    """

    REFUSES = ("dt",)
    SEQUENTIAL = NONLINEAR

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
        state = self.init_state(x.shape[0]) if state is None else state
        H = self.features
        U = self.param(
            "recurrent_kernel",
            logical(_orthogonal_per_gate, "embed", "mlp"),
            (H, 3 * H),
        )
        bias = self.param(
            "recurrent_bias", logical(nn.initializers.zeros_init(), "mlp"), (H,)
        )
        u = seq.zero_masked(x.astype(at_least_float32(self.dtype)), sequence)
        gates = dense(3 * H, "input", at_least_float32(self.dtype))(u)

        def step(h, gate):
            (r, z, c), (hr, hz, hc) = jnp.split(gate, 3, -1), jnp.split(h @ U, 3, -1)
            r, z = nn.sigmoid(r + hr), nn.sigmoid(z + hz)
            return (1 - z) * jnp.tanh(c + r * (hc + bias)) + z * h

        y, state = seq.loop(step, state, gates, sequence, (U, bias))
        return y.astype(self.dtype), state

    @nn.nowrap
    def init_state(self, batch_size: int) -> jax.Array:
        """Zeros [B, H]."""
        return jnp.zeros((batch_size, self.features), at_least_float32(self.dtype))
