"""Recurrences whose length is spread over devices, inside of `jax.shard_map`.

Every device scans its own part from nothing, which gives what the part adds to a state
and how it carries one on, (final, transition). One all-gather of these, as large as
that many states whatever the length, tells each device the state that enters its part,
with which it scans again: LASP-2, https://arxiv.org/abs/2502.07563, for any transition.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels import pairs, varying

Axes = tuple[str, ...]


def decayed(transition: jax.Array, state: jax.Array) -> jax.Array:
    """A decay [B, ...] on a state [B, ..., ...] with as many axes, or more."""
    behind = tuple(range(transition.ndim, state.ndim))
    return jnp.expand_dims(transition, behind) * state


def of(
    call: Callable,
    state: int,
    *,
    reverse: bool,
    return_transition: bool,
    carry: Callable[[jax.Array, jax.Array], jax.Array] = decayed,
) -> Callable:
    """relayed(axes, *arguments) for `kernels.shards.run`: `scan` of an operation.

    Args:
        call: call(*arguments, return_transition=), of one device.
        state: which of the arguments is the initial state.
        reverse, return_transition: as `call` has them.
        carry: as in `scan`.
    """

    def relayed(axes, *arguments):
        before, after = arguments[:state], arguments[state + 1 :]

        def part(entering, **options):
            return call(*before, entering, *after, **options)

        return scan(
            axes,
            part,
            arguments[state],
            reverse=reverse,
            return_transition=return_transition,
            carry=carry,
        )

    return relayed


def scan(
    axes: Axes,
    call: Callable,
    state: jax.Array | None,
    *,
    reverse: bool,
    return_transition: bool,
    carry: Callable[[jax.Array, jax.Array], jax.Array] = decayed,
) -> tuple[jax.Array, ...]:
    """A scan over the length that is spread over `axes` of the mesh.

    Args:
        axes: by their order, the parts follow each other.
        call: call(state, return_transition=) scans the device's own part:
            (y, final), or (y, final, transition).
        state: before the first token, None for zeros.
        reverse: whether `call` runs from the last token to the first.
        return_transition: also return the transition of the whole.
        carry: carry(transition, state) is what becomes of a state.

    Returns:
        y of the own part; the final state and transition of the whole, the same on all
        devices.
    """
    _, final, transition = call(None, return_transition=True)
    entering, last, total = passed(
        axes, final, transition, state, carry, reverse, return_transition
    )
    y, *_ = call(entering, return_transition=False)
    return (y, last, total) if return_transition else (y, last)


def passed(
    axes: Axes,
    final: jax.Array,
    transition: jax.Array,
    state: jax.Array | None,
    carry: Callable = decayed,
    reverse: bool = False,
    return_transition: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The state that enters the device's part; the state after all parts, and the
    transition of them all (or None), the same on all devices.

    Args:
        final, transition: of the device's part, the first without a state before it.
        state: before the first part, None for zeros. All else as in `scan`.
    """
    finals, transitions = (_gathered(axes, x) for x in (final, transition))
    dtype = final.dtype
    if state is not None:
        dtype = jnp.promote_types(dtype, state.dtype)
    start = jnp.zeros(final.shape, dtype) if state is None else state.astype(dtype)
    start = varying.like(start, finals, transitions)

    def one(state, part):
        final, transition = part
        return carry(transition, state).astype(dtype) + final, state

    parts = finals, transitions
    last, entering = jax.lax.scan(one, start, parts, reverse=reverse)
    rank = jax.lax.axis_index(axes)
    first = (jax.lax.axis_size(axes) - 1) if reverse else 0
    total = None
    if return_transition:
        total = transitions[::-1] if reverse else transitions
        total, _ = jax.lax.scan(
            lambda total, part: (carry(part, total), None), total[0], total[1:]
        )
    return entering[rank], *_everywhere(axes, rank == first, last, total)


def _gathered(axes, x):
    """x of every device. Of complex numbers in parts: the gradient of a gather is a
    reduce-scatter, of which a TPU has none for them."""
    return pairs.join(tuple(jax.lax.all_gather(p, axes) for p in pairs.split(x)))


def _everywhere(axes, here, *arrays):
    """What all devices have, as what does not vary over them."""

    def one(x):
        parts = (jax.lax.psum(jnp.where(here, p, 0), axes) for p in pairs.split(x))
        return pairs.join(tuple(parts))

    return jax.tree.map(one, arrays)


def neighbour(axes: Axes, x: jax.Array, reverse: bool = False) -> jax.Array:
    """What the device of the part before (with `reverse`, behind) has; zeros at the
    end."""
    count = jax.lax.axis_size(axes)
    links = [(i, i + 1) for i in range(count - 1)]
    if reverse:
        links = [(b, a) for a, b in links]
    return jax.lax.ppermute(x, axes, links)


def window(
    axes: Axes,
    tail: jax.Array,
    length: int,
    cut: jax.Array | None,
    state: jax.Array | None,
    reverse: bool,
) -> tuple[jax.Array, jax.Array]:
    """The window of inputs that enters the device's part, and that behind all parts.

    Args:
        tail: [B, W, H] the last inputs of the part (with `reverse` the first), in order
            of time, where nothing was before it.
        length: of a part. Of W tokens or more, what enters is a neighbour's alone.
        cut: [B] bool, whether a reset lies in the part; None if there are none.
        state: [B, W, H] before the first part; None for zeros.
        reverse: whether the parts follow each other from the last to the first.
    """
    W, dtype = tail.shape[1], tail.dtype
    if state is not None:
        dtype = jnp.promote_types(dtype, state.dtype)
    tail = tail.astype(dtype)
    start = jnp.zeros(tail.shape, dtype) if state is None else state.astype(dtype)
    rank = jax.lax.axis_index(axes)
    first, final = 0, jax.lax.axis_size(axes) - 1
    if reverse:
        first, final = final, first
    if length >= W:
        entering = jnp.where(rank == first, start, neighbour(axes, tail, reverse))
        return entering, *_everywhere(axes, rank == final, tail)
    carried = jnp.ones(tail.shape[0], dtype) if cut is None else (~cut).astype(dtype)

    def shifted(kept, state):
        if reverse:
            moved = jnp.pad(state[:, : W - length], ((0, 0), (length, 0), (0, 0)))
        else:
            moved = jnp.pad(state[:, length:], ((0, 0), (0, length), (0, 0)))
        return kept[:, None, None] * moved

    entering, last, _ = passed(
        axes, tail, varying.like(carried, tail), start, shifted, reverse, False
    )
    return entering, last
