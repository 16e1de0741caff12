"""RG-LRU in the recurrent block of Griffin (https://arxiv.org/abs/2402.19427)."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import linear_scan
from layers import heads
from layers.checks import also_empty, at_least_one, at_least_zero, checked, divides
from layers.facts import Placement, examples
from layers.inside import expose, record
from layers.parameters import at_least_float32, dense, logical, zeros
from layers.short_conv import ShortConv
from ssm import sequence as seq
from ssm import spectra, stability

C = 8.0  # the exponent that the paper writes as c


class RGLRUState(NamedTuple):
    """What the past leaves behind."""

    conv: jax.Array  # [B, W-1, E] the last inputs of the short convolution
    h: jax.Array  # [B, E]
    begun: jax.Array  # [B] bool, whether a token has been seen


class RGLRU(nn.Module):
    """A recurrence whose decay and input are gated by the input:

        u     = short convolution of W_x x                    [B, L, E]
        r, i  = sigmoid(W_r u + b_r), sigmoid(W_i u + b_i)    block-diagonal by head
        log a = -8 r softplus(Lambda)
        h[t]  = a[t] h[t-1] + sqrt(1 - a[t]^2) (i[t] u[t])
        y     = W_o (h gelu(W_y x))

    The first token of a sequence enters without the factor sqrt(1 - a^2), as
    published. Elapsed time multiplies log a.

    Attributes:
        features: H.
        width: E; 0 for H.
        heads: blocks of W_r and W_i; divides E.
        conv_width: W.
        a_min, a_max: range of the initial a at r = 1/8, uniform in a^2.
        dtype: of activations; gates and states are float32 or better.
    """

    PLACEMENT = Placement("none", 3.0)
    EXAMPLES = examples(dict(width=8, heads=2))

    features: int
    width: int = 0
    heads: int = 1
    conv_width: int = 4
    a_min: float = 0.9
    a_max: float = 0.999
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H], `RGLRUState`. `ValueError` for a wrong shape, or
        heads that do not divide the width."""
        del train
        sequence = checked(self, x, state, sequence)
        state = self.init_state(x.shape[0]) if state is None else state
        x, sequence, restore = seq.compact(x, sequence)
        E = self._width()
        gate = nn.gelu(dense(E, "gate", self.dtype)(x))
        u = dense(E, "in", self.dtype)(x)
        narrow = nn.initializers.normal(0.1 * self.conv_width**-0.5)
        conv = ShortConv(E, self.conv_width, True, narrow, self.dtype, name="conv")
        u, tail = conv(u, state.conv, sequence)
        u = seq.zero_masked(u.astype(at_least_float32(self.dtype)), sequence)
        log_a, i = self._gates(u, sequence)
        started, begun = seq.begun(state.begun, sequence, x.shape[:2])
        scale = stability.root(-jnp.expm1(2 * log_a))
        scale = jnp.where(started[..., None], scale, 1.0)
        u = scale * i * expose(self, "values", u)
        h, last = linear_scan(jnp.exp(log_a), u, state.h, sequence.reset)
        h = expose(self, "mixed", h) * gate
        y = dense(self.features, "out", self.dtype, ("mlp", "embed"))(h)
        return restore(y).astype(self.dtype), RGLRUState(tail, last, begun)

    @nn.nowrap
    def init_state(self, batch_size: int) -> RGLRUState:
        """Zeros, and nothing begun."""
        E = self._width()
        tail = batch_size, self.conv_width - 1, E
        begun = jnp.zeros((batch_size,), bool)
        return RGLRUState(*zeros(self, tail, (batch_size, E)), begun)

    @nn.nowrap
    def _width(self):
        at_least_one(self, "heads", "conv_width")
        at_least_zero(self, "width")
        E = self.width or self.features
        divides(self, "heads", "the width", E)
        return E

    def _gates(self, u, sequence):
        """log a, 0 on masked tokens, and the input gate i, both [B, L, E]."""
        ring = functools.partial(
            spectra.griffin_ring, a_min=self.a_min, a_max=self.a_max
        )
        Lambda = self.param("Lambda", logical(ring, "mlp"), u.shape[-1:])
        r, i = (nn.sigmoid(heads.block_diagonal(self, u, name)) for name in "ri")
        log_a = seq.stretched(-C * r * nn.softplus(Lambda), sequence)
        record(self, sequence, log_decay=log_a, gate=r)
        return log_a, i
