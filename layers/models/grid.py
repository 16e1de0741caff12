"""Any mixer over images and volumes: S4ND (https://arxiv.org/abs/2210.06583) and the
cross scan of VMamba (https://arxiv.org/abs/2401.10166)."""

import math
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import flax.linen as nn
import jax.numpy as jnp

from layers.checks import also_empty
from ssm import sequence as seq
from ssm.sequence import Sequence


class Scheme(NamedTuple):
    """How mixers of sequences read a grid: one per axis."""

    in_turn: bool  # each axis reads what the one before it wrote; else x, and a sum
    whole: bool  # one sequence of all places; else one per line along the axis


SCHEMES = {
    "separable": Scheme(in_turn=True, whole=False),
    "axis_sum": Scheme(in_turn=False, whole=False),
    "cross": Scheme(in_turn=False, whole=True),
}


def get(scheme: str) -> Scheme:
    """The `Scheme` of this name; `ValueError` lists the names."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: must be one of {sorted(SCHEMES)}, got {scheme!r}")
    return SCHEMES[scheme]


def longest(scheme: str, size: tuple[int, ...]) -> int:
    """Tokens of the longest sequence that a mixer reads on a grid of `size`, such as
    (h, w): what its capacity (`length`, `context`) must hold."""
    return math.prod(size) if get(scheme).whole else max(size)


def no_companions(sequence: Sequence | None) -> None:
    """Raises a `ValueError` naming what accompanies the tokens of a sequence: a grid
    has none."""
    for name in ("mask", "reset", "dt"):
        if getattr(sequence, name, None) is not None:
            raise ValueError(
                f"{name}: belongs to tokens [B, L] in one order, but a grid is read in "
                "several; pass None, and images of one size"
            )


class Grid(nn.Module):
    """A mixer of sequences M over x [B, n_1, ..., n_k, H], k >= 1, in both directions.

    separable: y = M_k ... M_1 x, the axes one after the other. Of convolutions this is
        one in k dimensions, whose filter is the outer product of theirs (S4ND); only of
        these does the order of the axes not matter.
    axis_sum: y = sum_i M_i x along axis i: rows plus columns. A sum, not a mean, as
        both directions are summed, and no axis counts less because there is another.
    cross: y = sum_i M_i x over the k orders of all places in which axis i is the
        fastest and the others keep theirs: row by row and column by column of an image.
        VMamba shares the projections of the directions; here each has a whole mixer.

    A mixer with a field `bidirectional` that is True is M_i, "axis_i" from 0. Any other
    reads forwards, and a second one, "axis_i_reverse", backwards; M_i is their sum.

    A capacity of the mixer (`length`, `context`) must be that of the longest sequence
    it reads, see `longest`: the longest axis, or for "cross" all places.

    Attributes:
        mixer: makes M, any layer of the contract with `features` inputs and outputs.
        features: H.
        scheme: a key of `SCHEMES`.
        dtype: of the output.
    """

    REFUSES = ("mask", "reset", "dt", "state")

    mixer: Callable[[], nn.Module]
    features: int
    scheme: str = "separable"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    @also_empty
    def __call__(self, x, state=None, sequence=None, train=False):
        """x [B, n_1, ..., n_k, H] -> y of the same shape, None.

        `ValueError` for a wrong shape, a state, a mask, reset or dt, and what M raises.
        """
        in_turn, whole = get(self.scheme)
        self._check(x, state, sequence)
        axes = range(1, x.ndim - 1)
        if in_turn:
            for axis in axes:
                x = self._read(x, axis, whole, train)
        else:
            x = sum(self._read(x, axis, whole, train) for axis in axes)
        return x.astype(self.dtype), None

    @nn.nowrap
    def init_state(self, batch_size: int) -> NoReturn:
        """`ValueError`: there is no recurrent mode."""
        raise ValueError(
            "init_state: Grid has no recurrent mode, it reads every axis in both "
            "directions"
        )

    def _read(self, x, axis, whole, train):
        """M_i along `axis`."""
        moved = jnp.moveaxis(x, axis, -2)
        shape = (len(x), -1) if whole else (-1, moved.shape[-2])
        u = moved.reshape(*shape, self.features)
        y = self._both_directions(u, f"axis_{axis - 1}", train)
        return jnp.moveaxis(y.reshape(moved.shape), -2, axis)

    def _both_directions(self, u, name, train):
        mixer = self.mixer(name=name)
        y, _ = mixer(u, None, None, train)
        if getattr(mixer, "bidirectional", False):
            return y
        mixer = self.mixer(name=f"{name}_reverse")
        future, _ = mixer(jnp.flip(u, 1), None, None, train)
        return y + jnp.flip(future, 1)

    @nn.nowrap
    def _check(self, x, state, sequence):
        no_companions(sequence)
        seq.check(x, sequence)
        if x.ndim < 3 or x.shape[-1] != self.features or 0 in x.shape[1:]:
            raise ValueError(
                f"x: must be [B, n_1, ..., n_k, {self.features}] with k >= 1 axes of 1 "
                f"or more places, got shape {x.shape}"
            )
        if state is not None:
            raise ValueError(
                "state: a Grid has none, it reads every axis in both directions; pass "
                "None"
            )
