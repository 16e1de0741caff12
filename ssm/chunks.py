"""Long sequences piece by piece, with the states between pieces as only residuals."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.tree_util import Partial

from kernels import relay, shards, varying


def bound(function: Callable) -> Partial:
    """A function as a tree of the arrays that it was bound to (`functools.partial`).

    Only these can be told to vary over devices as what the function is called with
    does; a gradient of what it has in its closure is added up in every chunk.
    """
    if isinstance(function, Partial):
        return function
    if isinstance(function, functools.partial):
        return Partial(function.func, *function.args, **function.keywords)
    return Partial(function)


def in_chunks(
    body: Callable[..., tuple[jax.Array, jax.Array]],
    state: jax.Array,
    u: jax.Array,
    elapsed: jax.Array | None,
    reset: jax.Array | None,
    chunk: int,
    reverse: bool = False,
    alone: Callable[..., jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs body(state, u, elapsed, reset) -> (state, y) over pieces of the length axis,
    keeping only the states between pieces for the backward pass.

    Args:
        body: `bound` to all that it reads besides.
        state: [B, ...]; u: [B, L, ...]; elapsed, reset: [B, L] or None.
        chunk: tokens of a piece.
        reverse: from the last piece to the first.
        alone: of a diagonal recurrence, the same without outputs:
            alone(state, u, elapsed, reset) -> state, of a state whose last axis is
            twice as long. Its first half runs with the inputs, its second half without.
            What it says of a part is enough for devices that split the length
            (`kernels.relay`); without it they do not.
    """
    body = bound(body)
    alone = None if alone is None else bound(alone)
    if shards.active():

        def call(body, alone, state, *pieces):
            return in_chunks(body, state, *pieces, chunk, reverse, alone)

        def relayed(axes, body, alone, state, *pieces):
            final, transition = _summary(alone, state, pieces, chunk, reverse)
            entering, last, _ = relay.passed(
                axes, final, transition, state, reverse=reverse, return_transition=False
            )
            return call(body, alone, entering, *pieces)[0], last

        whole, rows, each = shards.WHOLE, shards.BY_ROW, shards.BY_TOKEN
        return shards.run(
            call,
            (body, alone, state, u, elapsed, reset),
            (whole, whole, rows, each, each, each),
            (each, rows),
            None if alone is None else relayed,
        )
    L = u.shape[1]
    body, state, u, elapsed, reset = varying.together(body, state, u, elapsed, reset)
    if chunk >= L:
        state, y = body(state, u, elapsed, reset)
        return y, state
    pieces = (u, elapsed, reset)
    pure, constants = _converted(body, state, pieces, chunk)
    if varying.axes(constants) - varying.axes(state):
        # the state that leaves a chunk varies as all that made it
        state, pieces = varying.like((state, pieces), constants)
        pure, constants = _converted(body, state, pieces, chunk)
    split = L // chunk * chunk
    first, rest = (
        jax.tree.map(lambda x, part=part: x[:, part], pieces)
        for part in (slice(split), slice(split, None))
    )

    def over(state):
        return _chunks(pure, chunk, reverse, constants, state, first)

    if split == L:
        return over(state)
    last = jax.checkpoint(body)
    if reverse:
        state, y_last = last(state, *rest)
        y, state = over(state)
    else:
        y, state = over(state)
        state, y_last = last(state, *rest)
    return jnp.concatenate([y, y_last], axis=1), state


def _summary(alone, state, pieces, chunk, reverse):
    """Of a part: its final state from nothing, and the decay of what enters it."""
    N = state.shape[-1]
    start = jnp.concatenate([jnp.zeros_like(state), jnp.ones_like(state)], -1)

    _, both = in_chunks(Partial(_silent, alone), start, *pieces, chunk, reverse)
    return both[..., :N], both[..., N:]


def _silent(alone, state, u, elapsed, reset):
    nothing = varying.like(jnp.zeros((*u.shape[:2], 0), u.dtype), u)
    return alone(state, u, elapsed, reset), nothing


def _converted(body, state, pieces, chunk):
    example = jax.tree.map(lambda x: x[:, :chunk], pieces)
    return jax.closure_convert(body, state, *example)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunks(body, chunk, reverse, constants, state, pieces):
    """The loop over whole chunks. Chunks are sliced out of and written into [B, L, ...]
    in place: a `lax.scan` over stacked chunks would copy every array twice."""
    return _run_chunks(body, chunk, reverse, constants, state, pieces)[0]


def _run_chunks(body, chunk, reverse, constants, state, pieces):
    count = pieces[0].shape[1] // chunk
    first = jax.tree.map(lambda x: x[:, :chunk], pieces)
    _, like = jax.eval_shape(body, state, *first, *constants)
    y = jnp.zeros((like.shape[0], count * chunk, *like.shape[2:]), like.dtype)
    states = jnp.zeros((count, *state.shape), state.dtype)
    y, states = varying.like((y, states), state)

    def run(i, carry):
        state, y, states = carry
        k = count - 1 - i if reverse else i
        states = states.at[k].set(state)
        state, part = body(state, *_piece(pieces, k, chunk), *constants)
        return state, _put(y, part, k, chunk), states

    results = jax.lax.fori_loop(0, count, run, (state, y, states))
    # A policy of `jax.checkpoint` that keeps this name spares a second forward pass.
    state, y, states = checkpoint_name(results, "chunks")
    return (y, state), (constants, states, pieces)


def _chunks_backward(body, chunk, reverse, saved, cotangents):
    constants, states, pieces = saved
    dy, dstate = cotangents
    count = len(states)
    # Only what is real-valued has a gradient: flags have none.
    u, elapsed, _ = pieces
    zeros = jax.tree.map(jnp.zeros_like, (constants, u, elapsed))

    def run(i, carry):
        dstate, dconstants, du, delapsed = carry
        k = i if reverse else count - 1 - i
        u_k, elapsed_k, reset_k = _piece(pieces, k, chunk)

        def call(constants, state, u, elapsed):
            return body(state, u, elapsed, reset_k, *constants)

        _, pull = jax.vjp(call, constants, states[k], u_k, elapsed_k)
        dy_k = jax.lax.dynamic_slice_in_dim(dy, k * chunk, chunk, 1)
        dconstants_k, dstate, du_k, delapsed_k = pull((dstate, dy_k))
        dconstants = jax.tree.map(jnp.add, dconstants, dconstants_k)
        du = _put(du, du_k, k, chunk)
        if delapsed is not None:
            delapsed = _put(delapsed, delapsed_k, k, chunk)
        return dstate, dconstants, du, delapsed

    start = (dstate, *zeros)
    dstate, dconstants, du, delapsed = jax.lax.fori_loop(0, count, run, start)
    return dconstants, dstate, (du, delapsed, None)


_chunks.defvjp(_run_chunks, _chunks_backward)


def _piece(arrays, k, chunk):
    """Chunk k of every array [B, L, ...]."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, k * chunk, chunk, 1), arrays
    )


def _put(array, part, k, chunk):
    return jax.lax.dynamic_update_slice_in_dim(array, part, k * chunk, 1)
