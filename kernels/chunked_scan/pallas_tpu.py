"""On TPUs: a program walks through the chunks of a head with the state in fast memory.

For every chunk it makes u = U - W S (u = v without the delta rule), the outputs and the
next state, and writes the state before it. The backward pass walks from the end with
the gradient of the state, and makes all gradients of a chunk at once. Decays, cumulated
inside chunks, and U and W of the delta rule come from XLA, see decay.py and wy.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import blocks, compat, segments
from kernels.chunked_scan import wy

CHUNK = 128  # steps: the width of the matrix unit


def unsupported(q, v, log_decay, beta) -> str | None:
    if log_decay is not None and log_decay.ndim == 4:
        return "takes no decay per channel"
    return blocks.unsupported(q, v)


def chunked_scan(q, k, v, log_decay, beta, state, into):
    """o [B, L, H, V] and the final state; see reference.chunked_scan."""
    batch, length, _, _ = v.shape
    segment = None if into is None else segments.ids(into)
    g = log_decay.astype(state.dtype)
    W = None
    if beta is not None:
        v, W = wy.system(k, v, g, beta.astype(state.dtype), segment, CHUNK)
    if segment is None:
        segment = jnp.zeros((batch, length), jnp.int32)
    extra = -length % CHUNK

    def padded(x, mode="constant"):
        return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2), mode=mode)

    q, k, v, W = (None if x is None else padded(x).swapaxes(1, 2) for x in (q, k, v, W))
    number = padded(segment, "edge").reshape(batch, 1, -1, CHUNK).astype(g.dtype)
    g = padded(g).swapaxes(1, 2).reshape(batch, state.shape[1], -1, CHUNK)
    o, final = _scan(q, k, v, W, g, number, state)
    return o.swapaxes(1, 2)[:, :length], final


@jax.custom_vjp
def _scan(q, k, U, W, g, number, state):
    """q, k [B, G, L, K], U [B, H, L, V], W [B, H, L, K] or None, g [B, H, C, T],
    number [B, 1, C, T] of the segments, state [B, H, K, V]; L = C T."""
    o, final, _ = _walk(q, k, U, W, _weights(g, number), state)
    return o, final


def _forward_rule(q, k, U, W, g, number, state):
    weights = _weights(g, number)
    o, final, states = _walk(q, k, U, W, weights, state)
    return (o, final), (q, k, U, W, weights, states)


def _backward_rule(saved, cotangents):
    q, k, U, W, weights, states = saved
    d_out, d_final = cotangents
    dq, dk, dU, dW, dg, d_state = _walk_back(
        q, k, U, W, weights, states, d_out, d_final
    )
    batch, groups, length, modes = k.shape

    def of_group(x, like):
        x = x.reshape(batch, groups, -1, length, modes).sum(2)
        return x.astype(like.dtype)

    return of_group(dq, q), of_group(dk, k), dU, dW, dg, None, d_state


_scan.defvjp(_forward_rule, _backward_rule)


def _weights(g, number):
    """[B, H, C, 8, T]: rows of G in two parts (see decay.scalar), segment numbers, how
    much of the state before a chunk reaches a token, of a token the state behind, and
    of the state before the state behind: -1 where a reset lies between."""
    unknown = jnp.isnan(g)
    # NaN reaches the rest of its segment, and no other
    latest = jax.lax.cummax(jnp.where(unknown, number, -1), 3)
    g = jnp.where(unknown, 0, jnp.maximum(g, -1e4))
    coarse = jnp.round(16 * g) / 16
    G = jnp.where(latest == number, jnp.nan, jnp.cumsum(coarse, -1))
    F = jnp.cumsum(g - coarse, -1)
    before = jnp.pad(number[:, :, :-1, -1:], ((0, 0), (0, 0), (1, 0), (0, 0)))
    after = number[..., -1:]
    enter = jnp.where(number == before, jnp.exp(G + F), -1)
    leave = jnp.exp((G[..., -1:] - G) + (F[..., -1:] - F))
    leave = jnp.where(number == after, leave, -1)
    through = jnp.where(before == after, jnp.exp(G + F)[..., -1:], -1)
    rows = (G, F, jnp.broadcast_to(number, g.shape), enter, leave)
    rows = (*rows, jnp.broadcast_to(through, g.shape))
    rows = jnp.stack(rows, -2)
    return jnp.pad(rows, [(0, 0)] * 3 + [(0, 2), (0, 0)])


def _specs(q, U, reverse):
    """The grid and the blocks of what has the groups' shape, the heads', one matrix
    per chunk, one per head, and the weights."""
    batch, heads, length, values = U.shape
    groups, modes = q.shape[1], q.shape[-1]
    chunks = length // CHUNK

    def chunk(c):
        return chunks - 1 - c if reverse else c

    def tokens(width, per):
        # `//` asks for the sign, whose lowering asks a TPU that may not be there
        return pl.BlockSpec(
            (None, None, CHUNK, width),
            lambda b, h, c: (b, jax.lax.div(h, jnp.int32(per)), chunk(c), 0),
        )

    return (
        (batch, heads, chunks),
        tokens(modes, heads // groups),
        tokens(modes, 1),
        tokens(values, 1),
        pl.BlockSpec(
            (None, None, None, modes, values), lambda b, h, c: (b, h, chunk(c), 0, 0)
        ),
        pl.BlockSpec((None, None, modes, values), lambda b, h, c: (b, h, 0, 0)),
        pl.BlockSpec(
            (None, None, None, 8, CHUNK), lambda b, h, c: (b, h, chunk(c), 0, 0)
        ),
    )


SEMANTICS = ("parallel", "parallel", "arbitrary")


def _walk(q, k, U, W, weights, state):
    """o, the final state, and the state before every chunk [B, H, C, K, V]."""
    grid, keys, per_head, values, states, matrix, rows = _specs(q, U, False)
    shape = jax.ShapeDtypeStruct
    delta_rule = W is not None
    return compat.pallas_tpu_call(
        partial(_walk_kernel, delta_rule=delta_rule),
        grid=grid,
        semantics=SEMANTICS,
        in_specs=[keys, keys, values, rows, matrix] + [per_head] * delta_rule,
        out_specs=[values, matrix, states],
        out_shape=[
            shape(U.shape, U.dtype),
            shape(state.shape, state.dtype),
            shape((*state.shape[:2], grid[2], *state.shape[2:]), state.dtype),
        ],
        scratch_shapes=[pltpu.VMEM(state.shape[2:], state.dtype)],
    )(q, k, U, weights, state, *[W] * delta_rule)


def _walk_back(q, k, U, W, weights, states, d_out, d_final):
    grid, keys, per_head, values, matrices, matrix, rows = _specs(q, U, True)
    shape = jax.ShapeDtypeStruct
    delta_rule = W is not None
    dtype = states.dtype
    batch, heads, length, _ = U.shape
    per_token = shape((batch, heads, length, q.shape[-1]), dtype)
    outputs = compat.pallas_tpu_call(
        partial(_walk_back_kernel, delta_rule=delta_rule),
        grid=grid,
        semantics=SEMANTICS,
        in_specs=[keys, keys, values, rows, matrices, values, matrix]
        + [per_head] * delta_rule,
        out_specs=[per_head, per_head, values, rows, matrix] + [per_head] * delta_rule,
        out_shape=[
            per_token,
            per_token,
            shape(U.shape, U.dtype),
            shape((*grid, 8, CHUNK), dtype),
            shape(d_final.shape, dtype),
        ]
        + [shape(W.shape, W.dtype) for _ in range(delta_rule)],
        scratch_shapes=[pltpu.VMEM(d_final.shape[2:], dtype)],
    )(q, k, U, weights, states, d_out, d_final, *[W] * delta_rule)
    dq, dk, dU, d_rows, d_state, *dW = outputs
    dW = dW[0] if dW else None
    return dq, dk, dU, dW, d_rows[..., 0, :], d_state


def _dot(a, b, contract=((1,), (0,))):
    """In full precision where the inputs have it."""
    wide = a.dtype.itemsize > 2
    return jax.lax.dot_general(
        a,
        b.astype(a.dtype),
        (contract, ((), ())),
        precision=jax.lax.Precision.HIGHEST if wide else None,
        preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
    )


COLUMNS = ((1,), (1,))  # a @ b.T
ROWS = ((0,), (0,))  # a.T @ b


def _decays(rows):
    """Between tokens [T, T], then enter, leave as columns and through as [1, 1]; -1
    where nothing passes."""
    G, F, number, enter, leave, through = (rows[i : i + 1] for i in range(6))
    columns = [blocks.column(x) for x in (G, F, number, enter, leave)]
    i = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0)
    j = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)
    linked = (i >= j) & (columns[2] == number)
    span = (columns[0] - G) + (columns[1] - F)
    between = jnp.where(linked, jnp.exp(jnp.where(linked, span, 0)), -1)
    return between, columns[3], columns[4], through[:, :1]


def _linked(weight, x):
    """weight x, or 0 where the weight is -1: 0 times what is not finite is NaN."""
    return jnp.where(weight < 0, 0, weight * x)


def _reached(weight, x):
    """x, or 0 where the weight is -1."""
    return jnp.where(weight < 0, 0, x)


def _walk_kernel(q_ref, k_ref, u_ref, rows_ref, state_ref, *refs, delta_rule):
    w_ref, (o_ref, final_ref, states_ref, carry) = None, refs[-4:]
    if delta_rule:
        w_ref = refs[0]

    @pl.when(pl.program_id(2) == 0)
    def _():
        carry[...] = state_ref[...]

    S = carry[...]
    states_ref[...] = S
    q, k, u = q_ref[...], k_ref[...], u_ref[...]
    between, enter, leave, through = _decays(rows_ref[...])
    if delta_rule:
        u = (u - _reached(enter, _dot(w_ref[...], S))).astype(k.dtype)
    scores = _linked(between, _dot(q, k, COLUMNS)).astype(q.dtype)
    o_ref[...] = (_dot(scores, u) + _linked(enter, _dot(q, S))).astype(o_ref.dtype)
    increment = _dot(_linked(leave, k).astype(k.dtype), _reached(leave, u), ROWS)
    S = _linked(through, S) + increment
    carry[...] = S
    final_ref[...] = S


def _walk_back_kernel(
    q_ref, k_ref, u_ref, rows_ref, states_ref, do_ref, d_final_ref, *refs, delta_rule
):
    w_ref = refs[0] if delta_rule else None
    refs = refs[1:] if delta_rule else refs
    dq_ref, dk_ref, du_ref, d_rows_ref, d_state_ref, *dw_ref, carry = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        carry[...] = d_final_ref[...]

    S, dS = states_ref[...], carry[...]
    q, k, u = q_ref[...], k_ref[...], u_ref[...]
    do = do_ref[...].astype(q.dtype)
    dtype = k.dtype
    between, enter, leave, through = _decays(rows_ref[...])
    if delta_rule:
        u = u - _reached(enter, _dot(w_ref[...], S))
    u = u.astype(dtype)
    scores = _linked(between, _dot(q, k, COLUMNS))
    d_scores = _dot(do, u, COLUMNS)
    du = _dot(scores.astype(dtype), do, ROWS) + _linked(leave, _dot(k, dS))
    dq = _linked(enter, _dot(do, S, COLUMNS))
    dk = _linked(leave, _dot(u, dS, COLUMNS))
    # each decay times its gradient; g of step t is in the decay from j to i where
    # j < t <= i. Summed as that: differences of sums would lose what is small
    t = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    other = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    until = (t <= other).astype(scores.dtype)  # [t, i]
    before = (other < t).astype(scores.dtype)  # [t, j]
    inner = _sums(before * _dot(until, scores * d_scores))
    entered, left = _sums(q * dq), _sums(k * dk)
    dg = inner + _dot(entered, until, COLUMNS) + _dot(left, before, COLUMNS)
    products = jnp.sum(S * dS, keepdims=True).reshape(1, 1)
    dg = dg + _linked(through, products)
    d_rows_ref[0:1, :] = dg
    d_scores = _linked(between, d_scores).astype(dtype)
    dq_ref[...] = dq + _dot(d_scores, k)
    dk_ref[...] = dk + _dot(d_scores, q, ROWS)
    du_ref[...] = du.astype(du_ref.dtype)
    increment = _dot(_linked(enter, q).astype(dtype), _reached(enter, do), ROWS)
    dS = _linked(through, dS) + increment
    if delta_rule:
        du = _reached(enter, du.astype(dtype))
        dW = _reached(enter, -_dot(du, S, COLUMNS))
        dw_ref[0][...] = dW.astype(dw_ref[0].dtype)
        dS = dS - _dot(w_ref[...], du, ROWS)
    carry[...] = dS
    d_state_ref[...] = dS


def _sums(x):
    """The sums of the rows of x [T, *], as a row [1, T]."""
    return _dot(jnp.ones((1, x.shape[1]), x.dtype), x, COLUMNS)
