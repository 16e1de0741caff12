"""ConvLSTM, the recurrent baseline whose states are images
(https://arxiv.org/abs/1506.04214)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.checks import also_empty, at_least_one, checked_frames, refuse_dt
from layers.facts import NONLINEAR, Placement
from layers.frames import images
from layers.parameters import at_least_float32, logical
from ssm import conv_ssm
from ssm import sequence as seq


class ConvLSTMState(NamedTuple):
    """Both [B, h, w, U]."""

    h: jax.Array
    c: jax.Array


class ConvLSTM(nn.Module):
    """The LSTM with convolutions over the frame in place of products, sequential in
    every mode:

        i, f, o = sigmoid(W * u + R * h[t-1] + b), g = tanh(W * u + R * h[t-1] + b)
        c[t]    = f c[t-1] + i g
        h[t]    = o tanh(c[t]),   y = h

    without connections from c to the gates. W * u is taken of all frames at once.
    Elapsed times have no meaning for it: `dt` is a `ValueError`.

    Attributes:
        features: U, channels of the input, the states and the output.
        size: (h, w) of the frames, of which `init_state` makes states.
        kernel_size: side of W and R.
        dtype: of the output; the recurrence is float32 or better.
    """

    REFUSES = ("dt",)
    SEQUENTIAL = NONLINEAR
    PLACEMENT = Placement("none", 0.0)

    features: int
    size: tuple[int, int]
    kernel_size: int = 3
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, h, w, U] -> y of that shape, `ConvLSTMState`. `ValueError` for a
        wrong shape or a dt."""
        del train
        sequence = checked_frames(self, x, state, sequence)
        at_least_one(self, "kernel_size")
        refuse_dt(self, sequence)
        state = self.init_state(x.shape[0]) if state is None else state
        U, k, dtype = self.features, self.kernel_size, at_least_float32(self.dtype)
        project = images.conv(4 * U, "input", dtype, k)
        init = logical(nn.initializers.orthogonal(), None, None, "embed", "mlp")
        R = self.param("recurrent_kernel", init, (k, k, U, 4 * U)).astype(dtype)
        # A fresh cell remembers.
        open_ = jnp.zeros((4 * U,), dtype).at[U : 2 * U].set(1)
        gates = project(seq.zero_masked(x.astype(dtype), sequence)) + open_

        def step(state, gate):
            i, f, g, o = jnp.split(gate + conv_ssm.convolve(state.h, R), 4, -1)
            c = nn.sigmoid(f) * state.c + nn.sigmoid(i) * jnp.tanh(g)
            return ConvLSTMState(nn.sigmoid(o) * jnp.tanh(c), c)

        y, state = seq.loop(step, state, gates, sequence, R, lambda state: state.h)
        return y.astype(self.dtype), state

    @nn.nowrap
    def init_state(self, batch_size: int) -> ConvLSTMState:
        """Zeros."""
        shape = (batch_size, *self.size, self.features)
        return ConvLSTMState(
            *(jnp.zeros(shape, at_least_float32(self.dtype)) for _ in range(2))
        )
