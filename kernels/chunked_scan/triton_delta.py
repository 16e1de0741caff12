"""The delta rule on GPUs, on the kernels of triton_decay.py.

A chunk writes u = U - W S, where XLA makes U and W of all chunks at once (wy.py). The
walk through the chunks finds u on its way, and with it for v the outputs are those of
plain decay. Backward, the walk finds the gradient of u.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from kernels.chunked_scan import triton_decay as plain
from kernels.chunked_scan import wy
from kernels.compat import triton_call


def scan(q, k, v, g, beta, state, segment):
    """o and the final state; arguments as of chunked_scan, g and beta in the state's
    dtype."""
    U, W = wy.system(k, v, g, beta, segment, plain.chunk(k))
    return _scan(q, k, U, W, g, state, segment)


@jax.custom_vjp
def _scan(q, k, U, W, g, state, segment):
    states, u, final = _walk(k, U, W, g, state, segment)
    return plain.outputs(q, k, u, g, states, segment), final


def _forward_rule(q, k, U, W, g, state, segment):
    return _scan(q, k, U, W, g, state, segment), (q, k, U, W, g, state, segment)


def _backward_rule(saved, cotangents):
    q, k, U, W, g, state, segment = saved
    d_out, d_final = cotangents
    states, u, _ = _walk(k, U, W, g, state, segment)
    d_states, du, d_state = _walk_back(q, k, W, d_out, g, d_final, segment)
    dq, dk, _, dg = plain.gradients(q, k, u, d_out, g, states, d_states, segment)
    # u = U - W S in every chunk
    batch, length, heads, values = U.shape
    size = plain.chunk(k)
    by_chunk = jnp.pad(du, ((0, 0), (0, -length % size), (0, 0), (0, 0)))
    by_chunk = by_chunk.reshape(batch, -1, size, heads, values).astype(states.dtype)
    dW = -jnp.einsum(
        "bcthv,bhckv->bcthk",
        by_chunk,
        states,
        precision="highest",
        preferred_element_type=g.dtype,
    )
    dW = dW.reshape(batch, -1, *W.shape[2:])[:, :length].astype(W.dtype)
    if segment is not None:
        first = wy.entered(segment, size).reshape(batch, -1)[:, :length]
        dW = jnp.where(first[..., None, None], dW, 0)
    return dq, dk, du, dW, dg, d_state, None


_scan.defvjp(_forward_rule, _backward_rule)


def _walk(k, U, W, g, state, segment):
    """The state before every chunk, u, and the last state."""
    batch, length, heads, width = U.shape
    chunks = triton.cdiv(length, plain.chunk(k))
    sizes = (length, heads, k.shape[2], chunks)
    tile = min(32, plain.fitting(width))
    return triton_call(
        _walk_kernel,
        (batch * heads, triton.cdiv(width, tile)),
        (k, U, W, g, state, plain.either(segment, g), *sizes),
        (
            plain.per_chunk(k, state, chunks),
            jax.ShapeDtypeStruct(U.shape, U.dtype),
            jax.ShapeDtypeStruct(state.shape, state.dtype),
        ),
        num_warps=4,
        **plain.constants(k, U, segment),
        TILE=tile,
    )


def _walk_back(q, k, W, d_out, g, d_final, segment):
    """The gradient of the state behind every chunk, of u, and of the first state."""
    batch, length, heads, width = d_out.shape
    chunks = triton.cdiv(length, plain.chunk(k))
    sizes = (length, heads, k.shape[2], chunks)
    tile = min(32, plain.fitting(width))
    return triton_call(
        _walk_back_kernel,
        (batch * heads, triton.cdiv(width, tile)),
        (q, k, W, d_out, g, d_final, plain.either(segment, g), *sizes),
        (
            plain.per_chunk(k, d_final, chunks),
            jax.ShapeDtypeStruct(d_out.shape, W.dtype),
            jax.ShapeDtypeStruct(d_final.shape, d_final.dtype),
        ),
        num_warps=4,
        **plain.constants(k, d_out, segment),
        TILE=tile,
    )


@triton.jit
def _walk_kernel(
    k, U, W, g, state, segment, length, heads, groups, chunks,
    states, u_out, final,
    K: tl.constexpr, V: tl.constexpr, MODES: tl.constexpr, CHUNK: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, h = row // heads, row % heads
    group = h // (heads // groups)
    n, d = tl.arange(0, MODES), tl.program_id(1) * TILE + tl.arange(0, TILE)
    offset = n[:, None] * V + d[None, :]
    real = (n < K)[:, None] & (d < V)[None, :]
    S = tl.load(state + row * K * V + offset, mask=real, other=0.0)
    for c in range(0, chunks):
        start = c * CHUNK
        at = (row * chunks + c) * K * V + offset
        tl.store(states + at, S.to(states.dtype.element_ty), mask=real)
        _, _, _, enter, leave, through = plain.decays(
            g, segment, b, h, heads, length, start, CHUNK, SEGMENTS
        )
        k_at, k_mask = plain.rows(k, b, length, groups, group, start, n, K, CHUNK)
        w_at, w_mask = plain.rows(W, b, length, heads, h, start, n, K, CHUNK)
        u_at, u_mask = plain.rows(U, b, length, heads, h, start, d, V, CHUNK)
        k_tile = tl.load(k_at, mask=k_mask, other=0.0)
        w_tile = tl.load(w_at, mask=w_mask, other=0.0)
        recalled = tl.dot(w_tile, S.to(w_tile.dtype), input_precision=PRECISION)
        recalled = plain.reached(enter[:, None], recalled, SEGMENTS)
        u = tl.load(u_at, mask=u_mask, other=0.0).to(recalled.dtype) - recalled
        out_at, _ = plain.rows(u_out, b, length, heads, h, start, d, V, CHUNK)
        tl.store(out_at, u.to(u_out.dtype.element_ty), mask=u_mask)
        weighted = plain.linked(leave[:, None], k_tile, SEGMENTS).to(k_tile.dtype)
        u = plain.reached(leave[:, None], u, SEGMENTS)
        increment = tl.dot(
            tl.trans(weighted), u.to(k_tile.dtype), input_precision=PRECISION
        )
        S = plain.linked(through, S, SEGMENTS) + increment.to(S.dtype)
    tl.store(final + row * K * V + offset, S, mask=real)


@triton.jit
def _walk_back_kernel(
    q, k, W, d_out, g, d_final, segment, length, heads, groups, chunks,
    d_states, du_out, d_state,
    K: tl.constexpr, V: tl.constexpr, MODES: tl.constexpr, CHUNK: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, h = row // heads, row % heads
    group = h // (heads // groups)
    n, d = tl.arange(0, MODES), tl.program_id(1) * TILE + tl.arange(0, TILE)
    offset = n[:, None] * V + d[None, :]
    real = (n < K)[:, None] & (d < V)[None, :]
    dS = tl.load(d_final + row * K * V + offset, mask=real, other=0.0)
    for step in range(0, chunks):
        c = chunks - 1 - step
        start = c * CHUNK
        at = (row * chunks + c) * K * V + offset
        tl.store(d_states + at, dS.to(d_states.dtype.element_ty), mask=real)
        G, F, number, enter, leave, through = plain.decays(
            g, segment, b, h, heads, length, start, CHUNK, SEGMENTS
        )
        q_at, q_mask = plain.rows(q, b, length, groups, group, start, n, K, CHUNK)
        k_at, _ = plain.rows(k, b, length, groups, group, start, n, K, CHUNK)
        w_at, w_mask = plain.rows(W, b, length, heads, h, start, n, K, CHUNK)
        o_at, o_mask = plain.rows(d_out, b, length, heads, h, start, d, V, CHUNK)
        k_tile = tl.load(k_at, mask=q_mask, other=0.0)
        dtype = k_tile.dtype
        q_tile = tl.load(q_at, mask=q_mask, other=0.0).to(dtype)
        w_tile = tl.load(w_at, mask=w_mask, other=0.0).to(dtype)
        do = tl.load(o_at, mask=o_mask, other=0.0).to(dtype)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        scores = scores * tl.trans(plain.mask(G, F, number, CHUNK))
        du = tl.dot(scores.to(dtype), do, input_precision=PRECISION)
        from_state = tl.dot(k_tile, dS.to(dtype), input_precision=PRECISION)
        du += plain.linked(leave[:, None], from_state, SEGMENTS)
        du_at, _ = plain.rows(du_out, b, length, heads, h, start, d, V, CHUNK)
        tl.store(du_at, du.to(du_out.dtype.element_ty), mask=o_mask)
        weighted = plain.linked(enter[:, None], q_tile, SEGMENTS).to(dtype)
        du = plain.reached(enter[:, None], du, SEGMENTS)
        # read again, for want of registers
        do = tl.load(o_at, mask=o_mask & (enter >= 0)[:, None], other=0.0).to(dtype)
        increment = tl.dot(tl.trans(weighted), do, input_precision=PRECISION)
        increment -= tl.dot(tl.trans(w_tile), du.to(dtype), input_precision=PRECISION)
        dS = plain.linked(through, dS, SEGMENTS) + increment.to(dS.dtype)
    tl.store(d_state + row * K * V + offset, dS, mask=real)
