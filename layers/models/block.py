"""Residual block around a mixer: norm, mixer, gate, dropout, residual."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.facts import refusals
from layers.inside import record
from layers.models import residual
from layers.parameters import dense, linear
from ssm.sequence import Sequence


@jax.custom_jvp
def gelu_erf(x: jax.Array) -> jax.Array:
    """x Phi(x), Phi(x) = (1 + erf(x / sqrt(2))) / 2, the exact form
    (https://arxiv.org/abs/1606.08415).

    Not by erfc, as `nn.gelu` has it: that is right to the last digit where x is far
    below 0 and the result next to nothing, and takes twice as long.
    """
    return x * _normal_cdf(x)


@gelu_erf.defjvp
def _gelu_erf_jvp(primals, tangents):
    """Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi), beside the value: what is kept for the
    gradient is this slope, where XLA would compute both functions of x once more."""
    (x,), (dx,) = primals, tangents
    cdf = _normal_cdf(x)
    slope = cdf + x * jnp.exp(-0.5 * x * x) * (0.5 * math.sqrt(2 / math.pi))
    slope, y = jax.lax.optimization_barrier((slope, x * cdf))
    return y, slope * dx


def _normal_cdf(x):
    return 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))


# Published models differ in the form, of which the second is up to 5e-4 off.
GELUS = {"erf": gelu_erf, "tanh": functools.partial(nn.gelu, approximate=True)}


def none(
    y: jax.Array,
    features: int,
    drop: Callable[[jax.Array], jax.Array],
    dtype: jnp.dtype,
    gelu: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """drop(y), for mixers that have their own gate (Mamba)."""
    return drop(y)


def only_gelu(
    y: jax.Array,
    features: int,
    drop: Callable[[jax.Array], jax.Array],
    dtype: jnp.dtype,
    gelu: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """drop(gelu(y)) (S5)."""
    return drop(gelu(y))


def glu(
    y: jax.Array,
    features: int,
    drop: Callable[[jax.Array], jax.Array],
    dtype: jnp.dtype,
    gelu: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """W1 g * sigmoid(W2 g), g = drop(gelu(y)) (S4; S5 calls it full_glu)."""
    out = dense(2 * features, "gate", dtype)(drop(gelu(y)))
    value, gate = jnp.split(out, 2, axis=-1)
    return drop(value * nn.sigmoid(gate))


def half_glu1(
    y: jax.Array,
    features: int,
    drop: Callable[[jax.Array], jax.Array],
    dtype: jnp.dtype,
    gelu: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """drop(g * sigmoid(W g)), g = drop(gelu(y)) (S5)."""
    g = drop(gelu(y))
    return drop(g * nn.sigmoid(dense(features, "gate", dtype)(g)))


def half_glu2(
    y: jax.Array,
    features: int,
    drop: Callable[[jax.Array], jax.Array],
    dtype: jnp.dtype,
    gelu: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """drop(y * sigmoid(W g)), g = drop(gelu(y)) (S5)."""
    g = drop(gelu(y))
    return drop(y * nn.sigmoid(dense(features, "gate", dtype)(g)))


GATES = {
    "none": none,
    "gelu": only_gelu,
    "glu": glu,
    "full_glu": glu,
    "half_glu1": half_glu1,
    "half_glu2": half_glu2,
}

# What is added to the variance where nothing else is said: Flax's values.
NORMS = {"layer": 1e-6, "batch": 1e-5, "rms": 1e-6}


class Norm(nn.Module):
    """Layer, root-mean-square or batch normalisation over the last axis.

    Batch statistics are taken over existing tokens only, so padding changes nothing.
    `epsilon` is added to the variance; 0 is the value of the kind in `NORMS`.
    """

    kind: str
    dtype: jnp.dtype = jnp.float32
    momentum: float = 0.95
    epsilon: float = 0.0

    @nn.compact
    def __call__(self, x, mask=None, train=False):
        """x [B, L, ..., H], mask [B, L] or None -> the shape of x."""
        epsilon = self.epsilon or NORMS[self.kind]
        if self.kind == "layer":
            return nn.LayerNorm(epsilon, dtype=self.dtype, name="norm")(x)
        if self.kind == "rms":
            return nn.RMSNorm(epsilon, dtype=self.dtype, name="norm")(x)
        if mask is not None:
            mask = mask.reshape(*mask.shape, *[1] * (x.ndim - 2))
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=epsilon,
            dtype=self.dtype,
            name="norm",
        )(x, mask=mask)


class GatedMLP(nn.Module):
    """W_down (silu(W_gate x) * W_up x) (https://arxiv.org/abs/2002.05202).

    Attributes:
        features: H; width: features of the hidden layer.
        dtype: of activations.
    """

    features: int
    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[..., H] -> [..., H]."""
        gate, up = jnp.split(linear(2 * self.width, "in", self.dtype)(x), 2, -1)
        return linear(self.features, "out", self.dtype, ("mlp", "embed"))(
            nn.silu(gate) * up
        )


class Block(nn.Module):
    """x + drop(gate(mixer(norm(x)))), or norm(x + ...) after the residual; then the
    same around a gated MLP, where there is one.

    Attributes:
        mixer: makes the mixer, any layer of the contract `x, state, sequence, train`.
        features: H.
        norm: one of `NORMS`; prenorm: before the mixer, else after the residual.
        gate: a key of `GATES`; gelu: a key of `GELUS`, the form in the gate.
        mlp: hidden width of the MLP; 0 for none.
        dropout: rate; tie_dropout: one mask for all tokens of a sequence, or all places
            of a grid.
        dtype: of activations.
        norm_momentum: share of the old in the running batch statistics.
        norm_epsilon: added to the variance; 0 is the norm's own, see `NORMS`.
    """

    mixer: Callable[[], nn.Module]
    features: int
    norm: str = "layer"
    prenorm: bool = True
    gate: str = "glu"
    mlp: int = 0
    dropout: float = 0.0
    tie_dropout: bool = True
    dtype: jnp.dtype = jnp.float32
    norm_momentum: float = 0.95
    gelu: str = "tanh"
    norm_epsilon: float = 0.0

    REFUSES = property(lambda block: tuple(sorted(refusals(block.mixer()))))

    @nn.compact
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H] and the mixer's state."""
        mask = None if sequence is None else sequence.mask
        x = residual.placed(x)

        def drop(y):
            axes = tuple(range(1, y.ndim - 1)) if self.tie_dropout else ()
            return nn.Dropout(self.dropout, axes)(y, deterministic=not train)

        def before(norm, x):
            return norm(x, mask, train) if self.prenorm else x

        def after(norm, x):
            return x if self.prenorm else norm(x, mask, train)

        norm = self._norm("norm")
        y, state = self.mixer(name="mixer")(before(norm, x), state, sequence, train)
        gate = GATES[self.gate]
        y = gate(y, self.features, drop, self.dtype, GELUS[self.gelu])
        x = after(norm, x + y)
        if self.mlp:
            norm = self._norm("mlp_norm")
            mlp = GatedMLP(self.features, self.mlp, self.dtype, name="mlp")
            x = after(norm, x + drop(mlp(before(norm, x))))
        x = residual.placed(x)
        record(self, sequence or Sequence(), output=x, state=state)
        return x, state

    @nn.nowrap
    def _norm(self, name):
        return Norm(
            self.norm, self.dtype, self.norm_momentum, self.norm_epsilon, name=name
        )

    @nn.nowrap
    def init_state(self, batch_size: int) -> Any:
        """The mixer's initial state."""
        return self.mixer().init_state(batch_size)
