"""Retention, the mixer of RetNet (https://arxiv.org/abs/2307.08621)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels import chunked_scan
from layers import heads
from layers.checks import also_empty, checked
from layers.facts import Placement, examples
from layers.inside import expose, record
from layers.parameters import at_least_float32, linear
from ssm import rotary
from ssm import sequence as seq


class Retention(nn.Module):
    """Linear attention whose every head forgets at its own fixed rate:

        q, k, v, g = W x, q and k turned by their positions, k / sqrt(K)
        S[t]       = gamma S[t-1] + k[t] v[t]^T               [heads, K, V]
        y          = W_out (RMSNorm(S[t]^T q[t]) silu(g))

    gamma = 1 - 2^(-5 - head). The state is kept turned to the last token, so that
    positions need no counter. Elapsed time multiplies log gamma and the turn.

    Attributes:
        features: H.
        heads: their number.
        expand_k, expand_v: all keys together have expand_k H channels, values
            expand_v H.
        base: b of the rotary frequencies b^(-2 i / size), see `ssm.rotary`.
        dtype: of activations; decays and states are float32 or better.
    """

    PLACEMENT = Placement("none", 2.0)
    EXAMPLES = examples(dict(heads=3))

    features: int
    heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 2.0
    base: float = 10_000.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H], state [B, heads, K, V]. `ValueError` for a wrong
        shape, or widths that the heads do not divide."""
        del train
        sequence = checked(self, x, state, sequence)
        x, sequence, restore = seq.compact(x, sequence)
        K, V = self._sizes()
        q = heads.project(x, self.heads, K, "query", self.dtype)
        k = heads.project(x, self.heads, K, "key", self.dtype) * K**-0.5
        v = heads.project(x, self.heads, V, "value", self.dtype)
        gate = nn.silu(linear(self.heads * V, "gate", self.dtype)(x))
        log_decay = self._log_decay(x, sequence)
        record(self, sequence, log_decay=log_decay)
        turn, positions = self._positions(x, sequence)
        q, k = turn(q, positions), turn(k, positions)
        v = expose(self, "values", v)
        o, S = chunked_scan(q, k, v, log_decay, None, state, sequence.reset)
        o = expose(self, "mixed", o)
        y = heads.gated_output(o, gate, self.features, self.dtype)
        return restore(y).astype(self.dtype), self._to_last(S, turn, positions)

    @nn.nowrap
    def init_state(self, batch_size: int) -> jax.Array:
        """Zeros [B, heads, K, V]."""
        shape = batch_size, self.heads, *self._sizes()
        return jnp.zeros(shape, at_least_float32(self.dtype))

    @nn.nowrap
    def _sizes(self):
        K, V = heads.sizes(self)
        if K % 2:
            raise ValueError(
                f"heads: {self.heads} leave keys of {K} channels, which turn in pairs; "
                "features x expand_k / heads must be even"
            )
        return K, V

    @nn.nowrap
    def _log_decay(self, x, sequence):
        """log gamma [B, L, heads], times the elapsed time."""
        gamma = np.log1p(-(2.0 ** (-5 - np.arange(self.heads))))
        # Of a mask alone the times are float32, which would round gamma in float64.
        ones = jnp.ones(x.shape[:2], at_least_float32(self.dtype))
        elapsed = seq.stretched(ones, sequence)
        return elapsed[..., None] * jnp.asarray(gamma, elapsed.dtype)

    @nn.nowrap
    def _positions(self, x, sequence):
        """The rotation of this layer, and positions [L] or [B, L], 0 before the
        call."""
        turn = functools.partial(rotary.rotate, base=self.base)
        if sequence.dt is not None:
            return turn, rotary.summed(seq.elapsed(sequence))
        L = x.shape[1]
        positions = jnp.arange(1, L + 1)
        if sequence.mask is not None:
            positions = jnp.cumsum(sequence.mask, axis=1, dtype=jnp.int32)
        return functools.partial(turn, below=L + 1), positions

    @nn.nowrap
    def _to_last(self, S, turn, positions):
        """The keys of S [B, heads, K, V] turned back by the time of the call."""
        keys = jnp.moveaxis(S, -1, 1)  # values in the place of tokens
        back = jax.tree.map(lambda p: -p[..., -1:], positions)
        return jnp.moveaxis(turn(keys, back), 1, -1)
