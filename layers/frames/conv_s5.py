"""ConvS5, the diagonal model whose states are images
(https://arxiv.org/abs/2310.19694)."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.checks import also_empty, at_least_one, checked_frames, even, one_of
from layers.facts import Placement, examples
from layers.frames import images
from layers.parameters import (
    at_least_complex64,
    at_least_float32,
    constant,
    dense,
    log_dt,
    logical,
    skip,
)
from ssm import conv_ssm, discretize, spectra, stability
from ssm import sequence as seq


def linear(y: jax.Array, u: jax.Array, layer: nn.Module) -> jax.Array:
    """y + D * u, the linear system itself."""
    D = images.conv(
        layer.features,
        "D",
        at_least_float32(layer.dtype),
        layer.skip_kernel,
        bias=False,
    )
    return y + D(u)


def standard(y: jax.Array, u: jax.Array, layer: nn.Module) -> jax.Array:
    """gelu(norm(y + D * u)), the norm over groups of channels of a frame."""
    norm = images.group_norm(layer.features, "norm", layer.dtype)
    return nn.gelu(norm(linear(y, u, layer)))


def resnet(y: jax.Array, u: jax.Array, layer: nn.Module) -> jax.Array:
    """gelu(y + W2 * gelu(norm(W1 * gelu(norm(y))))), convolutions 3 x 3."""
    return nn.gelu(
        images.PreActivationBlock(layer.features, layer.dtype, name="residual")(y)
    )


def diag_resnet(y: jax.Array, u: jax.Array, layer: nn.Module) -> jax.Array:
    """`resnet` of y + D u, D a vector."""
    return resnet(y + skip(layer) * u, u, layer)


def half_glu(y: jax.Array, u: jax.Array, layer: nn.Module) -> jax.Array:
    """g * sigmoid(W g), g = gelu(norm(y)), the norm over the channels of a pixel."""
    g = nn.gelu(nn.LayerNorm(dtype=layer.dtype, name="norm")(y))
    return g * nn.sigmoid(dense(layer.features, "gate", layer.dtype)(g))


OUTPUTS = {
    "linear": linear,
    "standard": standard,
    "resnet": resnet,
    "diag_resnet": diag_resnet,
    "half_glu": half_glu,
}


class Readout(nn.Module):
    """f of `OUTPUTS` and its parameters."""

    features: int
    output: str
    skip_kernel: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, y, u):
        """y, u [B, L, h, w, U] -> that shape."""
        return OUTPUTS[self.output](y, u, self)


class ConvS5(nn.Module):
    """X[t] = a X[t-1] + gain (B * u[t]), y[t] = f(2 Re(C * X[t]), u[t]), where * is a
    convolution over the frame and a [P] is the same at every pixel.

    Lambda starts at the normal part of HiPPO-LegS, B and C in its eigenbasis; dt is one
    per state. Frames are read in parallel, `chunk` of them at a time.

    Attributes:
        features: U, channels of input and output.
        size: (h, w) of the frames, of which `init_state` makes states.
        state_size: N, the real state size per pixel; P = N / 2 are stored.
        blocks: J, number of HiPPO blocks.
        input_kernel, output_kernel: side of B and of C; skip_kernel: of D.
        output: f, a key of `OUTPUTS`.
        clip_eigs: keep Re Lambda <= -1e-4, for unbounded rollouts.
        dt_min, dt_max: range of the initial dt.
        chunk: frames whose states and outputs exist at once; the states between chunks
            are kept for the backward pass, all others and f are made again.
        dtype: of the output; parameters and states are float32 or better.
    """

    PLACEMENT = Placement("none", 0.0)
    EXAMPLES = examples(
        dict(state_size=8, blocks=2),
        linear=dict(state_size=8, output="linear", chunk=4),
        standard=dict(state_size=8, output="standard"),
        diag_resnet=dict(state_size=8, output="diag_resnet"),
        half_glu=dict(state_size=8, output="half_glu"),
    )

    features: int
    size: tuple[int, int]
    state_size: int = 64
    blocks: int = 1
    input_kernel: int = 3
    output_kernel: int = 3
    skip_kernel: int = 3
    output: str = "resnet"
    clip_eigs: bool = True
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    chunk: int = conv_ssm.CHUNK
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, h, w, U] -> y of that shape, state [B, h, w, P] complex.

        `ValueError` for a wrong shape or an unknown output.
        """
        del train
        sequence = checked_frames(self, x, state, sequence)
        at_least_one(self, "input_kernel", "output_kernel", "skip_kernel", "chunk")
        one_of(self, output=OUTPUTS)
        lam, dt, B, C = self._parameters()
        u = seq.zero_masked(x.astype(at_least_float32(self.dtype)), sequence)
        rule = functools.partial(discretize.zoh, lam, dt)
        elapsed, reset = seq.elapsed(sequence), sequence.reset
        y, state = conv_ssm.convolved(
            rule,
            B,
            C,
            u,
            state,
            elapsed,
            reset,
            readout=self._readout(u[:1, :1]),
            chunk=self.chunk,
        )
        return seq.zero_masked(y, sequence).astype(self.dtype), state

    def _readout(self, frame):
        """f as a function: one of arrays alone can be made again chunk by chunk."""
        module = Readout(
            self.features, self.output, self.skip_kernel, self.dtype, parent=None
        )

        def init(key):
            return module.init(key, frame, frame)["params"]

        def apply(params, y, u):
            return module.apply({"params": params}, y, u)

        return functools.partial(apply, self.param("readout", init))

    @nn.nowrap
    def init_state(self, batch_size: int) -> jax.Array:
        """Zeros [B, h, w, P] complex."""
        shape = (batch_size, *self.size, self.state_size // 2)
        return jnp.zeros(shape, at_least_complex64(self.dtype))

    def eigenvalues(self) -> jax.Array:
        """log a [P] complex per frame, one of each conjugate pair. By
        `layer.apply(variables, method="eigenvalues")`."""
        lam, dt, *_ = self._parameters()
        return discretize.zoh(lam, dt)[0]

    @nn.compact
    def _parameters(self):
        U, N = self.features, self.state_size
        even(self, "state_size")
        lam, V, V_inv = spectra.s5_blocks(N, self.blocks)
        P = len(lam)
        Lambda_re = self.param("Lambda_re", logical(constant(lam.real), "state"), (P,))
        Lambda_im = self.param("Lambda_im", logical(constant(lam.imag), "state"), (P,))
        axes = (None, None, "embed", "state", None)
        k, m = self.input_kernel, self.output_kernel
        B = self.param("B", logical(_b_init(V_inv), *axes), (k, k, U, P, 2))
        axes = (None, None, "state", "embed", None)
        C = self.param("C", logical(_c_init(V), *axes), (m, m, P, U, 2))
        log_step = log_dt(self, "log_step", "state", P)
        lam = jax.lax.complex(Lambda_re, Lambda_im)
        if self.clip_eigs:
            lam = stability.clip_real(lam)
        B, C = stability.from_pair(B), stability.from_pair(C)
        return lam, jnp.exp(log_step), B, 2.0 * C


def _b_init(V_inv):
    """B [k, k, U, P] = V^-1 times a real He-normal sample [N, k k U]."""

    def init(key, shape, dtype=jnp.float32):
        *patch, P, _ = shape
        fan_in = math.prod(patch)
        sample = nn.initializers.he_normal(-1, -2)(key, (V_inv.shape[1], fan_in), dtype)
        rotated = jnp.asarray(V_inv, jnp.complex64) @ sample
        return stability.to_pair(rotated.T.reshape(*patch, P)).astype(dtype)

    return init


def _c_init(V):
    """C [k, k, P, U] = a real He-normal sample [k k U, N] times V; its fan-in counts
    the k k N values that a pixel sums."""

    def init(key, shape, dtype=jnp.float32):
        k, _, P, U, _ = shape
        he = nn.initializers.variance_scaling(
            2 / k**2, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2
        )
        rotated = he(key, (k * k * U, V.shape[0]), dtype) @ jnp.asarray(
            V, jnp.complex64
        )
        rotated = rotated.reshape(k, k, U, P).swapaxes(2, 3)
        return stability.to_pair(rotated).astype(dtype)

    return init
