"""Embedding, stack and head: a whole model under the contract of a single mixer."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.checks import check_state
from layers.models import grid, residual
from layers.models.block import Norm
from layers.models.stack import Stack
from layers.parameters import dense, logical
from ssm import sequence as seq

ENCODERS = ("scalar", "token", "image", "grid")
HEADS = ("mean", "last", "token", "retrieval")


class Embedding(nn.Module):
    """Inputs to features [B, L, H], or places of a grid [B, n_1, ..., n_k, H].

    "scalar": float [B, L] or [B, L, C], a linear map. "token": int [B, L], an embedding
    of `vocab_size` rows. "image": [B, h, w, C] read row by row as L = h w pixels, uint8
    scaled to [0, 1]. "grid": [B, h, w, C] or volumes [B, d, h, w, C], which stay a grid
    after a linear map of every patch, `patch` places along each axis.
    """

    kind: str
    features: int
    vocab_size: int = 0
    patch: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        if self.kind == "token":
            if not jnp.issubdtype(x.dtype, jnp.integer):
                raise ValueError(f"inputs: tokens must be integers, got {x.dtype}")
            init = logical(nn.initializers.normal(1.0), "vocab", "embed")
            return residual.Embed(
                self.vocab_size,
                self.features,
                dtype=self.dtype,
                embedding_init=init,
                name="embedding",
            )(x)
        if self.kind == "scalar" and x.ndim == 2:
            x = x[..., None]
        if x.dtype == jnp.uint8:
            x = x.astype(jnp.float32) / 255.0
        # A zero input (a black pixel, silence) must not become a zero token: there the
        # gradient of a norm is 1 / sqrt(epsilon).
        bias = nn.initializers.normal(1.0)
        if self.kind == "grid":
            return self._patches(x, bias)
        axes = ("channel", "embed")
        return dense(self.features, "project", self.dtype, axes, bias)(x)

    def _patches(self, x, bias):
        size = x.shape[1:-1]
        if self.patch < 1 or any(n % self.patch for n in size):
            raise ValueError(
                f"patch: must divide every axis of the inputs, {size}, got {self.patch}"
            )
        init = nn.initializers.lecun_normal()
        return nn.Conv(
            self.features,
            (self.patch,) * len(size),
            (self.patch,) * len(size),
            padding="VALID",
            dtype=self.dtype,
            kernel_init=logical(init, *[None] * len(size), "channel", "embed"),
            bias_init=logical(bias, "embed"),
            name="project",
        )(x)


class PoolState(NamedTuple):
    """What a pooled head has seen since the last reset."""

    features: jax.Array  # [B, H] sum ("mean") or last features ("last")
    count: jax.Array  # [B] number of tokens


class Model(nn.Module):
    """inputs -> encoder -> stack of blocks -> head.

    A pooled head answers for everything seen since the last reset, across calls too, so
    feeding the tokens one by one ends at the answer for the whole sequence.

    Attributes:
        stack: makes the `Stack`.
        features: H.
        outputs: width of the output (classes, vocabulary or regression targets).
        encoder: one of `ENCODERS`; vocab_size: for "token"; patch: for "grid", whose
            mixers are `layers.models.grid.Grid`, whose head is "mean" of all places,
            and where nothing accompanies the inputs.
        head: one of `HEADS`. "mean" and "last" pool over the true length; "token"
            answers at every token; "retrieval" compares two documents, inputs
            [B, 2, L, ...], by [u, v, u - v, u v] of their means.
        norm: norm before the head ("" for none, where blocks end in a norm);
            norm_epsilon: see `layers.models.block.Norm`.
        dtype: of activations; outputs are float32.
    """

    stack: type[Stack]
    features: int
    outputs: int
    encoder: str = "scalar"
    vocab_size: int = 0
    patch: int = 1
    head: str = "mean"
    norm: str = "layer"
    dtype: jnp.dtype = jnp.float32
    norm_epsilon: float = 0.0

    REFUSES = property(lambda model: model.stack().REFUSES)

    @nn.compact
    def __call__(self, inputs, state=None, sequence=None, train=False):
        """inputs (see `Embedding`) -> y, state.

        y [B, outputs] for a pooled head, [B, L, outputs] for "token"; state is None for
        a model with a bidirectional layer. `ValueError` for a wrong rank or shape,
        L = 0, or a mask, reset or dt that is not [B, L].
        """
        if self.encoder == "grid":
            self._check_grid(sequence)
        if self.head == "retrieval":
            inputs, sequence = _two_documents(inputs, sequence)
        inputs = self._flat(inputs)
        sequence = seq.check(inputs, sequence, "inputs")
        stack = self.stack(name="stack")
        if state is not None:
            expected = jax.eval_shape(lambda: self._stateful(stack, inputs.shape[0]))
            check_state(state, expected)
        # Compact once here and every layer finds only right padding.
        inputs, sequence, restore = seq.compact(inputs, sequence)
        x = Embedding(
            self.encoder,
            self.features,
            self.vocab_size,
            self.patch,
            self.dtype,
            name="encoder",
        )(inputs)
        x = residual.placed(seq.zero_masked(x, sequence))
        x, stack_state = stack(
            x, None if state is None else state["stack"], sequence, train
        )
        if self.norm:
            norm = Norm(self.norm, self.dtype, epsilon=self.norm_epsilon, name="norm")
            x = norm(x, sequence.mask, train)
        places = math.prod(x.shape[1:-1])
        x = x.astype(jnp.float32).reshape(x.shape[0], places, self.features)
        if self.head == "token":
            y = restore(dense(self.outputs, "head", jnp.float32, ("embed", "out"))(x))
            return y, {"stack": stack_state}
        before = None if state is None else state["pool"]
        pooled, pool = _pool(x, sequence, before, self.head)
        return self._answer(pooled), {"stack": stack_state, "pool": pool}

    @nn.nowrap
    def init_state(self, batch_size: int) -> Any:
        """The state before the first token. `ValueError` without a recurrent mode."""
        documents = 2 * batch_size if self.head == "retrieval" else batch_size
        return self._stateful(self.stack(), documents)

    @nn.nowrap
    def _stateful(self, stack, batch_size):
        state = {"stack": stack.init_state(batch_size)}
        if self.head != "token":
            state["pool"] = PoolState(
                jnp.zeros((batch_size, self.features), jnp.float32),
                jnp.zeros((batch_size,), jnp.float32),
            )
        return state

    @nn.nowrap
    def _flat(self, inputs):
        ranks = {"scalar": (2, 3), "token": (2,), "image": (4,), "grid": (4, 5)}
        if inputs.ndim not in ranks[self.encoder]:
            shapes = {
                "scalar": "[B, L] or [B, L, C]",
                "token": "[B, L]",
                "image": "[B, h, w, C]",
                "grid": "[B, h, w, C] or [B, d, h, w, C]",
            }
            raise ValueError(
                f"inputs: must be {shapes[self.encoder]} for the {self.encoder} "
                f"encoder, got shape {inputs.shape}"
            )
        if self.encoder == "image":
            return inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
        return inputs

    @nn.nowrap
    def _check_grid(self, sequence):
        grid.no_companions(sequence)
        if self.head != "mean":
            raise ValueError(
                f"head: must be 'mean' for the grid encoder, over all places, got "
                f"{self.head!r}"
            )

    def _answer(self, pooled):
        if self.head == "retrieval":
            u, v = pooled[0::2], pooled[1::2]
            pooled = jnp.concatenate([u, v, u - v, u * v], axis=-1)
            pooled = nn.gelu(
                dense(self.features, "compare", jnp.float32, ("mlp", "embed"))(pooled)
            )
        return dense(self.outputs, "head", jnp.float32, ("embed", "out"))(pooled)


def _two_documents(inputs, sequence):
    """[B, 2, L, ...] -> [2B, L, ...], and so for every field of the sequence."""
    if inputs.ndim < 3 or inputs.shape[1] != 2:
        raise ValueError(
            f"inputs: must be [B, 2, L, ...] for the retrieval head, got {inputs.shape}"
        )

    def merge(x):
        return x.reshape(-1, *x.shape[2:])

    return merge(inputs), jax.tree.map(merge, sequence)


def _pool(x, sequence, before, head):
    """Mean or last of the tokens since the last reset, [B, H], and the new state."""
    B, L, _ = x.shape
    mask = jnp.ones((B, L), bool) if sequence.mask is None else sequence.mask
    if before is None:
        before = PoolState(jnp.zeros_like(x[:, 0]), jnp.zeros((B,), x.dtype))
    pending = None
    if sequence.reset is not None:
        # A reset on padding belongs to a token yet to come: to the state, not to this
        # answer.
        pending = jnp.any(sequence.reset & ~mask, axis=1)
        segment = jnp.cumsum(sequence.reset & mask, axis=1)
        mask = mask & (segment == segment[:, -1:])
        restarted = segment[:, -1] > 0
        before = PoolState(
            jnp.where(restarted[:, None], 0.0, before.features),
            jnp.where(restarted, 0.0, before.count),
        )
    added = jnp.sum(mask, axis=1, dtype=x.dtype)
    count = before.count + added
    if head == "last":
        last = jnp.max(jnp.where(mask, jnp.arange(L), 0), axis=1)
        last_features = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        pooled = features = jnp.where(
            (added > 0)[:, None], last_features, before.features
        )
    else:
        features = before.features + jnp.sum(jnp.where(mask[..., None], x, 0.0), axis=1)
        pooled = features / jnp.maximum(count, 1.0)[:, None]
    if pending is not None:
        features = jnp.where(pending[:, None], 0.0, features)
        count = jnp.where(pending, 0.0, count)
    return pooled, PoolState(features, count)
