"""Hyena, long convolutions between gates (https://arxiv.org/abs/2302.10866)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.checks import also_empty, at_least_one
from layers.convolutions import checked_filters, implicit_filter, long_conv
from layers.diagonal import computed_once
from layers.facts import L, Placement, examples
from layers.inside import expose
from layers.parameters import dense, logical, zeros
from layers.short_conv import ShortConv
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
        features: H; conv_width: W.
        length: of the longest call; the number of taps, over which positions run.
        order: O, at least 2; O - 1 long convolutions.
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
    EXAMPLES = examples(dict(length=2 * L, order=3, hidden=8))

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
        sequence = checked_filters(self, x, state, sequence)
        H, order = self.features, self.order
        tail, past = (None, None) if state is None else state
        x, sequence, restore = seq.compact(x, sequence)
        p = dense((order + 1) * H, "in", self.dtype)(x)
        conv = ShortConv(p.shape[-1], self.conv_width, dtype=self.dtype, name="conv")
        p, tail = conv(p, tail, sequence)
        *gates, v = jnp.split(p, order + 1, -1)
        v = expose(self, "values", v)
        normal = logical(nn.initializers.normal(1.0), None, "embed")
        D = self.param("D", normal, (order - 1, H))
        k = computed_once(self, "taps", lambda: implicit_filter(self, H * (order - 1)))
        # Feature by feature, so that every convolution has slow and fast windows.
        k = k.reshape(H, order - 1, self.length).swapaxes(0, 1)
        windows = []
        for i in reversed(range(order - 1)):
            before = None if past is None else past[:, i]
            v, window = long_conv(gates[i + 1] * v, k[i], before, sequence, D[i])
            windows.insert(0, window)
        v = expose(self, "mixed", gates[0] * v)
        y = dense(H, "out", self.dtype, ("mlp", "embed"))(v)
        return restore(y), HyenaState(tail, jnp.stack(windows, 1))

    @nn.nowrap
    def init_state(self, batch_size: int) -> HyenaState:
        """Zeros."""
        self._check()
        H = self.features
        tail = batch_size, self.conv_width - 1, (self.order + 1) * H
        past = batch_size, self.order - 1, self.length - 1, H
        return HyenaState(*zeros(self, tail, past))

    @nn.nowrap
    def _check(self):
        at_least_one(self, "length", "conv_width")
        if self.order < 2:
            raise ValueError(f"order: must be at least 2, got {self.order}")
