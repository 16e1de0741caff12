"""A VQ autoencoder of frames, VQ-VAE (https://arxiv.org/abs/1711.00937)."""

from collections.abc import Mapping
from typing import NamedTuple, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp

from layers.checks import at_least_one
from layers.frames.images import conv, from_bytes
from layers.parameters import at_least_float32
from ssm import sequence as seq

FORGOTTEN = 1e-6  # a count below this has lost its digits; its code stays where it is


class Reconstruction(NamedTuple):
    """What the autoencoder says of every frame; [B, L] is [B] for single images."""

    frames: jax.Array  # [B, L, h, w, C], uint8 p as p / 127.5 - 1
    commitment: jax.Array  # [B, L] beta mean (z - e)^2
    usage: jax.Array  # [B, L, codes] share of the frame's places that have each code


class Codebook(NamedTuple):
    """K codes and the moving averages they are made of, float32 or better."""

    codes: jax.Array  # [K, D], e
    counts: jax.Array  # [K], N: vectors per batch that chose each code
    sums: jax.Array  # [K, D], m: the sum of these vectors


class VQ(nn.Module):
    """Frame -> a grid of discrete codes -> frame, every frame on its own.

    A strided convolutional encoder gives z [h', w', D], each side 2^len(depths) times
    shorter; each z becomes the nearest of the K codes, and a mirrored decoder reads
        q = z + sg(e_k - z),    k = argmin_j |z - e_j|^2
    so that the gradient of q reaches z unchanged. The codes are no parameters: they
    follow the z that chose them, see `moved`, in the collection "buffers", on every
    call with train=True that may change it.

    Attributes:
        channels: C of the frames.
        depths: channels after each halving of height and width.
        codes: K.
        code_features: D.
        blocks: residual blocks at every resolution.
        beta: weight of the commitment loss mean (z - sg(e_k))^2.
        decay: share of the old in the moving averages of the codebook.
        restart: a code chosen by fewer vectors per batch than this begins anew at one
            of the batch; 0: never.
        dtype: of activations; codes, distances and outputs are float32 or better.
    """

    REFUSES = ("state",)

    channels: int
    depths: tuple[int, ...] = (32, 64)
    codes: int = 64
    code_features: int = 16
    blocks: int = 1
    beta: float = 0.25
    decay: float = 0.99
    restart: float = 1.0
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self._check()
        D, kind = self.code_features, at_least_float32(self.dtype)
        self.encoder = Encoder(self.depths, D, self.blocks, self.dtype)
        self.decoder = Decoder(self.depths, self.channels, self.blocks, self.dtype)

        def normal():
            return jax.random.normal(self.make_rng("params"), (self.codes, D), kind)

        self.book = Codebook(
            self.variable("buffers", "codebook", normal),
            self.variable("buffers", "counts", jnp.zeros, (self.codes,), kind),
            self.variable("buffers", "sums", jnp.zeros, (self.codes, D), kind),
        )

    def __call__(self, inputs, state=None, sequence=None, train=False):
        """inputs, uint8 [B, L, h, w, C] or [B, h, w, C], or a mapping with these as
        "frames", -> `Reconstruction`, None.

        A masked frame moves no code and its outputs are 0. train=True takes the random
        numbers for restarts from the stream "dropout". `ValueError` for a state, which
        frames on their own do not have, and for frames as in `encode`.
        """
        if state is not None:
            raise ValueError("state: an autoencoder of single frames has none")
        frames = self._frames(inputs)
        clips = frames if frames.ndim == 5 else frames[:, None]
        sequence = seq.check(clips, sequence, "inputs")
        z, k = self._encode(clips)
        e = jnp.take(self.book.codes.value, k, axis=0)
        chosen = jax.nn.one_hot(k, self.codes, dtype=z.dtype)
        if train and self.is_mutable_collection("buffers"):
            self._move(z, chosen, e, sequence)
        outputs = Reconstruction(
            self._decode(z + jax.lax.stop_gradient(e - z)),
            self.beta * jnp.mean((z - jax.lax.stop_gradient(e)) ** 2, axis=(2, 3, 4)),
            jnp.mean(chosen, axis=(2, 3)),
        )
        outputs = jax.tree.map(lambda x: seq.zero_masked(x, sequence), outputs)
        if frames.ndim == 4:
            outputs = jax.tree.map(lambda x: x[:, 0], outputs)
        return outputs, None

    def encode(self, frames: jax.Array) -> jax.Array:
        """uint8 [..., h, w, C] -> int32 codes [..., h', w'].

        `ValueError` for frames that are not uint8, with other `channels`, or of a size
        that the halvings of `depths` do not divide.
        """
        return self._encode(self._frames(frames))[1]

    def decode(self, codes: jax.Array) -> jax.Array:
        """Integer codes [..., h', w'] -> float32 [..., h, w, C], p / 127.5 - 1."""
        if codes.ndim not in (3, 4) or not jnp.issubdtype(codes.dtype, jnp.integer):
            raise ValueError(
                "codes: must be integers [B, L, h', w'] or [B, h', w'], got "
                f"{codes.dtype} {codes.shape}"
            )
        return self._decode(jnp.take(self.book.codes.value, codes, axis=0))

    @nn.nowrap
    def init_state(self, batch_size: int) -> NoReturn:
        """Raises a `ValueError`: frames on their own have no state."""
        raise ValueError("VQ: an autoencoder of single frames has no recurrent mode")

    def _encode(self, frames):
        """z [..., h', w', D] and the nearest codes [..., h', w']."""
        x = from_bytes(frames, at_least_float32(self.dtype))
        z = self.encoder(x.astype(self.dtype)).astype(at_least_float32(self.dtype))
        return z, nearest(jax.lax.stop_gradient(z), self.book.codes.value)

    def _decode(self, q):
        return self.decoder(q.astype(self.dtype)).astype(at_least_float32(self.dtype))

    def _move(self, z, chosen, e, sequence):
        z, chosen, e = jax.lax.stop_gradient((z, chosen, e))
        exists = seq.zero_masked(jnp.ones(z.shape[:-1], z.dtype), sequence)
        z, e = (seq.zero_masked(x, sequence) for x in (z, e))  # no NaN from padding
        book = moved(
            Codebook(*(part.value for part in self.book)),
            z.reshape(-1, z.shape[-1]),
            (chosen * exists[..., None]).reshape(-1, self.codes),
            jnp.sum((z - e) ** 2, axis=-1).reshape(-1),
            self.decay,
            self.restart,
            self.make_rng("dropout"),
        )
        for part, value in zip(self.book, book, strict=True):
            part.value = value

    def _frames(self, inputs):
        """The frames among the inputs, checked."""
        frames = inputs["frames"] if isinstance(inputs, Mapping) else inputs
        if frames.ndim not in (4, 5) or frames.dtype != jnp.uint8:
            raise ValueError(
                "inputs: must be uint8 [B, L, h, w, C] or [B, h, w, C], got "
                f"{frames.dtype} {frames.shape}"
            )
        *_, h, w, C = frames.shape
        if self.channels != C:
            raise ValueError(
                f"channels: must be {C}, as in frames {frames.shape}, got "
                f"{self.channels}"
            )
        side = 2 ** len(self.depths)
        if h < side or w < side or h % side or w % side:
            raise ValueError(
                f"depths: height and width must be multiples of {side} for "
                f"{len(self.depths)} halvings, got frames {frames.shape}"
            )
        return frames

    def _check(self):
        at_least_one(self, "channels", "codes", "code_features")
        if not self.depths or min(self.depths) < 1:
            raise ValueError(
                f"depths: must be channels, at least 1 each, got {self.depths}"
            )
        for name in ("blocks", "beta", "restart"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name}: must be 0 or more, got {getattr(self, name)}"
                )
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: must lie in [0, 1), got {self.decay}")


