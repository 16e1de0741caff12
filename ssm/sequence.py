"""What accompanies a sequence: which tokens exist, where it restarts, when they came.

`mask`   a masked token (False) does not exist: the state passes it unchanged and its
         output is 0, wherever it stands.
`reset`  the state starts anew before this token; on a masked token it applies to the
         next one that exists (in a later call, if there is none in this one).
`dt`     time since the previous token in units of the nominal step; 1 equals None.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kernels import varying


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["mask", "reset", "dt"],
    meta_fields=["compacted"],
)
@dataclass(frozen=True)
class Sequence:
    """Optional companions of x [B, L, ...].

    Attributes:
        mask: [B, L] bool, True where a token exists.
        reset: [B, L] bool, True where the state starts anew before the token.
        dt: [B, L] float > 0, elapsed time relative to the nominal step.
        compacted: static; True promises that masked tokens stand only at the end.
    """

    mask: jax.Array | None = None
    reset: jax.Array | None = None
    dt: jax.Array | None = None
    compacted: bool = False


def check(x: Any, sequence: Sequence | None, name: str = "x") -> Sequence:
    """Raises a `ValueError` naming the argument unless x is [B, L >= 1, ...] and every
    field of `sequence` is [B, L] of the right kind. Returns a Sequence, empty for None.
    """
    if not hasattr(x, "ndim"):
        raise ValueError(f"{name}: must be an array, got {type(x).__name__}")
    if x.ndim < 2:
        raise ValueError(f"{name}: must be [B, L, ...], got shape {x.shape}")
    if x.shape[1] == 0:
        raise ValueError(
            f"{name}: the length L must be at least 1, got shape {x.shape}"
        )
    if sequence is None:
        return Sequence()
    if not isinstance(sequence, Sequence):
        raise ValueError(
            f"sequence: must be a ssm.Sequence or None, got {type(sequence).__name__}"
        )
    for field, kind in (
        ("mask", jnp.bool_),
        ("reset", jnp.bool_),
        ("dt", jnp.floating),
    ):
        value = getattr(sequence, field)
        if value is None:
            continue
        if not hasattr(value, "shape"):
            raise ValueError(
                f"{field}: must be an array [B, L], got {type(value).__name__}"
            )
        if value.shape != x.shape[:2]:
            raise ValueError(
                f"{field}: must have shape [B, L] = {x.shape[:2]}, got {value.shape}"
            )
        if not jnp.issubdtype(value.dtype, kind):
            raise ValueError(
                f"{field}: must be {kind.__name__.rstrip('_')}, got {value.dtype}"
            )
    return sequence


def elapsed(sequence: Sequence) -> jax.Array | None:
    """Time since the previous token with 0 on masked ones [B, L], float32 or better, or
    None if regular.

    Elapsed time 0 leaves a held-input state exactly as it was, so the mask needs no
    other treatment in a scan (besides a zero input where the input is an impulse).
    """
    dt = sequence.dt
    if dt is not None:
        # Sums of times in bfloat16 would stop growing at 256.
        dt = dt.astype(jnp.promote_types(dt.dtype, jnp.float32))
    if sequence.mask is None:
        return dt
    dt = jnp.ones(sequence.mask.shape, jnp.float32) if dt is None else dt
    return jnp.where(sequence.mask, dt, 0.0)


def stretched(x: jax.Array, sequence: Sequence) -> jax.Array:
    """x [B, L, ...] times the time since the previous token, 0 on masked ones: what a
    step or a rate per token, of the nominal length, is in that time."""
    times = elapsed(sequence)
    return x if times is None else x * _over(times, x)


def _over(flags, x):
    """`flags` [B, ...] as an array that broadcasts against x [B, ..., ...]."""
    return jnp.expand_dims(flags, tuple(range(flags.ndim, x.ndim)))


def zero_masked(x: jax.Array, sequence: Sequence) -> jax.Array:
    """x [B, L, ...] with masked tokens set to exactly 0 (also where they were NaN)."""
    if sequence.mask is None:
        return x
    mask = sequence.mask.reshape(sequence.mask.shape + (1,) * (x.ndim - 2))
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def not_finite(x: jax.Array) -> jax.Array:
    """Which tokens of x [B, L, ...] have a value that is not finite, [B, L] bool."""
    return ~jnp.all(jnp.isfinite(x), axis=tuple(range(2, x.ndim)))


def lengths(mask: jax.Array) -> jax.Array:
    """Number of existing tokens per row, [B] int32."""
    return jnp.sum(mask, axis=1, dtype=jnp.int32)


def compact(
    x: jax.Array, sequence: Sequence
) -> tuple[jax.Array, Sequence, Callable[[jax.Array], jax.Array]]:
    """Moves existing tokens to the front, in order, so that only right padding is left.

    Returns x [B, L, ...] with masked tokens zeroed, the matching Sequence (resets of
    masked tokens moved onto the next existing one, or onto the first padding), and
    `restore`, which scatters [B, L, ...] back to the original places with 0 on masked
    tokens. Without a mask nothing moves.
    """
    if sequence.mask is None:
        return x, sequence, lambda y: y
    if sequence.compacted:
        return zero_masked(x, sequence), sequence, lambda y: zero_masked(y, sequence)

    order = jnp.argsort(~sequence.mask, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    gather = _gather_along_length(order)
    count = lengths(sequence.mask)
    mask = jnp.arange(sequence.mask.shape[1]) < count[:, None]
    compacted = Sequence(
        mask=mask,
        reset=_compact_reset(sequence, gather, count),
        dt=None if sequence.dt is None else jnp.where(mask, gather(sequence.dt), 1.0),
        compacted=True,
    )

    def restore(y):
        return zero_masked(_gather_along_length(back)(y), sequence)

    return zero_masked(gather(x), compacted), compacted, restore


def _gather_along_length(index) -> Callable:
    def gather(x):
        expanded = index.reshape(index.shape + (1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, expanded, axis=1)

    return gather


def _compact_reset(sequence, gather, count):
    """A real token resets if any reset stood after the previous one, up to it."""
    if sequence.reset is None:
        return None
    segment = jnp.cumsum(sequence.reset, axis=1)
    gathered = gather(segment)
    # Padding takes the segment in which the row ends, so that a reset behind the last
    # real token stays on the first padding and reaches the final state.
    position = jnp.arange(gathered.shape[1])
    gathered = jnp.where(position < count[:, None], gathered, segment[:, -1:])
    previous = jnp.concatenate(
        [jnp.zeros_like(gathered[:, :1]), gathered[:, :-1]], axis=1
    )
    return gathered > previous


def align_right(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Rolls every row of a right-padded x [B, L, ...] so that its padding comes first:
    the last existing token then stands at L - 1. Padding must already be zero."""
    shift = mask.shape[1] - lengths(mask)
    index = (jnp.arange(mask.shape[1]) - shift[:, None]) % mask.shape[1]
    return _gather_along_length(index)(x)


