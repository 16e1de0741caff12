"""Parts of the layers over frames [..., h, w, C]."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from layers.parameters import logical
from ssm import conv_ssm

GROUPS = 32  # of a norm over groups of channels, or as many as divide the channels


def from_bytes(frames: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """uint8 p as p / 127.5 - 1, in [-1, 1]; what is not uint8 stays as it is."""
    return frames.astype(dtype) / 127.5 - 1 if frames.dtype == jnp.uint8 else frames


def to_bytes(frames: jax.Array) -> np.ndarray:
    """The nearest uint8 to every value; NaN becomes 128."""
    pixels = np.nan_to_num(np.asarray(frames, np.float32))
    return np.rint(np.clip(127.5 * (pixels + 1), 0, 255)).astype(np.uint8)


class Convolution(nn.Module):
    """x * W + b, a cross-correlation with zeros outside the frame; the size stays, or
    is divided by `stride`. `axis` is the logical name of the features."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    bias: bool = True
    dtype: jnp.dtype = jnp.float32
    axis: str = "mlp"

    @nn.compact
    def __call__(self, x):
        """[..., h, w, C] -> [..., h / stride, w / stride, features]."""
        k = self.kernel_size
        init = logical(nn.initializers.he_normal(), None, None, "embed", self.axis)
        kernel = self.param("kernel", init, (k, k, x.shape[-1], self.features))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        y = conv_ssm.convolve(x, kernel, self.stride)
        if self.bias:
            init = logical(nn.initializers.zeros_init(), self.axis)
            y = y + self.param("bias", init, (self.features,)).astype(self.dtype)
        return y


def conv(
    features: int,
    name: str,
    dtype: jnp.dtype,
    kernel_size: int = 3,
    stride: int = 1,
    bias: bool = True,
    axis: str = "mlp",
) -> Convolution:
    """A `Convolution` called `name`."""
    return Convolution(features, kernel_size, stride, bias, dtype, axis, name=name)


def group_norm(features: int, name: str, dtype: jnp.dtype) -> nn.GroupNorm:
    """A norm over the pixels and each group of channels of a frame
    (https://arxiv.org/abs/1803.08494)."""
    groups = math.gcd(GROUPS, features)
    return nn.GroupNorm(groups, dtype=dtype, name=name, reduction_axes=(-3, -2, -1))


class PreActivationBlock(nn.Module):
    """x + W2 * gelu(norm(W1 * gelu(norm(x)))), convolutions 3 x 3; x is first projected
    where its channels are not `features` (https://arxiv.org/abs/1603.05027)."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[..., h, w, C] -> [..., h, w, features]."""
        y = x
        for i in (1, 2):
            y = nn.gelu(group_norm(y.shape[-1], f"norm_{i}", self.dtype)(y))
            y = conv(self.features, f"conv_{i}", self.dtype)(y)
        if x.shape[-1] != self.features:
            x = conv(self.features, "project", self.dtype, kernel_size=1)(x)
        return x.astype(self.dtype) + y


def doubled(x: jax.Array) -> jax.Array:
    """Every pixel four times: [..., h, w, C] -> [..., 2 h, 2 w, C]."""
    return jnp.repeat(jnp.repeat(x, 2, axis=-3), 2, axis=-2)
