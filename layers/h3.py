"""H3, hungry hungry hippos (https://arxiv.org/abs/2212.14052)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.checks import TAPS, also_empty, at_least_one, checked, divides, refuse_dt
from layers.convolutions import past_inputs
from layers.facts import Placement, examples
from layers.inside import expose
from layers.parameters import at_least_float32, dense
from layers.s4d import S4D
from layers.short_conv import Shift
from ssm import sequence as seq


class H3State(NamedTuple):
    """What the past leaves behind."""

    shift: jax.Array  # [B, d-1, H] the last keys
    ssm: jax.Array  # [B, P^2, H / P, n] complex


class H3(nn.Module):
    """Linear attention whose key is remembered by a shift, and whose sum by S4D:

        q, k, v = W x + b                                          H wide each
        s       = Shift(k)                                         the last d keys
        y       = W_out (q S4D(s v)) + b_out

    In heads of P features s v is an outer product, so that every one of H / P systems
    filters P^2 numbers, and q contracts the axis of s:

        o[j] = sum_i q[i] S4D(s[i] v[j])

    Filters of taps have no elapsed time: `dt` is a `ValueError`.

    Attributes:
        features: H.
        state_size: N of S4D, real.
        taps: d.
        head_size: P, which divides H.
        spectrum, dt_min, dt_max: fields of the `S4D` inside, see there.
        dtype: of activations; filters and states are float32 or better.
    """

    REFUSES = ("dt",)
    PLACEMENT = Placement("none", 4.0, norm_epsilon=1e-5)
    EXAMPLES = examples(
        dict(state_size=4, taps=5), heads=dict(state_size=4, taps=5, head_size=2)
    )

    features: int
    state_size: int = 64
    taps: int = 64
    head_size: int = 1
    spectrum: str = "lin"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H], `H3State`. `ValueError` for a wrong shape, a
        head_size that does not divide H, or a dt."""
        del train
        P = self._head_size()
        sequence = checked(self, x, state, sequence)
        refuse_dt(self, sequence, TAPS)
        tail, h = (None, None) if state is None else state
        x, sequence, restore = seq.compact(x, sequence)
        q, k, v = jnp.split(dense(3 * self.features, "in", self.dtype)(x), 3, -1)
        k, tail = Shift(self.features, self.taps, name="shift")(k, tail, sequence)
        v = expose(self, "values", v)
        o, h = self._attend(q, k, v, h, sequence, P)
        o = expose(self, "mixed", o)
        y = dense(self.features, "out", self.dtype, ("mlp", "embed"))(o)
        return restore(y), H3State(tail, h)

    @nn.nowrap
    def init_state(self, batch_size: int) -> H3State:
        """Zeros."""
        P = self._head_size()
        tail = past_inputs(batch_size, self.taps, self.features, self.dtype)
        h = batch_size, P * P, self.features // P, self.state_size // 2
        return H3State(tail, jnp.zeros(h, jnp.promote_types(tail.dtype, jnp.complex64)))

    @nn.nowrap
    def _head_size(self):
        at_least_one(self, "taps", "head_size")
        divides(self, "head_size", "features", self.features)
        return self.head_size

    def _attend(self, q, s, v, h, sequence, P):
        """o [B, L, H] and the state [B, P^2, H / P, n]; the pairs (i, j) of a head go
        with the batch."""
        B, L, H = v.shape
        q, s, v = (z.reshape(B, L, H // P, P) for z in (q, s, v))
        outer = jnp.einsum("blhi,blhj->bijlh", s, v).reshape(B * P * P, L, H // P)
        every = jax.tree.map(lambda field: jnp.repeat(field, P * P, 0), sequence)
        h = None if h is None else h.reshape(-1, *h.shape[2:])
        dts = dict(dt_min=self.dt_min, dt_max=self.dt_max)
        dtype = at_least_float32(self.dtype)
        s4d = S4D(
            H // P, self.state_size, self.spectrum, **dts, dtype=dtype, name="ssm"
        )
        y, h = s4d(outer, h, every)
        y = y.reshape(B, P, P, L, H // P)
        o = jnp.einsum("blhi,bijlh->blhj", q.astype(y.dtype), y)
        return o.reshape(B, L, H), h.reshape(B, P * P, *h.shape[1:])