def window(before: jax.Array, x: jax.Array, sequence: Sequence) -> jax.Array:
    """The last W values that exist, [B, W, ...]: what a finite response keeps.

    before [B, W, ...] are the values before x [B, L, ...], in order of time; values
    beyond a reset are 0, as if nothing had ever been there. x has right padding only
    (see `compact`); a reset on padding empties the whole window.
    """
    W, L = before.shape[1], x.shape[1]
    x = zero_masked(x, sequence).astype(before.dtype)
    values = jnp.concatenate([before, x], axis=1)
    if sequence.mask is None:
        last, index = values[:, L:], None
    else:
        index = lengths(sequence.mask)[:, None] + jnp.arange(W)
        last = _gather_along_length(index)(values)
    if sequence.reset is None:
        return last
    segment = jnp.cumsum(sequence.reset, axis=1)
    segments = jnp.pad(segment, ((0, 0), (W, 0)))
    last_segments = (
        segments[:, L:] if index is None else jnp.take_along_axis(segments, index, 1)
    )
    current = Sequence(mask=last_segments == segment[:, -1:])
    return zero_masked(last, current)


def begun(
    before: jax.Array, sequence: Sequence, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Whether something came before each token, [B, L] bool, and before the next call,
    [B] bool: False at the first token of a sequence and after a reset.

    before [B] bool says it of the first token; shape is (B, L). Right padding only.
    """
    started = jnp.ones(shape, bool).at[:, 0].set(before)
    after = jnp.ones(shape[:1], bool)
    if sequence.mask is not None:
        after = before | sequence.mask[:, 0]
    if sequence.reset is not None:
        started = started & ~sequence.reset
        if sequence.mask is not None:
            after = after & ~jnp.any(sequence.reset & ~sequence.mask, axis=1)
    return started, after


def loop(
    step: Callable,
    state: Any,
    inputs: Any,
    sequence: Sequence,
    weights: Any,
    output: Callable = lambda state: state,
) -> tuple[jax.Array, Any]:
    """A recurrence token by token, for what no scan makes parallel.

    A masked token leaves the state as it was, a reset makes it 0 before the token.

    Args:
        step: (state, input [B, ...]) -> the next state.
        state: tree of [B, ...].
        inputs: [B, L, ...].
        sequence: of x [B, L, ...].
        weights: tree of the arrays that `step` reads besides.
        output: what of a state is kept of every token.

    Returns:
        The outputs [B, L, ...], 0 on masked tokens, and the last state.
    """

    def body(state, token):
        u, exists, reset = token
        if reset is not None:
            state = jax.tree.map(lambda s: jnp.where(_over(reset, s), 0, s), state)
        new = step(state, u)
        if exists is not None:
            new = jax.tree.map(
                lambda n, s: jnp.where(_over(exists, n), n, s), new, state
            )
        return new, output(new)

    tokens = (inputs, sequence.mask, sequence.reset)
    state = varying.like(state, tokens, weights)
    tokens = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), tokens)
    state, y = jax.lax.scan(body, state, tokens)
    return zero_masked(jnp.swapaxes(y, 0, 1), sequence), state
