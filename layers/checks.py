"""What layers check of their fields and arguments before they compute."""

import functools

import jax
import jax.numpy as jnp

from ssm import sequence as seq


def also_empty(call):
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


def checked(layer, x, state, sequence):
    """What every mixer checks first: x [B, L, layer.features], a sequence that fits it
    and a state of the kind that `layer.init_state` gives. Returns the Sequence."""
    return _begin(layer, x, (layer.features,), state, sequence)


def checked_frames(layer, x, state, sequence):
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


def at_least_one(layer, *names):
    """Raises a `ValueError` naming the first of these fields that is below 1."""
    for name in names:
        if getattr(layer, name) < 1:
            raise ValueError(f"{name}: must be at least 1, got {getattr(layer, name)}")


def at_least_zero(layer, *names):
    """The same for fields whose 0 has a meaning of its own."""
    for name in names:
        if getattr(layer, name) < 0:
            raise ValueError(
                f"{name}: must be 0 or positive, got {getattr(layer, name)}"
            )


def check_state(state, expected):
    """Raises a `ValueError` naming `state` unless it is None or has the structure and
    shapes of `expected`, what `init_state` returns for this batch."""
    if state is None:
        return
    found = jax.tree.map(jnp.shape, state)
    wanted = jax.tree.map(jnp.shape, expected)
    if found != wanted:
        raise ValueError(
            f"state: must be None or what init_state gives, {wanted}, got {found}"
        )


def no_initial_state(layer):
    """The error of `init_state` on a bidirectional layer."""
    return ValueError(
        f"bidirectional: {layer} has no recurrent mode with bidirectional=True; "
        "init_state needs bidirectional=False"
    )


def refuse_dt(layer, sequence):
    """Raises a `ValueError` naming dt, for which the taps of a filter have no place."""
    if sequence.dt is not None:
        raise ValueError(
            f"dt: the filters of {type(layer).__name__} have taps at regular steps; "
            "pass None"
        )


def within_length(layer, x):
    """Raises a `ValueError` naming `length` where a call has more tokens."""
    at_least_one(layer, "length")
    if x.shape[1] > layer.length:
        raise ValueError(
            f"length: {type(layer).__name__} has filters of {layer.length} taps, got a "
            f"call of {x.shape[1]} tokens; build it with length={x.shape[1]}"
        )
