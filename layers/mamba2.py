"""Mamba-2, state-space duality (https://arxiv.org/abs/2405.21060)."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import chunked_scan
from layers.checks import also_empty, at_least_one, checked
from layers.facts import Examples, Placement
from layers.inside import expose, record
from layers.parameters import at_least_float32, linear, logical
from layers.short_conv import ShortConv
from ssm import sequence as seq
from ssm import spectra


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

    A = -exp(A_log) is one number per head, initially -1 to -16. B and C are shared by
    the heads of a group, and the norm is taken within one. Elapsed time multiplies
    Delta.

    Attributes:
        features: H.
        state_size: N.
        head_size: P, which divides E; 0 for the largest up to 64 that does, with heads
            for whole groups.
        groups: G, which divides the number of heads, E / P.
        expand: E = expand H.
        conv_width: W.
        dt_min, dt_max: range of the initial Delta (log-uniform); dt_floor: its least.
        dt_limit: Delta is clipped to this range, in every mode.
        dtype: of activations, the projection to d among them; Delta, A and states are
            float32 or better.
    """

    PLACEMENT = Placement("none", 0.0, norm_epsilon=1e-5)
    EXAMPLES = Examples({"": dict(state_size=4, head_size=3, groups=2)})

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
        z, u, d = jnp.split(
            linear(2 * E + 2 * GN + heads, "in", self.dtype)(x), [E, 2 * E + 2 * GN], -1
        )
        conv = ShortConv(E + 2 * GN, self.conv_width, dtype=self.dtype, name="conv")
        u, tail = conv(u, tail, sequence)
        u, B, C = jnp.split(nn.silu(u), [E, E + GN], -1)
        Delta, A, D = self._step(d, sequence)
        log_decay = Delta * A
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
    def init_state(self, batch_size):
        """Zeros."""
        E, heads, P, GN = self._sizes()
        tail = batch_size, self.conv_width - 1, E + 2 * GN
        S = batch_size, heads, self.state_size, P
        return Mamba2State(
            *(jnp.zeros(s, at_least_float32(self.dtype)) for s in (tail, S))
        )

    @nn.nowrap
    def _sizes(self):
        """E, the number of heads, P, G N."""
        at_least_one(self, "state_size", "groups", "expand", "conv_width")
        if len(self.dt_limit) != 2 or not 0 <= self.dt_limit[0] <= self.dt_limit[1]:
            raise ValueError(
                f"dt_limit: must be two numbers, 0 <= least <= largest, got "
                f"{self.dt_limit}"
            )
        E = self.expand * self.features
        whole = [p for p in range(1, 65) if E % p == 0 and E // p % self.groups == 0]
        P = self.head_size or max(whole, default=1)
        if P < 1 or E % P:
            raise ValueError(
                f"head_size: must divide expand x features = {E}, got {self.head_size}"
            )
        if E // P % self.groups:
            raise ValueError(
                f"groups: must divide the number of heads {E // P}, got {self.groups}"
            )
        return E, E // P, P, self.groups * self.state_size

    def _step(self, d, sequence):
        """Delta [B, L, heads], 0 on masked tokens, A and D [heads]."""
        heads = d.shape[-1]
        start = functools.partial(
            spectra.softplus_dt,
            dt_min=self.dt_min,
            dt_max=self.dt_max,
            floor=self.dt_floor,
        )

        def rates(key, shape, dtype=jnp.float32):
            return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))

        bias = self.param("dt_bias", logical(start, "heads"), (heads,))
        A_log = self.param("A_log", logical(rates, "heads"), (heads,))
        D = self.param("D", logical(nn.initializers.ones, "heads"), (heads,))
        Delta = jnp.clip(nn.softplus(d.astype(bias.dtype) + bias), *self.dt_limit)
        elapsed = seq.elapsed(sequence)
        Delta = Delta if elapsed is None else Delta * elapsed[..., None]
        return Delta, -jnp.exp(A_log), D
