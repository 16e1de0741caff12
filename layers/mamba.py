"""Mamba, the selective state-space model S6 (https://arxiv.org/abs/2312.00752)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels import selective_scan
from layers import parameters
from layers.checks import also_empty, at_least_one, at_least_zero, checked
from layers.facts import Placement, examples
from layers.inside import expose, record
from layers.parameters import constant, dense, linear, logical
from layers.short_conv import ShortConv
from ssm import sequence as seq

# What the backward pass gets of `Mamba._mix`: the output and states of the scan.
KEPT = jax.checkpoint_policies.save_only_these_names("selective_scan")


class MambaState(NamedTuple):
    """What the past leaves behind."""

    conv: jax.Array  # [B, W-1, E] the last inputs of the short convolution
    ssm: jax.Array  # [B, E, N]


class Mamba(nn.Module):
    """Systems whose step, input and output weights depend on the input:

        u, z    = W_in x                                      [B, L, E] each
        u       = silu(short convolution of u)
        d, B, C = W_select u                                  R, N and N wide
        Delta   = softplus(W_dt d + b_dt)                     [B, L, E]
        h[t]    = exp(Delta[t] A) h[t-1] + Delta[t] u[t] B[t] [B, E, N]
        y[t]    = W_out ((C[t] h[t] + D u[t]) silu(z[t]))

    A = -exp(A_log) starts at -1, ..., -N. Elapsed time multiplies Delta.

    Attributes:
        features: H; state_size: N of every inner feature.
        expand: E = expand H; conv_width: W.
        rank: R; 0 for H / 16, rounded up.
        dt_min, dt_max: range of the initial Delta (log-uniform); dt_floor: its least.
        dtype: of activations; Delta, A and states are float32 or better.
    """

    PLACEMENT = Placement("none", 0.0, norm_epsilon=1e-5)
    EXAMPLES = examples(dict(state_size=4))

    features: int
    state_size: int = 16
    expand: int = 2
    conv_width: int = 4
    rank: int = 0
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H], `MambaState`. `ValueError` for a wrong shape."""
        del train
        sequence = checked(self, x, state, sequence)
        tail, h = (None, None) if state is None else state
        x, sequence, restore = seq.compact(x, sequence)
        # All but the scan is cheap to make again, and much larger than what is kept.
        mix = nn.remat(type(self)._mix, policy=KEPT)
        y, tail, h = mix(self, x, tail, h, sequence)
        return restore(y).astype(self.dtype), MambaState(tail, h)

    def _mix(self, x, tail, h, sequence):
        """The output, the last inputs of the convolution and the state."""
        E, N, R = self._sizes()
        u, z = jnp.split(linear(2 * E, "in", self.dtype)(x), 2, -1)
        conv = ShortConv(E, self.conv_width, dtype=self.dtype, name="conv")
        u, tail = conv(u, tail, sequence)
        u = seq.zero_masked(nn.silu(u), sequence)
        select = linear(R + 2 * N, "select", self.dtype, ("mlp", None))(u)
        low, B, C = jnp.split(select, [R, R + N], -1)
        start = parameters.softplus_dt(self, self.dt_floor)
        kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        dtype = parameters.at_least_float32(self.dtype)
        step = dense(E, "dt", dtype, (None, "mlp"), start, kernel)
        Delta = seq.stretched(nn.softplus(step(low)), sequence)
        spread = constant(np.log(np.arange(1, N + 1)))
        A = -jnp.exp(self.param("A_log", logical(spread, "mlp", "state"), (E, N)))
        D = self.param("D", logical(nn.initializers.ones, "mlp"), (E,))
        record(self, sequence, dt=Delta, log_decay=Delta * A.max(-1))
        u = expose(self, "values", u)
        y, h = self._scan(u, Delta, A, B, C, h, sequence.reset, D)
        y = expose(self, "mixed", y) * nn.silu(z)
        return linear(self.features, "out", self.dtype, ("mlp", "embed"))(y), tail, h

    @nn.nowrap
    def _scan(self, u, Delta, A, B, C, h, reset, D):
        return selective_scan(u, Delta, A, B, C, h, reset, skip=D)

    @nn.nowrap
    def init_state(self, batch_size: int) -> MambaState:
        """Zeros."""
        E, N, _ = self._sizes()
        tail = batch_size, self.conv_width - 1, E
        return MambaState(*parameters.zeros(self, tail, (batch_size, E, N)))

    @nn.nowrap
    def _sizes(self):
        at_least_one(self, "state_size", "expand", "conv_width")
        at_least_zero(self, "rank")
        R = self.rank or -(-self.features // 16)
        return self.expand * self.features, self.state_size, R
