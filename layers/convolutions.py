"""Long convolutions with a state, which several layers share."""

import jax.numpy as jnp

from kernels import fft_conv
from layers.parameters import at_least_float32
from ssm import sequence as seq


def long_conv(u, k, state, sequence, skip=None):
    """y = k * u + skip u, and the last K-1 inputs that exist, the state [B, K-1, H].

    u [B, L, H] with right padding only, k [H, K], skip [H]; state None: no past.
    """
    y, _ = fft_conv(u, k, state, sequence.reset, skip=skip)
    if state is None:
        state = past_inputs(u.shape[0], k.shape[1], k.shape[0], u.dtype)
    return y, seq.window(state, u, sequence)


def past_inputs(batch_size, taps, features, dtype):
    """The state of `long_conv` before the first token, zeros [B, K-1, H]."""
    return jnp.zeros((batch_size, taps - 1, features), at_least_float32(dtype))
