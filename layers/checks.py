"""What layers check of their fields and arguments before they compute."""

import functools
from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssm import sequence as seq


def also_empty(call: Callable) -> Callable:
    """The call of a mixer, which now also answers a batch of no rows [0, L, ...], with
    outputs and a state of no rows. A reshape cannot tell the heads of no rows apart, so
    a row of zeros is computed in their place and dropped."""

    def row(leaf):
        shape = getattr(leaf, "shape", ())
        return jnp.zeros((1, *shape[1:]), leaf.dtype) if shape[:1] == (0,) else leaf

    @functools.wraps(call)
    def answer(self, x, state=None, sequence=None, train=False):
        if getattr(x, "shape", ())[:1] != (0,):
            return call(self, x, state, sequence, train)
        x, state, sequence = jax.tree.map(row, (x, state, sequence))
        return jax.tree.map(
            lambda leaf: leaf[:0], call(self, x, state, sequence, train)
        )

    return answer


def checked(
    layer: nn.Module, x: jax.Array, state: Any, sequence: seq.Sequence | None
) -> seq.Sequence:
    """What every mixer checks first: x [B, L, layer.features], a sequence that fits it
    and a state of the kind that `layer.init_state` gives. Returns the Sequence."""
    return _begin(layer, x, (layer.features,), state, sequence)


def checked_frames(
    layer: nn.Module, x: jax.Array, state: Any, sequence: seq.Sequence | None
) -> seq.Sequence:
    """The same for a layer over frames, x [B, L, h, w, layer.features] with (h, w) its
    `size`."""
    if len(layer.size) != 2 or min(layer.size) < 1:
        raise ValueError(f"size: must be (h, w), both at least 1, got {layer.size}")
    return _begin(layer, x, (*layer.size, layer.features), state, sequence)


def _begin(layer, x, token, state, sequence):
    sequence = seq.check(x, sequence)
    if x.shape[2:] != token:
        expected = ", ".join(map(str, token))
        raise ValueError(f"x: must be [B, L, {expected}], got {x.shape}")
    if state is not None:
        if getattr(layer, "bidirectional", False):
            raise ValueError(
                f"state: a bidirectional {type(layer).__name__} has none; pass None or "
                "set bidirectional=False"
            )
        check_state(state, jax.eval_shape(lambda: layer.init_state(x.shape[0])))
    return sequence


def at_least_one(layer: nn.Module, *names: str) -> None:
    """Raises a `ValueError` naming the first of these fields that is below 1."""
    for name in names:
        if getattr(layer, name) < 1:
            raise ValueError(f"{name}: must be at least 1, got {getattr(layer, name)}")


def at_least_zero(layer: nn.Module, *names: str) -> None:
    """The same for fields whose 0 has a meaning of its own."""
    for name in names:
        if getattr(layer, name) < 0:
            raise ValueError(
                f"{name}: must be 0 or positive, got {getattr(layer, name)}"
            )


def positive(layer: nn.Module, *names: str) -> None:
    """The same for fields that must be above 0."""
    for name in names:
        if getattr(layer, name) <= 0:
            raise ValueError(f"{name}: must be positive, got {getattr(layer, name)}")


def even(layer: nn.Module, *names: str) -> None:
    """The same for fields that count two by two."""
    for name in names:
        value = getattr(layer, name)
        if value < 2 or value % 2:
            raise ValueError(f"{name}: must be even and at least 2, got {value}")


def one_of(layer: nn.Module, **valid: Collection[str]) -> None:
    """The same for fields that name a thing: field = its names."""
    for name, names in valid.items():
        value = getattr(layer, name)
        if value not in names:
            raise ValueError(f"{name}: must be one of {sorted(names)}, got {value!r}")


def divides(layer: nn.Module, name: str, description: str, total: float) -> None:
    """The same for a field that must divide `total`, which `description` names."""
    value = getattr(layer, name)
    if value < 1 or total < value or total % value:
        raise ValueError(f"{name}: must divide {description} = {total:g}, got {value}")


def interval(layer: nn.Module, *names: str) -> None:
    """The same for fields of two numbers, the ends of an interval of [0, inf]."""
    for name in names:
        ends = getattr(layer, name)
        if len(ends) != 2 or not 0 <= ends[0] <= ends[1]:
            raise ValueError(
                f"{name}: must be two numbers, 0 <= least <= largest, got {ends}"
            )


def copies(layer: nn.Module) -> int:
    """How many independent systems the features of `layer` share, from its field
    `copies`, 0 for one each."""
    count = layer.copies or layer.features
    if count < 0 or layer.features % count:
        raise ValueError(
            f"copies: must divide features = {layer.features}, got {layer.copies}"
        )
    return count


def check_state(state: Any, expected: Any) -> None:
    """Raises a `ValueError` naming `state` unless it is None or has the structure and
    shapes of `expected`, what `init_state` returns for this batch."""
    if state is None:
        return
    shapes = jax.tree.map(jnp.shape, state)
    expected_shapes = jax.tree.map(jnp.shape, expected)
    if shapes != expected_shapes:
        raise ValueError(
            f"state: must be None or what init_state gives, {expected_shapes}, got "
            f"{shapes}"
        )


def recurrent(layer: nn.Module) -> None:
    """Raises a `ValueError` naming `bidirectional` where that leaves no state."""
    if layer.bidirectional:
        raise ValueError(
            f"bidirectional: must be False for init_state, got True: "
            f"{type(layer).__name__} then has no recurrent mode"
        )


TAPS = "its filters have taps at regular steps"
BOTH_WAYS = "with bidirectional=True it convolves, at regular steps"


def refuse_dt(
    layer: nn.Module,
    sequence: seq.Sequence,
    why: str = "it has no notion of elapsed time",
) -> None:
    """Raises a `ValueError` naming dt where there is one."""
    if sequence.dt is not None:
        raise ValueError(
            f"dt: must be None for {type(layer).__name__}, got an array: {why}"
        )


def within_length(layer: nn.Module, x: jax.Array) -> None:
    """Raises a `ValueError` naming `length` where a call has more tokens."""
    at_least_one(layer, "length")
    if x.shape[1] > layer.length:
        raise ValueError(
            f"length: must be at least the {x.shape[1]} tokens of the call, got "
            f"{layer.length} taps in the filters of {type(layer).__name__}; build it "
            f"with length={x.shape[1]}"
        )


def within_context(layer: nn.Module, x: jax.Array, unit: str = "tokens") -> None:
    """Raises a `ValueError` naming `context` where a call has more tokens, or what
    `unit` calls them."""
    if x.shape[1] > layer.context:
        raise ValueError(
            f"context: must be at least the {x.shape[1]} {unit} of the call, got "
            f"{layer.context}"
        )
