"""LSTM, the gated recurrent baseline with a cell
(https://www.bioinf.jku.at/publications/older/2604.pdf)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.checks import also_empty, checked, refuse_dt
from layers.facts import NONLINEAR
from layers.parameters import at_least_float32, dense, logical
from ssm import sequence as seq


class LSTMState(NamedTuple):
    """Both [B, H]."""

    h: jax.Array
    c: jax.Array


def _open_forget_gate(key, shape, dtype=jnp.float32):
    """Biases of i, f, g, o: 1 for f, so that a fresh cell remembers, else 0."""
    del key
    H = shape[0] // 4
    return jnp.zeros(shape, dtype).at[H : 2 * H].set(1)


class LSTM(nn.Module):
    """Long short-term memory, sequential in every mode:

        i, f, o = sigmoid(W u + U h[t-1] + b), g = tanh(W u + U h[t-1] + b)
        c[t]    = f c[t-1] + i g
        h[t]    = o tanh(c[t]),   y = h

    Elapsed times have no meaning for it: `dt` is a `ValueError`.

    Attributes:
        features: H, of the input, the states and the output.
        dtype: of the output; the recurrence is float32 or better.
    """

    REFUSES = ("dt",)
    SEQUENTIAL = NONLINEAR

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H], `LSTMState`. `ValueError` for a wrong shape or a
        dt."""
        del train
        sequence = checked(self, x, state, sequence)
        refuse_dt(self, sequence)
        state = self.init_state(x.shape[0]) if state is None else state
        H, dtype = self.features, at_least_float32(self.dtype)
        U = self.param(
            "recurrent_kernel",
            logical(nn.initializers.orthogonal(), "embed", "mlp"),
            (H, 4 * H),
        )
        project = dense(4 * H, "input", dtype, bias_init=_open_forget_gate)
        gates = project(seq.zero_masked(x.astype(dtype), sequence))

        def step(state, gate):
            i, f, g, o = jnp.split(gate + state.h @ U, 4, -1)
            c = nn.sigmoid(f) * state.c + nn.sigmoid(i) * jnp.tanh(g)
            return LSTMState(nn.sigmoid(o) * jnp.tanh(c), c)

        y, state = seq.loop(step, state, gates, sequence, U, lambda state: state.h)
        return y.astype(self.dtype), state

    @nn.nowrap
    def init_state(self, batch_size: int) -> LSTMState:
        """Zeros."""
        shape = batch_size, self.features
        return LSTMState(
            *(jnp.zeros(shape, at_least_float32(self.dtype)) for _ in range(2))
        )
