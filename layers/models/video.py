"""Next-frame prediction: encoder, stack of mixers over frames, decoder."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import shards
from layers.checks import check_state
from layers.frames import images
from layers.models import residual
from layers.models.stack import Stack
from layers.parameters import logical
from ssm import sequence as seq

PIECE = 8  # frames that encoder and decoder see at once where they are made again


class FrameEncoder(nn.Module):
    """Frames [..., h, w, C] in [-1, 1] or features of codes to
    [..., h / s, w / s, depths[-1]]: a residual block per depth, and half the size
    between two depths, so s = 2^(len(depths) - 1)."""

    depths: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = images.conv(self.depths[0], "in", self.dtype)(x)
        for i, depth in enumerate(self.depths):
            if i:
                x = images.conv(depth, f"down_{i}", self.dtype, stride=2)(x)
            x = images.PreActivationBlock(depth, self.dtype, name=f"residual_{i}")(x)
        return x


class FrameDecoder(nn.Module):
    """The way back: [..., h / s, w / s, H] to [..., h, w, outputs] in float32."""

    depths: tuple[int, ...]
    outputs: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        for i, depth in reversed(list(enumerate(self.depths))):
            x = images.PreActivationBlock(depth, self.dtype, name=f"residual_{i}")(x)
            if i:
                up = images.conv(self.depths[i - 1], f"up_{i}", self.dtype)
                x = up(images.doubled(x))
        x = nn.gelu(images.group_norm(x.shape[-1], "norm", self.dtype)(x))
        out = images.conv(self.outputs, "out", jnp.float32, axis="out")
        return out(x.astype(jnp.float32))


def in_pieces(
    module: Callable[[jax.Array], jax.Array], x: jax.Array, size: int
) -> jax.Array:
    """module(x) of frames x [B, L, ...], `size` of them at a time (of each device that
    a sequence is split over) and, where that is less than L, made again for the
    gradient; the module sees every frame by itself."""
    B, L = x.shape[:2]
    parts = shards.devices(shards.TIME)
    parts = parts if L % parts == 0 else 1
    length = L // parts
    if size >= length:
        return module(x)
    count = -(-length // size)
    x = x.reshape(B, parts, length, *x.shape[2:])
    gap = (0, count * size - length)
    x = jnp.pad(x, [(0, 0), (0, 0), gap] + [(0, 0)] * (x.ndim - 3))

    def one(module, carry, x):
        y = module(x.reshape(B, parts * size, *x.shape[3:]))
        return carry, y.reshape(B, parts, size, *y.shape[2:])

    over = nn.scan(
        nn.remat(one, prevent_cse=False),
        variable_broadcast="params",
        split_rngs={"params": False},
        in_axes=2,
        out_axes=2,
    )
    _, y = over(module, (), x.reshape(B, parts, count, size, *x.shape[3:]))
    y = y.reshape(B, parts, count * size, *y.shape[4:])[:, :, :length]
    return y.reshape(B, L, *y.shape[3:])


class Video(nn.Module):
    """frames 1..t (and the action after each) -> frame t + 1, for all t at once.

    The contract of `layers.models.model.Model`: fed frame by frame with its state it
    answers the same, and a call on a context followed by calls on its own answers is an
    open-loop rollout (`train.video.rollout`).

    Attributes:
        stack: makes the `Stack` of blocks over frames [B, L, h / s, w / s, features].
        features: U, channels between encoder and decoder.
        size: (h, w) of the frames; channels: C of them.
        depths: channels of encoder and decoder at each resolution, each half as large
            as the one before.
        vocab_size: of codes; 0 for pixels, whose answers are float32 frames where a
            byte p stands for p / 127.5 - 1. For codes they are logits.
        actions: how many there are; 0: none are given. action_features: of one.
        remat: encode and decode PIECE frames at a time and again in the backward pass,
            which needs most of the memory otherwise. The stack has its own.
        dtype: of activations; outputs are float32.
    """

    stack: type[Stack]
    features: int
    size: tuple[int, int]
    channels: int = 1
    depths: tuple[int, ...] = (64, 128, 256)
    vocab_size: int = 0
    actions: int = 0
    action_features: int = 16
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    head = "token"  # one answer per frame
    encoder = "video"
    REFUSES = property(lambda model: model.stack().REFUSES)

    @nn.compact
    def __call__(self, inputs, state=None, sequence=None, train=False):
        """Frames -> y, state.

        inputs: pixels [B, L, h, w, C], uint8 or floats in [-1, 1], or int codes
        [B, L, h, w]; with actions {"frames": ..., "actions": int [B, L]}. y:
        [B, L, h, w, C], or logits [B, L, h, w, vocab_size]. `ValueError` for frames of
        another size, actions that are missing or not asked for, or a state or sequence
        that does not fit.
        """
        frames, actions = self._parts(inputs)
        sequence = seq.check(frames, sequence, "inputs")
        stack = self.stack(name="stack")
        if state is not None:
            expected = jax.eval_shape(lambda: stack.init_state(frames.shape[0]))
            check_state(state, {"stack": expected})
            state = state["stack"]
        # Also before the encoder: its gradients would be NaN of a masked frame that is.
        x = seq.zero_masked(self._features(frames), sequence)
        size = PIECE if self.remat else x.shape[1]
        x = in_pieces(FrameEncoder(self.depths, self.dtype, name="encoder"), x, size)
        if actions is not None:
            x = jnp.concatenate([x, self._tiled(actions, x.shape)], axis=-1)
        x = images.conv(self.features, "project", self.dtype, kernel_size=1)(x)
        x = residual.placed(seq.zero_masked(x, sequence))
        x, state = stack(x, state, sequence, train)
        outputs = self.vocab_size or self.channels
        decoder = FrameDecoder(self.depths, outputs, self.dtype, name="decoder")
        y = in_pieces(decoder, x, size)
        return seq.zero_masked(y, sequence), {"stack": state}

    @nn.nowrap
    def init_state(self, batch_size: int) -> dict:
        """The state before the first frame."""
        return {"stack": self.stack().init_state(batch_size)}

    @nn.nowrap
    def _parts(self, inputs):
        is_mapping = isinstance(inputs, Mapping)
        if self.actions and not (is_mapping and {"frames", "actions"} <= set(inputs)):
            raise ValueError(
                'actions: must be in the inputs, {"frames": ..., "actions": int '
                f"[B, L]}}, for a model of {self.actions} actions, got "
                f"{sorted(inputs) if is_mapping else 'frames alone'}"
            )
        if is_mapping and not self.actions:
            raise ValueError(
                "inputs: must be frames alone for a model built without actions, got "
                f"{sorted(inputs)}; in a run the actions are those of the dataset, see "
                "data.actions"
            )
        frames, actions = (
            (inputs["frames"], inputs["actions"]) if is_mapping else (inputs, None)
        )
        expected = self.size if self.vocab_size else (*self.size, self.channels)
        if frames.shape[2:] != tuple(expected):
            raise ValueError(
                f"inputs: frames must be [B, L, {', '.join(map(str, expected))}], got "
                f"{frames.shape}"
            )
        if self.vocab_size and not jnp.issubdtype(frames.dtype, jnp.integer):
            raise ValueError(f"inputs: codes must be integers, got {frames.dtype}")
        if not (
            self.vocab_size
            or frames.dtype == jnp.uint8
            or jnp.issubdtype(frames.dtype, jnp.floating)
        ):
            raise ValueError(
                f"inputs: pixels must be uint8 or floats in [-1, 1], got {frames.dtype}"
            )
        if actions is not None and (
            actions.shape != frames.shape[:2]
            or not jnp.issubdtype(actions.dtype, jnp.integer)
        ):
            raise ValueError(
                f"actions: must be integers [B, L] = {frames.shape[:2]}, got "
                f"{actions.dtype} {actions.shape}"
            )
        return frames, actions

    @nn.nowrap
    def _features(self, frames):
        if self.vocab_size:
            init = logical(nn.initializers.normal(1.0), "vocab", "embed")
            return residual.Embed(
                self.vocab_size,
                self.depths[0],
                dtype=self.dtype,
                embedding_init=init,
                name="embedding",
            )(frames)
        return images.from_bytes(frames).astype(self.dtype)

    @nn.nowrap
    def _tiled(self, actions, shape):
        init = logical(nn.initializers.normal(1.0), None, "embed")
        embedded = residual.Embed(
            self.actions,
            self.action_features,
            dtype=self.dtype,
            embedding_init=init,
            name="action",
        )(actions)
        return jnp.broadcast_to(
            embedded[:, :, None, None], (*shape[:-1], self.action_features)
        )
