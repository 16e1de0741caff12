"""The delta rule on GPUs, on the kernels of triton_decay.py.

With S the state before a chunk and G as there, what the chunk writes is

    u = T beta (v - e^G k S),   T = (I + A)^-1
    A[i, j] = beta[i] e^(G[i] - G[j]) k[i] . k[j],   j < i

One kernel makes T of all chunks at once; it is all that is kept of them. The walk
through the chunks finds u on its way, and with it for v the outputs are those of plain
decay. Backward, the walk finds d = T^T du, and beta d is the gradient of v; another
kernel makes those of what v was compared with.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from kernels.chunked_scan import triton_decay as plain
from kernels.compat import triton_call


@jax.custom_vjp
def scan(q, k, v, g, beta, state, segment):
    """o and the final state; arguments as of chunked_scan, g and beta in the state's
    dtype."""
    T = _inverse(k, v, g, beta, segment)
    # of float32, one walk would spill registers
    if k.dtype == jnp.bfloat16 and plain.is_one_walk(k, v):
        return _through(q, k, v, g, beta, T, state, segment)
    states, u, final = _walk(k, v, g, beta, T, state, segment)
    return plain.outputs(q, k, u, g, states, segment), final


def _forward_rule(q, k, v, g, beta, state, segment):
    arguments = q, k, v, g, beta, state, segment
    return scan(*arguments), arguments


def _backward_rule(saved, cotangents):
    q, k, v, g, beta, state, segment = saved
    d_out, d_final = cotangents
    T = _inverse(k, v, g, beta, segment)
    states, u, _ = _walk(k, v, g, beta, T, state, segment)
    d_states, d, d_state = _walk_back(q, k, d_out, g, beta, T, d_final, segment)
    dq, dk, _, dg = plain.gradients(
        q, k, u, d_out, g, states, d_states, segment, of_values=False
    )
    dk, dv, dg, d_beta = _recall_gradients(dk, d, dg, k, v, u, g, beta, states, segment)
    dq, dk = plain.of_group(dq, q), plain.of_group(dk, k)
    return dq, dk, dv, dg, d_beta, d_state, None


scan.defvjp(_forward_rule, _backward_rule)


def _inverse(k, v, g, beta, segment):
    """T [B, H, C, CHUNK, CHUNK] of all chunks, in the dtype of its products."""
    batch, length, heads, _ = v.shape
    size = plain.chunk(k)
    chunks = triton.cdiv(length, size)
    dtype = k.dtype if k.dtype == jnp.bfloat16 else g.dtype
    (T,) = triton_call(
        _inverse_kernel,
        (chunks, batch * heads),
        (k, v, g, beta, plain.either(segment, g), length, heads, k.shape[2], chunks),
        (jax.ShapeDtypeStruct((batch, heads, chunks, size, size), dtype),),
        num_warps=8,
        **plain.constants(k, v, segment),
        SOLVING="tf32x3" if g.dtype == jnp.float32 else "ieee",
        TILE=min(32, plain.fitting(v.shape[-1])),
    )
    return T


def _through(q, k, v, g, beta, T, state, segment):
    """o and the final state in one walk."""
    batch, length, heads, width = v.shape
    tile = plain.walk_tile(k, width)
    if segment is not None and k.shape[-1] > 64:
        tile = 16  # more would spill registers
    chunks = triton.cdiv(length, plain.chunk(k))
    final, out = triton_call(
        _through_kernel,
        (batch * heads, triton.cdiv(width, tile)),
        (
            *(state, q, k, v, g, beta, T, plain.either(segment, g)),
            *(length, heads, k.shape[2], chunks),
        ),
        (
            jax.ShapeDtypeStruct(state.shape, state.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ),
        num_warps=8,
        in_place=1,
        **plain.constants(k, v, segment),
        TILE=tile,
    )
    return out, final


def _walk(k, v, g, beta, T, state, segment):
    """The state before every chunk, u, and the last state."""
    batch, length, heads, width = v.shape
    chunks = triton.cdiv(length, plain.chunk(k))
    tile = plain.walk_tile(k, width)
    return triton_call(
        _walk_kernel,
        (batch * heads, triton.cdiv(width, tile)),
        (
            *(k, v, g, beta, T, state, plain.either(segment, g)),
            *(length, heads, k.shape[2], chunks),
        ),
        (
            plain.per_chunk(k, state, chunks),
            jax.ShapeDtypeStruct(v.shape, T.dtype),
            jax.ShapeDtypeStruct(state.shape, state.dtype),
        ),
        num_warps=4,
        **plain.constants(k, v, segment),
        TILE=tile,
    )


def _walk_back(q, k, d_out, g, beta, T, d_final, segment):
    """The gradient of the state behind every chunk, d, and that of the first state."""
    batch, length, heads, width = d_out.shape
    chunks = triton.cdiv(length, plain.chunk(k))
    tile = plain.walk_tile(k, width)
    return triton_call(
        _walk_back_kernel,
        (batch * heads, triton.cdiv(width, tile)),
        (
            *(q, k, d_out, g, beta, T, d_final, plain.either(segment, g)),
            *(length, heads, k.shape[2], chunks),
        ),
        (
            plain.per_chunk(k, d_final, chunks),
            jax.ShapeDtypeStruct(d_out.shape, T.dtype),
            jax.ShapeDtypeStruct(d_final.shape, d_final.dtype),
        ),
        num_warps=8 if k.dtype == jnp.bfloat16 else 4,
        **plain.constants(k, d_out, segment),
        TILE=tile,
    )


def _recall_gradients(dk, d, dg, k, v, u, g, beta, states, segment):
    """dk by head and dg with what comes through that which the chunks recall before
    they write, and the gradients of v and beta; as much as possible in place."""
    batch, length, heads, _ = v.shape
    chunks = states.shape[2]
    return triton_call(
        _recall_gradients_kernel,
        (chunks, batch * heads),
        (
            *(dk, d, dg, k, v, u, g, beta, states, plain.either(segment, g)),
            *(length, heads, k.shape[2], chunks),
        ),
        (
            jax.ShapeDtypeStruct(dk.shape, dk.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct(dg.shape, dg.dtype),
            jax.ShapeDtypeStruct(beta.shape, beta.dtype),
        ),
        num_warps=8,
        in_place=3 if d.dtype == v.dtype else 1,
        **plain.gradients_constants(k, v, segment, "ieee"),
    )


@triton.jit
def _usable(x):
    """Whether it has a finite square, which a product with itself is."""
    return tl.abs(x) < 1e19


@triton.jit
def _inverse_kernel(
    k, v, g, beta, segment, length, heads, groups, chunks,
    inverse,
    K: tl.constexpr, V: tl.constexpr, MODES: tl.constexpr, CHUNK: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, SOLVING: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """By halves: where X inverts the blocks of some size on the diagonal, and B is what
    lies below in each pair of them, X - X B X inverts the blocks of twice the size."""
    c = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    b, h = row // heads, row % heads
    group = h // (heads // groups)
    start = c * CHUNK
    n, i = tl.arange(0, MODES), tl.arange(0, CHUNK)
    t = start + i
    G, F, number, _, _, _ = plain.decays(
        g, segment, b, h, heads, length, start, CHUNK, SEGMENTS
    )
    k_at, k_mask = plain.rows(k, b, length, groups, group, start, n, K, CHUNK)
    k_tile = tl.load(k_at, mask=k_mask, other=0.0)
    b_tile = tl.load(beta + (b * length + t) * heads + h, mask=t < length, other=0.0)
    A = tl.dot(k_tile, tl.trans(k_tile), input_precision=PRECISION)
    A = A * b_tile[:, None] * plain.mask(G, F, number, CHUNK)
    # which keys of other segments that are not finite would get through the mask
    among = (i[:, None] > i[None, :]) & (number[:, None] == number[None, :])
    A = tl.where(among, A, 0.0)
    if SEGMENTS:
        # what is not finite reaches the tokens behind it in its segment alone
        bad = tl.where(_usable(b_tile) & _usable(G + F), 0.0, 1.0)
        bad += tl.sum(tl.where(_usable(k_tile.to(A.dtype)), 0.0, 1.0), 1)
        for first in range(0, V, TILE):
            d = first + tl.arange(0, TILE)
            v_at, v_mask = plain.rows(v, b, length, heads, h, start, d, V, CHUNK)
            v_tile = tl.load(v_at, mask=v_mask, other=0.0).to(A.dtype)
            bad += tl.sum(tl.where(_usable(v_tile), 0.0, 1.0), 1)
        bad, _ = tl.associative_scan((bad, number), 0, plain.add_in_segment)
        owner = tl.where(bad > 0, number, -1)  # of the bad tokens that reach a row
        A = tl.where(owner[:, None] + 0 * i[None, :] >= 0, 0.0, A)
    X = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(A.dtype)
    size = 1
    while size < CHUNK:
        block = i // size
        pair = (block[:, None] == block[None, :] + 1) & (block[:, None] % 2 == 1)
        B = tl.where(pair, A, 0.0)
        BX = tl.dot(B, X, input_precision=SOLVING, out_dtype=A.dtype)
        X -= tl.dot(X, BX, input_precision=SOLVING, out_dtype=A.dtype)
        size *= 2
    if SEGMENTS:
        # read again, for want of registers
        number = tl.load(segment + b * length + t, mask=t < length, other=-2)
        X = tl.where(owner[:, None] == number[None, :], float("nan"), X)
    at = (row * chunks + c) * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :]
    tl.store(inverse + at, X.to(inverse.dtype.element_ty))


@triton.jit
def _system(T, beta, b, h, heads, length, start, row, c, chunks, CHUNK: tl.constexpr):
    """T [CHUNK, CHUNK] and beta [CHUNK] of a chunk."""
    i = tl.arange(0, CHUNK)
    at = (row * chunks + c) * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :]
    t = start + i
    b_tile = tl.load(beta + (b * length + t) * heads + h, mask=t < length, other=0.0)
    return tl.load(T + at), b_tile


@triton.jit
def _written(
    k_tile, v_tile, b_tile, T, S, enter, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr
):
    """u of a chunk that S enters."""
    recalled = tl.dot(k_tile, S.to(k_tile.dtype), input_precision=PRECISION)
    recalled = b_tile[:, None] * plain.linked(enter[:, None], recalled, SEGMENTS)
    new = b_tile[:, None] * v_tile
    if SEGMENTS:
        # apart, since what S recalls may be NaN; new values that are make rows of T so
        new = tl.where(_usable(new), new, 0.0).to(T.dtype)
        recalled = tl.dot(T, recalled.to(T.dtype), input_precision=PRECISION)
        u = tl.dot(T, new, input_precision=PRECISION)
        return u - plain.reached(enter[:, None], recalled, SEGMENTS)
    return tl.dot(T, (new - recalled).to(T.dtype), input_precision=PRECISION)


@triton.jit
def _through_kernel(
    state, q, k, v, g, beta, T, segment, length, heads, groups, chunks,
    final, out,
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
    tl.debug_barrier()  # all of it is read before it is written in place
    for c in range(0, chunks):
        start = c * CHUNK
        G, F, number, enter, leave, through = plain.decays(
            g, segment, b, h, heads, length, start, CHUNK, SEGMENTS
        )
        k_at, k_mask = plain.rows(k, b, length, groups, group, start, n, K, CHUNK)
        v_at, v_mask = plain.rows(v, b, length, heads, h, start, d, V, CHUNK)
        k_tile = tl.load(k_at, mask=k_mask, other=0.0)
        v_tile = tl.load(v_at, mask=v_mask, other=0.0)
        system, b_tile = _system(
            T, beta, b, h, heads, length, start, row, c, chunks, CHUNK
        )
        u = _written(k_tile, v_tile, b_tile, system, S, enter, SEGMENTS, PRECISION).to(
            k_tile.dtype
        )
        q_at, q_mask = plain.rows(q, b, length, groups, group, start, n, K, CHUNK)
        q_tile = tl.load(q_at, mask=q_mask, other=0.0)
        between = plain.mask(G, F, number, CHUNK)
        o = plain.read(q_tile, k_tile, u, S, between, enter, SEGMENTS, PRECISION)
        o_at, o_mask = plain.rows(out, b, length, heads, h, start, d, V, CHUNK)
        tl.store(o_at, o.to(out.dtype.element_ty), mask=o_mask)
        S = plain.advanced(S, k_tile, u, leave, through, SEGMENTS, PRECISION)
    tl.store(final + row * K * V + offset, S, mask=real)


@triton.jit
def _walk_kernel(
    k, v, g, beta, T, state, segment, length, heads, groups, chunks,
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
        v_at, v_mask = plain.rows(v, b, length, heads, h, start, d, V, CHUNK)
        k_tile = tl.load(k_at, mask=k_mask, other=0.0)
        v_tile = tl.load(v_at, mask=v_mask, other=0.0)
        system, b_tile = _system(
            T, beta, b, h, heads, length, start, row, c, chunks, CHUNK
        )
        u = _written(k_tile, v_tile, b_tile, system, S, enter, SEGMENTS, PRECISION)
        u_at, _ = plain.rows(u_out, b, length, heads, h, start, d, V, CHUNK)
        tl.store(u_at, u.to(u_out.dtype.element_ty), mask=v_mask)
        S = plain.advanced(S, k_tile, u, leave, through, SEGMENTS, PRECISION)
    tl.store(final + row * K * V + offset, S, mask=real)


@triton.jit
def _walk_back_kernel(
    q, k, d_out, g, beta, T, d_final, segment, length, heads, groups, chunks,
    d_states, solved, d_state,
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
        q_at, k_mask = plain.rows(q, b, length, groups, group, start, n, K, CHUNK)
        k_at, _ = plain.rows(k, b, length, groups, group, start, n, K, CHUNK)
        o_at, o_mask = plain.rows(d_out, b, length, heads, h, start, d, V, CHUNK)
        k_tile = tl.load(k_at, mask=k_mask, other=0.0)
        dtype = k_tile.dtype
        q_tile = tl.load(q_at, mask=k_mask, other=0.0).to(dtype)
        do = tl.load(o_at, mask=o_mask, other=0.0).to(dtype)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        scores = scores * tl.trans(plain.mask(G, F, number, CHUNK))
        du = tl.dot(scores.to(dtype), do, input_precision=PRECISION)
        from_state = tl.dot(k_tile, dS.to(dtype), input_precision=PRECISION)
        du += plain.linked(leave[:, None], from_state, SEGMENTS)
        system, b_tile = _system(
            T, beta, b, h, heads, length, start, row, c, chunks, CHUNK
        )
        du = tl.dot(tl.trans(system), du.to(system.dtype), input_precision=PRECISION)
        du_at, _ = plain.rows(solved, b, length, heads, h, start, d, V, CHUNK)
        tl.store(du_at, du.to(solved.dtype.element_ty), mask=o_mask)
        dv = -b_tile[:, None] * du
        dS = plain.advanced(dS, q_tile, do, enter, through, SEGMENTS, PRECISION)
        weighted = plain.linked(enter[:, None], k_tile, SEGMENTS).to(dtype)
        dv = plain.reached(enter[:, None], dv, SEGMENTS).to(dtype)
        recalled = tl.dot(tl.trans(weighted), dv, input_precision=PRECISION)
        dS += recalled.to(dS.dtype)
    tl.store(d_state + row * K * V + offset, dS, mask=real)


@triton.jit
def _recall_gradients_kernel(
    dk_in, solved, dg_in, k, v, u, g, beta, states, segment,
    length, heads, groups, chunks,
    dk_out, dv_out, dg_out, db_out,
    K: tl.constexpr, V: tl.constexpr, MODES: tl.constexpr, CHUNK: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Adds those of beta (v - r) with the outputs r = e^G k S + ... of k for q, without
    a token itself: what the chunk recalls."""
    c = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    b, h = row // heads, row % heads
    group = h // (heads // groups)
    start = c * CHUNK
    n, i = tl.arange(0, MODES), tl.arange(0, CHUNK)
    t = start + i
    G, F, number, enter, _, _ = plain.decays(
        g, segment, b, h, heads, length, start, CHUNK, SEGMENTS
    )
    between = plain.mask(G, F, number, CHUNK)
    between = tl.where(i[:, None] > i[None, :], between, 0.0)
    k_at, k_mask = plain.rows(k, b, length, groups, group, start, n, K, CHUNK)
    k_tile = tl.load(k_at, mask=k_mask, other=0.0)
    dtype = k_tile.dtype
    at = (b * length + t) * heads + h
    b_tile = tl.load(beta + at, mask=t < length, other=0.0)
    scores = tl.dot(k_tile, tl.trans(k_tile), input_precision=PRECISION) * between
    d_scores = tl.zeros_like(scores)
    dk = tl.zeros([CHUNK, MODES], scores.dtype)
    db = tl.zeros([CHUNK], scores.dtype)
    for first in range(0, V, TILE):
        d = first + tl.arange(0, TILE)
        v_at, v_mask = plain.rows(v, b, length, heads, h, start, d, V, CHUNK)
        u_at, v_mask = plain.rows(u, b, length, heads, h, start, d, V, CHUNK)
        d_at, v_mask = plain.rows(solved, b, length, heads, h, start, d, V, CHUNK)
        u_tile = tl.load(u_at, mask=v_mask, other=0.0).to(dtype)
        state_at = (row * chunks + c) * K * V + n[:, None] * V + d[None, :]
        real = (n < K)[:, None] & (d < V)[None, :]
        S = tl.load(states + state_at, mask=real, other=0.0).to(dtype)
        recalled = tl.dot(k_tile, S, input_precision=PRECISION)
        recalled = plain.linked(enter[:, None], recalled, SEGMENTS)
        recalled += tl.dot(scores.to(dtype), u_tile, input_precision=PRECISION)
        v_tile = tl.load(v_at, mask=v_mask, other=0.0).to(scores.dtype)
        d_tile = tl.load(d_at, mask=v_mask, other=0.0).to(scores.dtype)
        db += tl.sum(d_tile * (v_tile - recalled), 1)
        dv = b_tile[:, None] * d_tile
        tl.debug_barrier()  # all of the tile is read before it is written in place
        dv_at, v_mask = plain.rows(dv_out, b, length, heads, h, start, d, V, CHUNK)
        tl.store(dv_at, dv.to(dv_out.dtype.element_ty), mask=v_mask)
        dv = dv.to(dtype)
        d_scores -= tl.dot(dv, tl.trans(u_tile), input_precision=PRECISION)
        dk -= tl.dot(dv, tl.trans(S), input_precision=PRECISION)
    dk = plain.linked(enter[:, None], dk, SEGMENTS)
    entered = tl.sum(k_tile * dk, 1)
    dg = plain.by_decay(scores * d_scores, entered, tl.zeros_like(entered), CHUNK)
    d_scores = (d_scores * between).to(dtype)
    dk += tl.dot(d_scores, k_tile, input_precision=PRECISION)
    dk += tl.dot(tl.trans(d_scores), k_tile, input_precision=PRECISION)
    added, per_head = plain.rows(dk_in, b, length, heads, h, start, n, K, CHUNK)
    dk += tl.load(added, mask=per_head, other=0.0).to(dk.dtype)
    dg += tl.load(dg_in + at, mask=t < length, other=0.0)
    tl.debug_barrier()
    dk_at, per_head = plain.rows(dk_out, b, length, heads, h, start, n, K, CHUNK)
    tl.store(dk_at, dk.to(dk_out.dtype.element_ty), mask=per_head)
    tl.store(dg_out + at, dg.to(dg_out.dtype.element_ty), mask=t < length)
    tl.store(db_out + at, db.to(db_out.dtype.element_ty), mask=t < length)
