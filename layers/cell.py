"""A layer as a recurrent cell of Flax, for loops that act on every output."""

from typing import Any

import flax.linen as nn
import jax

from ssm.sequence import Sequence


class Cell(nn.RNNCellBase):
    """One token a call, the state as the carry: `carry, y = cell(carry, x)`.

    Its parameters are those of the layer, under "layer": what a rollout has collected
    with the cell, one parallel call of the layer learns from.

    Attributes:
        layer: a mixer with a recurrent mode.
    """

    layer: nn.Module

    @nn.compact
    def __call__(
        self, carry: Any, inputs: jax.Array | tuple[jax.Array, jax.Array]
    ) -> tuple[Any, jax.Array]:
        """carry, x [B, H] -> carry, y [B, H]; or a pair (x, reset [B] bool), where the
        state of a row starts anew before x. `ValueError` for another rank or shape."""
        x, reset = inputs if isinstance(inputs, tuple) else (inputs, None)
        sequence = None if reset is None else Sequence(reset=reset[:, None])
        y, carry = self.layer(x[:, None], carry, sequence)
        return carry, y[:, 0]

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> Any:
        """The state of the layer before the first token, of as many rows as x of this
        shape (B, H) has; `rng` is not used."""
        del rng
        if len(input_shape) != 1 + self.num_feature_axes:
            raise ValueError(
                f"input_shape: must be one axis of rows and {self.num_feature_axes} of "
                f"a token, got {input_shape}"
            )
        return self.layer.init_state(input_shape[0])

    @property
    def num_feature_axes(self) -> int:
        """How many axes a token has: 1, or those of a frame."""
        return 1 + len(getattr(self.layer, "size", ()))
