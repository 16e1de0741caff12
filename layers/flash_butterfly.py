"""FlashButterfly, a long convolution whose transform is learned
(https://arxiv.org/abs/2302.06646)."""

from typing import NoReturn

import flax.linen as nn
import jax.numpy as jnp

from kernels import block_sizes, butterfly_conv, dft_factors
from layers.checks import also_empty
from layers.convolutions import checked_filters
from layers.facts import L, Placement, examples
from layers.inside import expose
from layers.long_conv import LongConv
from layers.parameters import logical, skip
from ssm import sequence as seq


class FlashButterfly(LongConv):
    """LongConv with the factors of its block FFTs as parameters:

        y = Re W^-1 (T_k(k) * T_u(u)) + D u

    W is the block FFT of u and k padded to twice `length`, T_k and T_u the same
    products of small matrices, but learned (`kernels.fft_conv.butterfly_conv`). They
    start as W, where the layer is LongConv. As they leave it, every output comes to
    depend on every input: there is no state, and `reset` and `dt` are refused.

    Attributes:
        order: number of factors; 0 leaves it to `kernels.fft_conv.block_sizes`.
        per_feature: each feature has factors of its own.
        (the others): those of `LongConv`. With dtype bfloat16 the transforms, that of
            the filter too, are products of bfloat16 matrices.
    """

    REFUSES = ("dt", "reset", "state")
    PLACEMENT = Placement("glu", 0.0, norm_epsilon=1e-5)
    EXAMPLES = examples(dict(length=2 * L))

    order: int = 0
    per_feature: bool = False

    @nn.compact
    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, L, H] -> y [B, L, H], None. The result does not depend on how far x is
        padded.

        Needs the rng "dropout" in train mode with a filter_dropout. `ValueError` for a
        wrong shape, a call longer than `length`, a state, a reset or a dt.
        """
        if state is not None:
            raise ValueError(
                "state: FlashButterfly has none, its learned transform mixes past and "
                "future; pass None"
            )
        sequence = checked_filters(self, x, None, sequence)
        if sequence.reset is not None:
            raise ValueError(
                "reset: FlashButterfly mixes all tokens of a row, as a learned "
                "transform is no convolution; pass None and one document a row"
            )
        k, D = self._filters(train), skip(self)
        u, _, restore = seq.compact(x.astype(self.dtype), sequence)
        u = expose(self, "values", u)
        L = x.shape[1]
        y = butterfly_conv(
            jnp.pad(u, ((0, 0), (0, self.length - L), (0, 0))),
            k[0],
            self._factors("u"),
            self._factors("k"),
            k_reverse=k[1] if self.bidirectional else None,
            skip=D,
        )
        return restore(expose(self, "mixed", y[:, :L])), None

    @nn.nowrap
    def init_state(self, batch_size: int) -> NoReturn:
        """A `ValueError`."""
        raise ValueError(
            "init_state: FlashButterfly has no recurrent mode, its learned transform "
            "mixes past and future; use LongConv to decode"
        )

    def _factors(self, of):
        if self.order < 0:
            raise ValueError(f"order: must be at least 1, or 0, got {self.order}")
        sizes = block_sizes(2 * self.length - 1, self.order or None)
        heads = (self.features,) if self.per_feature else ()
        names = ("embed",) * self.per_feature + (None,) * 3

        def dft(key, shape, dtype=jnp.float32):
            del key
            (factor,) = dft_factors(shape[-2:-1], dtype)
            return jnp.broadcast_to(factor, shape)

        return [
            self.param(f"{of}_factor_{i}", logical(dft, *names), (*heads, n, n, 2))
            for i, n in enumerate(sizes)
        ]
