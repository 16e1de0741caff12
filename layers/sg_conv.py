"""SGConv, structured global convolutions (https://arxiv.org/abs/2210.09298)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from layers import checks, convolutions, parameters
from layers.diagonal import computed_once
from layers.facts import S4_BLOCK, L, examples
from layers.parameters import logical
from ssm import implicit_filters

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
    EXAMPLES = examples(
        dict(length=2 * L, knots=4),
        learned=dict(length=L + 4, knots=4, layout="sum", decay="learned"),
        bidirectional=dict(length=2 * L, knots=4, bidirectional=True),
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
    @checks.also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H] and the last inputs [B, length-1, H] (None if
        bidirectional). `ValueError` for a wrong shape, a call longer than `length`, a
        dt, or a state given to a bidirectional layer."""
        del train
        sequence = convolutions.checked_filters(self, x, state, sequence)
        k, D = self._filters(), parameters.skip(self)
        return convolutions.filtered(self, x, k, D, state, sequence)

    @nn.nowrap
    def init_state(self, batch_size: int) -> jax.Array:
        """Zeros [B, length-1, H]."""
        return convolutions.zero_past(self, batch_size)

    def _filters(self):
        """Taps [1 or 2, H, length], of the past and the future."""
        checks.at_least_one(self, "knots")
        checks.one_of(self, layout=implicit_filters.LAYOUTS, decay=DECAYS)
        if not 0 < self.decay_min <= self.decay_max:
            raise ValueError(
                "decay_min, decay_max: must satisfy 0 < decay_min <= decay_max, got "
                f"{self.decay_min}, {self.decay_max}"
            )
        S = implicit_filters.scales(self.length, self.knots)
        normal = logical(nn.initializers.normal(1.0), None, None, "embed", None)
        shape = S, 1 + self.bidirectional, self.features, self.knots
        w = self.param("filter", normal, shape)
        exponent = self._exponent()

        def norm():
            return jnp.linalg.norm(self._whole(w, exponent), axis=-1, keepdims=True)

        def taps():
            return self._whole(w, exponent)[..., : self.length] / Z.value

        Z = self.variable("buffers", "norm", norm)
        return computed_once(self, "taps", taps)

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