def nearest(z: jax.Array, codes: jax.Array) -> jax.Array:
    """argmin_k |z - codes[k]|^2, the first where several are: z [..., D], codes [K, D]
    -> int32 [...]."""
    # |z|^2 is the same for all; at the default precision of a matmul on accelerators
    # encoding would depend on the device.
    product = jnp.einsum("...d,kd->...k", z, codes, precision="highest")
    return jnp.argmin(jnp.sum(codes**2, axis=-1) - 2 * product, axis=-1).astype(
        jnp.int32
    )


def moved(
    book: Codebook,
    z: jax.Array,
    chosen: jax.Array,
    error: jax.Array,
    decay: float,
    restart: float,
    key: jax.Array,
) -> Codebook:
    """The codebook after a batch, by the moving averages of the paper's appendix A.1:

        N_k = decay N_k + (1 - decay) n_k           n_k vectors chose k
        m_k = decay m_k + (1 - decay) sum of those
        e_k = m_k / N_k

    A code with N_k < restart then begins anew with N_k = restart at one vector of the
    batch, drawn with a probability in proportion to its error: where codes are missing
    and not where vectors are frequent. If the next batch does not choose it there, it
    is drawn again. All counts begin at 0, so the first codes are drawn too.

    Args:
        book: before the batch.
        z: [M, D] vectors.
        chosen: [M, K] one-hot; a row of zeros is no vector.
        error: [M] squared distance of each vector to its code.
        decay, restart: see `VQ`.
        key: random key that new codes are drawn with.
    """
    counts = decay * book.counts + (1 - decay) * jnp.sum(chosen, axis=0)
    batch = jnp.einsum("mk,md->kd", chosen, z, precision="highest")
    sums = decay * book.sums + (1 - decay) * batch
    mean = sums / jnp.maximum(counts, FORGOTTEN)[:, None]
    codes = jnp.where(counts[:, None] > FORGOTTEN, mean, book.codes)
    # Above 0 for every vector: they may all lie on their codes. Inverting the
    # cumulative sum needs M numbers, where a categorical draw needs M x K.
    exists = jnp.any(chosen > 0, axis=-1)
    weight = jnp.cumsum(jnp.where(exists, error + FORGOTTEN, 0))
    draw = (1 - jax.random.uniform(key, counts.shape, weight.dtype)) * weight[-1]
    drawn = z[jnp.searchsorted(weight, draw)]
    dead = (counts < restart) & (weight[-1] > 0)
    return Codebook(
        jnp.where(dead[:, None], drawn, codes),
        jnp.where(dead, restart, counts),
        jnp.where(dead[:, None], restart * drawn, sums),
    )


