"""Short causal convolutions, parts of gated mixers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import short_conv
from layers.convolutions import long_conv
from layers.parameters import at_least_float32, logical, skip, uniform
from ssm import sequence as seq


def _uniform(key, shape, dtype=jnp.float32):
    """U(-1, 1) / sqrt(W), the usual start of a depthwise convolution."""
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * shape[-1] ** -0.5


class ShortConv(nn.Module):
    """y[t, h] = bias[h] + sum_{j < W} kernel[h, j] u[t-j, h].

    Attributes:
        features: H.
        width: W.
        use_bias: adds bias.
        kernel_init: of the taps [H, W], lag 0 first.
        dtype: of the activations; the state is float32 or better.
    """

    features: int
    width: int = 4
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = _uniform
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, u, state, sequence):
        """u [B, L, H] with right padding only -> y [B, L, H] and the last W-1 inputs
        that exist [B, W-1, H]."""
        shape = self.features, self.width
        w = self.param("kernel", logical(self.kernel_init, "mlp", None), shape)
        bias = None
        if self.use_bias:
            zeros = logical(nn.initializers.zeros_init(), "mlp")
            bias = self.param("bias", zeros, (self.features,))
        if state is None:
            state = self.init_state(u.shape[0])
        y, _ = short_conv(u, w, bias, state, sequence.reset)
        return y, seq.window(state, u, sequence)

    @nn.nowrap
    def init_state(self, batch_size: int) -> jax.Array:
        """Zeros [B, W-1, H]."""
        tail = batch_size, self.width - 1, self.features
        return jnp.zeros(tail, at_least_float32(self.dtype))


class Shift(nn.Module):
    """The system whose state is its last d inputs, a filter of d taps with a skip:

        y[t] = sum_{j < d} kernel[j] u[t-j] + D u[t]

    Attributes:
        features: H.
        taps: d.
    """

    features: int
    taps: int

    @nn.compact
    def __call__(self, u, state, sequence):
        """u [B, L, H] with right padding only -> y and the last inputs [B, d-1, H]."""
        shape = self.features, self.taps
        start = functools.partial(uniform, bound=self.taps**-0.5)
        kernel = self.param("kernel", logical(start, "embed", None), shape)
        return long_conv(u, kernel, state, sequence, skip(self))
