"""Hyena, long convolutions between gates (https://arxiv.org/abs/2302.10866)."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.checks import also_empty, at_least_one, checked, refuse_dt, within_length
from layers.convolutions import long_conv
from layers.diagonal import computed_once
from layers.facts import Examples, L, Placement
from layers.inside import expose
from layers.parameters import at_least_float32, dense, logical, uniform
from layers.short_conv import ShortConv
from ssm import implicit_filters
from ssm import sequence as seq


class HyenaState(NamedTuple):
    """What the past leaves behind: the last inputs of every convolution."""

    conv: jax.Array  # [B, W-1, (order+1) H] of the short one
    past: jax.Array  # [B, order-1, length-1, H] of the long ones


class Hyena(nn.Module):
    """A recurrence in depth of gates and long convolutions, O = order:

        x_0, ..., x_(O-1), v = short convolution of W_in x + b_in      [B, L, H] each
        v = k_i * (x_i v) + D_i x_i v          i = O-1, ..., 1
        y = W_out (x_0 v) + b_out

    The filters are implicit, functions of the lag j that a small network of sines
    computes, under a window that makes them fade:

        k[j] = window[j] W_n sin(w (... sin(w (W_0 positions[j] + b_0))))

    with positions and window from `ssm.implicit_filters`. There is no state smaller
    than the last inputs of each convolution.

    Attributes:
        features: H.
        length: of the longest call; the number of taps, over which positions run.
        order: O, at least 2; O - 1 long convolutions.
        conv_width: W.
        hidden: width of the network; inner: its hidden layers after the first.
        bands: sines and cosines among the positions.
        frequency: the initial w, one per hidden unit.
        fast, slow: share of the length after which the window has fallen to `target`,
            in the last and the first feature.
        target: see there; shift: added to the window.
        dtype: of activations; filters and states are float32 or better.
    """

    REFUSES = ("dt",)
    PLACEMENT = Placement("none", 4.0, norm_epsilon=1e-5)
    EXAMPLES = Examples({"": dict(length=2 * L, order=3, hidden=8)})

    features: int
    length: int
    order: int = 2
    conv_width: int = 3
    hidden: int = 64
    inner: int = 2
    bands: int = 1
    frequency: float = 1.0
    fast: float = 0.3
    slow: float = 1.5
    target: float = 0.01
    shift: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H], `HyenaState`. `ValueError` for a wrong shape, a
        call longer than `length`, or a dt."""
        del train
        self._check()
        sequence = checked(self, x, state, sequence)
        refuse_dt(self, sequence)
        within_length(self, x)
        H, order = self.features, self.order
        tail, past = (None, None) if state is None else state
        x, sequence, restore = seq.compact(x, sequence)
        p = dense((order + 1) * H, "in", self.dtype)(x)
        conv = ShortConv(p.shape[-1], self.conv_width, dtype=self.dtype, name="conv")
        p, tail = conv(p, tail, sequence)
        *gates, v = jnp.split(p, order + 1, -1)
        v = expose(self, "values", v)
        k, D = self._filters()
        windows = []
        for i in reversed(range(order - 1)):
            before = None if past is None else past[:, i]
            v, window = long_conv(gates[i + 1] * v, k[i], before, sequence, D[i])
            windows.insert(0, window)
        v = expose(self, "mixed", gates[0] * v)
        y = dense(H, "out", self.dtype, ("mlp", "embed"))(v)
        return restore(y), HyenaState(tail, jnp.stack(windows, 1))

    @nn.nowrap
    def init_state(self, batch_size):
        """Zeros."""
        self._check()
        H, dtype = self.features, at_least_float32(self.dtype)
        tail = batch_size, self.conv_width - 1, (self.order + 1) * H
        past = batch_size, self.order - 1, self.length - 1, H
        return HyenaState(jnp.zeros(tail, dtype), jnp.zeros(past, dtype))

    def _filters(self):
        """Taps [order-1, H, length] and D [order-1, H]."""
        H, convolutions = self.features, self.order - 1
        normal = nn.initializers.normal(1.0)
        D = self.param("D", logical(normal, None, "embed"), (convolutions, H))
        k = computed_once(self, "taps", lambda: self._implicit(H * convolutions))
        # Feature by feature, so that every convolution has slow and fast windows.
        return k.reshape(H, convolutions, self.length).swapaxes(0, 1), D

    def _implicit(self, filters):
        """Taps [filters, length]."""
        dtype = at_least_float32(self.dtype)
        kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        ones = nn.initializers.constant(self.frequency)
        w = self.param("frequency", logical(ones, "mlp"), (self.hidden,))
        h = implicit_filters.positions(self.length, self.bands, dtype)
        for i in range(1 + self.inner):
            bias = functools.partial(uniform, bound=h.shape[-1] ** -0.5)
            layer = dense(
                self.hidden, f"filter_{i}", dtype, (None, "mlp"), bias, kernel
            )
            h = jnp.sin(w * layer(h))
        k = dense(filters, "filter", dtype, ("mlp", "embed"), None, kernel)(h).T
        return k * implicit_filters.exponential_window(
            self.length,
            filters,
            self.fast,
            self.slow,
            self.target,
            self.shift,
            dtype,
        )

    @nn.nowrap
    def _check(self):
        at_least_one(self, "length", "conv_width", "hidden", "bands")
        if self.order < 2:
            raise ValueError(f"order: must be at least 2, got {self.order}")
        if self.inner < 0:
            raise ValueError(f"inner: must be at least 0, got {self.inner}")
        for name in ("fast", "slow"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: must be positive, got {getattr(self, name)}")
        if not 0 < self.target < 1:
            raise ValueError(f"target: must be between 0 and 1, got {self.target}")