class Encoder(nn.Module):
    """[..., h, w, C] -> [..., h', w', code_features]: per depth a convolution of stride
    2 and residual blocks."""

    depths: tuple[int, ...]
    code_features: int
    blocks: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        for i, depth in enumerate(self.depths):
            x = conv(depth, f"down_{i}", self.dtype, kernel_size=4, stride=2)(x)
            for j in range(self.blocks):
                x = ResidualUnit(self.dtype, name=f"block_{i}_{j}")(x)
            x = nn.relu(x)
        return conv(self.code_features, "out", self.dtype, kernel_size=1)(x)


class Decoder(nn.Module):
    """[..., h', w', D] -> [..., h, w, channels]: per depth, in reverse, residual blocks
    and a convolution to the four pixels that each place becomes."""

    depths: tuple[int, ...]
    channels: int
    blocks: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = conv(self.depths[-1], "in", self.dtype)(x)
        smaller = (self.channels, *self.depths)
        for i in reversed(range(len(self.depths))):
            for j in range(self.blocks):
                x = ResidualUnit(self.dtype, name=f"block_{i}_{j}")(x)
            # Four times as fast on a CPU as a transposed convolution of width 4.
            x = _unfold(conv(4 * smaller[i], f"up_{i}", self.dtype)(nn.relu(x)))
        return x


class ResidualUnit(nn.Module):
    """x + W1 * relu(W3 * relu(x)), convolutions 1 x 1 and 3 x 3."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        C = x.shape[-1]
        y = conv(C, "conv_1", self.dtype)(nn.relu(x))
        return x + conv(C, "conv_2", self.dtype, kernel_size=1)(nn.relu(y))


def _unfold(x):
    """[..., h, w, 4 C] -> [..., 2 h, 2 w, C]."""
    *batch, h, w, channels = x.shape
    x = x.reshape(*batch, h, w, 2, 2, channels // 4)
    return jnp.swapaxes(x, -4, -3).reshape(*batch, 2 * h, 2 * w, channels // 4)
