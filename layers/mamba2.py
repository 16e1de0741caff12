"""Mamba-2, state-space duality (https://arxiv.org/abs/2405.21060)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import chunked_scan
from layers.checks import also_empty, at_least_one, checked, divides, interval
from layers.facts import Placement, examples
from layers.inside import expose, record
from layers.parameters import linear, logical, rates, softplus_dt, zeros
from layers.short_conv import ShortConv
from ssm import sequence as seq


class Mamba2State(NamedTuple):
    """What the past leaves behind."""

    conv: jax.Array  # [B, W-1, E + 2 G N] the last inputs of the short convolution
    ssm: jax.Array  # [B, heads, N, P]


class Mamba2(nn.Module):
    """Mamba with one scalar decay per head, so that everything is a matmul:

        z, u, B, C, d = W_in x                                E, E, G N, G N, heads wide
        u, B, C       = silu(short convolution of [u, B, C])
        Delta         = clip(softplus(d + dt_bias))           [B, L, heads]
        S[t]          = exp(Delta[t] A) S[t-1] + B[t] (Delta[t] u[t])^T    [N, P]
        y[t]          = W_out RMSNorm((S[t]^T C[t] + D u[t]) silu(z[t]))

    A = -exp(A_log) is one number per head, initially -1 to -16. The heads of a group
    share B, C and the norm. Elapsed time multiplies Delta.

    Attributes:
        features: H; state_size: N.
        head_size: P, which divides E; 0 for the largest to 64 that fits the groups.
        groups: G, which divides the number of heads, E / P.
        expand: E = expand H; conv_width: W.
        dt_min, dt_max: range of the initial Delta (log-uniform); dt_floor: its least.
        dt_limit: Delta is clipped to this range, in every mode.
        dtype: of activations and d; Delta, A and states are float32 or better.
    """

    PLACEMENT = Placement("none", 0.0, norm_epsilon=1e-5)
    EXAMPLES = examples(dict(state_size=4, head_size=3, groups=2))

    features: int
    state_size: int = 64
    head_size: int = 0
    groups: int = 1
    expand: int = 2
    conv_width: int = 4
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H], `Mamba2State`. `ValueError` for a wrong shape, or
        heads and groups that do not divide."""
        del train
        sequence = checked(self, x, state, sequence)
        tail, S = (None, None) if state is None else state
        x, sequence, restore = seq.compact(x, sequence)
        E, heads, _, GN = self._sizes()
        ends = [E, 2 * E + 2 * GN]
        z, u, d = jnp.split(linear(ends[1] + heads, "in", self.dtype)(x), ends, -1)
        conv = ShortConv(E + 2 * GN, self.conv_width, dtype=self.dtype, name="conv")
        u, tail = conv(u, tail, sequence)
        u, B, C = jnp.split(nn.silu(u), [E, E + GN], -1)
        start = logical(softplus_dt(self, self.dt_floor), "heads")
        bias = self.param("dt_bias", start, (heads,))
        A_log = self.param("A_log", logical(rates, "heads"), (heads,))
        D = self.param("D", logical(nn.initializers.ones, "heads"), (heads,))
        Delta = jnp.clip(nn.softplus(d.astype(bias.dtype) + bias), *self.dt_limit)
        Delta = seq.stretched(Delta, sequence)
        log_decay = Delta * -jnp.exp(A_log)
        record(self, sequence, dt=Delta, log_decay=log_decay)
        per_head, per_group = (*x.shape[:2], heads, -1), (*x.shape[:2], self.groups, -1)
        u = expose(self, "values", u.reshape(per_head))
        B, C = B.reshape(per_group), C.reshape(per_group)
        v = (Delta[..., None] * u).astype(self.dtype)
        y, S = chunked_scan(C, B, v, log_decay, None, S, sequence.reset)
        y = expose(self, "mixed", y + D[:, None] * u)
        y = y.reshape(z.shape) * nn.silu(z.astype(y.dtype))
        norm = nn.RMSNorm(epsilon=1e-5, feature_axes=(-2, -1), name="norm")
        y = norm(y.reshape(per_group)).reshape(z.shape)
        y = linear(self.features, "out", self.dtype, ("mlp", "embed"))(y)
        return restore(y).astype(self.dtype), Mamba2State(tail, S)

    @nn.nowrap
    def init_state(self, batch_size: int) -> Mamba2State:
        """Zeros."""
        E, heads, P, GN = self._sizes()
        tail = batch_size, self.conv_width - 1, E + 2 * GN
        return Mamba2State(*zeros(self, tail, (batch_size, heads, self.state_size, P)))

    @nn.nowrap
    def _sizes(self):
        """E, the number of heads, P, G N."""
        at_least_one(self, "state_size", "groups", "expand", "conv_width")
        interval(self, "dt_limit")
        E = self.expand * self.features
        sizes = [p for p in range(1, 65) if E % p == 0 and E // p % self.groups == 0]
        P = self.head_size or max(sizes, default=1)
        if self.head_size:
            divides(self, "head_size", "expand x features", E)
        divides(self, "groups", "the number of heads", E // P)
        return E, E // P, P, self.groups * self.state_size
