"""SGConv, structured global convolutions (https://arxiv.org/abs/2210.09298)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels import fft_conv
from layers.checks import (
    also_empty,
    at_least_one,
    checked,
    no_initial_state,
    refuse_dt,
    within_length,
)
from layers.convolutions import long_conv, past_inputs
from layers.diagonal import computed_once
from layers.facts import S4_BLOCK, Examples, L
from layers.inside import expose
from layers.parameters import logical
from ssm import implicit_filters
from ssm import sequence as seq

DECAYS = ("fixed", "learned")


class SGConv(nn.Module):
    """A long convolution whose filter is made of S = O(log length) scales of d knots:

        y[t] = sum_{j < length} k[j] / Z u[t-j] + D u[t]
        k    = concat_i m^(S-1-i) upsample(filter_i, 2^max(0, i-1))        (fixed decay)
        k[j] = (j + 1)^-decay concat_i upsample(filter_i, ...)[j]        (learned decay)

    Z is the norm of k over all its d 2^(S-1) taps when the parameters are made, and
    stays what it was: it is kept in the collection "buffers".

    Attributes:
        features: H.
        length: of the longest call; the number of taps.
        knots: d, of each scale.
        layout: how scales are put together, a key of `ssm.implicit_filters.LAYOUTS`.
        decay: one of `DECAYS`.
        decay_min, decay_max: range of m over the features or, learned, of the initial
            exponent (uniform).
        bidirectional: adds a second filter over the future; then there is no state.
        dtype: of activations; filters and states are float32 or better.
    """

    REFUSES = ("dt",)
    PLACEMENT = S4_BLOCK
    EXAMPLES = Examples(
        {
            "": dict(length=2 * L, knots=4),
            "learned": dict(length=L + 4, knots=4, layout="sum", decay="learned"),
            "bidirectional": dict(length=2 * L, knots=4, bidirectional=True),
        }
    )

    features: int
    length: int
    knots: int = 64
    layout: str = "cat"
    decay: str = "fixed"
    decay_min: float = 2.0
    decay_max: float = 2.0
    bidirectional: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H] and the last inputs [B, length-1, H] (None if
        bidirectional).

        `ValueError` for a wrong shape, a call longer than `length`, a dt, or a state
        given to a bidirectional layer.
        """
        del train
        sequence = checked(self, x, state, sequence)
        refuse_dt(self, sequence)
        within_length(self, x)
        k = self._filters()
        normal = nn.initializers.normal(1.0)
        D = self.param("D", logical(normal, "embed"), (self.features,))
        u, sequence, restore = seq.compact(x.astype(self.dtype), sequence)
        u = expose(self, "values", u)
        if self.bidirectional:
            y, _ = fft_conv(u, k[0], None, sequence.reset, k_reverse=k[1], skip=D)
        else:
            y, state = long_conv(u, k[0], state, sequence, D)
        return restore(expose(self, "mixed", y)), state

    @nn.nowrap
    def init_state(self, batch_size):
        """Zeros [B, length-1, H]."""
        if self.bidirectional:
            raise no_initial_state("SGConv")
        at_least_one(self, "length")
        return past_inputs(batch_size, self.length, self.features, self.dtype)

    def _filters(self):
        """Taps [1 or 2, H, length], of the past and the future."""
        self._check()
        S = implicit_filters.scales(self.length, self.knots)
        w = self.param(
            "filter",
            logical(nn.initializers.normal(1.0), None, None, "embed", None),
            (S, 1 + self.bidirectional, self.features, self.knots),
        )
        exponent = self._exponent()

        def whole():
            return self._whole(w, exponent)

        Z = self.variable(
            "buffers",
            "norm",
            lambda: jnp.linalg.norm(whole(), axis=-1, keepdims=True),
        )
        return computed_once(
            self, "taps", lambda: whole()[..., : self.length] / Z.value
        )

    def _exponent(self):
        """The learned exponent [H] of the decay, or None."""
        if self.decay == "fixed":
            return None

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, self.decay_min, self.decay_max)

        return self.param("decay", logical(uniform, "embed"), (self.features,))

    def _whole(self, w, exponent):
        """All taps before the norm, [1 or 2, H, d 2^(S-1)]."""
        lay_out = implicit_filters.LAYOUTS[self.layout]
        if exponent is not None:
            k = lay_out(w, jnp.ones(self.features, w.dtype))
            return implicit_filters.power_decay(k, exponent)
        m = np.linspace(self.decay_min, self.decay_max, self.features)
        return lay_out(w, jnp.asarray(m, w.dtype))

    def _check(self):
        at_least_one(self, "knots")
        for name, valid in (
            ("layout", implicit_filters.LAYOUTS),
            ("decay", DECAYS),
        ):
            value = getattr(self, name)
            if value not in valid:
                raise ValueError(f"{name}: unknown {value!r}; may be {sorted(valid)}")
        if not 0 < self.decay_min <= self.decay_max:
            raise ValueError(
                "decay_min, decay_max: need 0 < decay_min <= decay_max, got "
                f"{self.decay_min}, {self.decay_max}"
            )
