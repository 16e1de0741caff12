"""LongConv, long convolutions with free, regularised filters
(https://arxiv.org/abs/2302.06646)."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers import checks, convolutions, parameters
from layers.diagonal import computed_once
from layers.facts import S4_BLOCK, L, examples
from layers.parameters import logical
from ssm import implicit_filters


class LongConv(nn.Module):
    """A convolution of every feature with a filter that is learned tap by tap:

        y[t] = sum_{j < length} k[j] u[t-j] + D u[t]
        k    = dropout(squash(smooth(filter))), each where it is asked for

    Squashing moves every tap towards 0 by a threshold and stops there. A tap below it
    is 0 and has no gradient, so a threshold far above the initial taps is refused: the
    layer could never learn.

    Attributes:
        features: H.
        length: of the longest call; the number of taps.
        start: how taps start, a key of `ssm.implicit_filters.SCALES`.
        squash: the threshold, 0 for none; near the standard deviation of the start.
        smooth: how many neighbours are averaged, odd; 0 for none.
        smooth_domain: whose neighbours, a key of `ssm.implicit_filters.SMOOTHERS`.
        filter_dropout: rate at which taps are dropped in training.
        bidirectional: adds sum_j k'[j] u[t+1+j], a second filter over the future; then
            there is no state.
        dtype: of activations; filters and states are float32 or better.
    """

    REFUSES = ("dt",)
    PLACEMENT = S4_BLOCK
    EXAMPLES = examples(
        dict(length=2 * L),
        smooth=dict(
            length=L + 4,
            start="double_exp",
            squash=0.01,
            smooth=3,
            smooth_domain="frequency",
        ),
        bidirectional=dict(length=2 * L, bidirectional=True),
    )

    features: int
    length: int
    start: str = "random"
    squash: float = 0.0
    smooth: int = 0
    smooth_domain: str = "time"
    filter_dropout: float = 0.0
    bidirectional: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @checks.also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H] and the last inputs [B, length-1, H] (None if
        bidirectional).

        Needs the rng "dropout" in train mode with a filter_dropout. `ValueError` for a
        wrong shape, a call longer than `length`, a dt, or a state given to a
        bidirectional layer.
        """
        sequence = convolutions.checked_filters(self, x, state, sequence)
        k, D = self._filters(train), parameters.skip(self)
        return convolutions.filtered(self, x, k, D, state, sequence)

    @nn.nowrap
    def init_state(self, batch_size: int) -> jax.Array:
        """Zeros [B, length-1, H]."""
        return convolutions.zero_past(self, batch_size)

    def _filters(self, train):
        """Taps [1 or 2, H, length], of the past and the future."""
        self._check()
        shape = 1 + self.bidirectional, self.features, self.length
        start = functools.partial(implicit_filters.free, start=self.start)
        taps = self.param("filter", logical(start, None, "embed", None), shape)
        k = computed_once(self, "taps", lambda: self._regularised(taps))
        return nn.Dropout(self.filter_dropout)(k, deterministic=not train)

    def _regularised(self, k):
        if self.smooth:
            k = implicit_filters.SMOOTHERS[self.smooth_domain](k, self.smooth)
        return implicit_filters.squash(k, self.squash) if self.squash else k

    def _check(self):
        checks.one_of(self, start=implicit_filters.SCALES)
        checks.one_of(self, smooth_domain=implicit_filters.SMOOTHERS)
        if self.smooth < 0 or (self.smooth and self.smooth % 2 == 0):
            raise ValueError(f"smooth: must be odd, or 0 for none, got {self.smooth}")
        if not 0 <= self.filter_dropout < 1:
            raise ValueError(
                f"filter_dropout: must be in [0, 1), got {self.filter_dropout}"
            )
        limit = 2 * implicit_filters.SCALES[self.start]
        if self.smooth and self.smooth_domain == "time":
            limit /= math.sqrt(self.smooth)  # as averages shrink
        if not 0 <= self.squash <= limit:
            raise ValueError(
                f"squash: must be from 0 to {limit:.2g}, twice the standard deviation "
                f"of the initial taps (beyond it almost every tap starts, and stays, "
                f"at 0), got {self.squash}"
            )
