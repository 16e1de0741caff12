"""Where the residual stream lies on many devices.

Between blocks every device has its rows and tokens of the stream, with all features.
With that said, XLA brings the parameters of a block to the rows where both are split
over the same devices; otherwise it may move the stream to the parameters, which is
larger.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax

# (array, the names of its axes) -> the array, where it is to lie.
Place = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]

_PLACE: contextvars.ContextVar[Place | None] = contextvars.ContextVar(
    "place", default=None
)


@contextlib.contextmanager
def placed_by(place: Place) -> Iterator[None]:
    """While a model is traced inside, its residual stream lies where `place` says."""
    token = _PLACE.set(place)
    try:
        yield
    finally:
        _PLACE.reset(token)


def placed(x: jax.Array) -> jax.Array:
    """The residual stream [B, L, ..., H] where it is to lie; as it is outside of
    `placed_by`. Its axes are "batch", "time", and nothing that is split."""
    place = _PLACE.get()
    return x if place is None else place(x, ("batch", "time", *[None] * (x.ndim - 2)))


class Embed(nn.Embed):
    """`nn.Embed` whose table is whole where rows of it are looked up: of a table that
    is split XLA would look up parts of all rows and bring the answers together."""

    def setup(self):
        super().setup()
        place = _PLACE.get()
        if place is not None:
            self.embedding = place(self.embedding, (None, None))
