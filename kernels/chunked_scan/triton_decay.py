"""Scalar decay on GPUs: states between chunks first, then all chunks at once.

With G the cumulated log decay inside a chunk, S the state before it, and all masked to
pairs of one segment,

    o[i] = e^G[i] q[i] S + sum_{j <= i} e^(G[i] - G[j]) (q[i] . k[j]) v[j]
    S' = e^G[T] S + sum_j e^(G[T] - G[j]) k[j] v[j]^T.

Where heads and values fill the device, one kernel walks through the chunks and makes
both lines, and no S is in memory. Else, and in the backward pass, one walks through the
second line alone and writes every S, and another makes what is left of all chunks at
once. The backward pass walks from the end with the gradients of the states,
then makes the gradients of all chunks. Differences of G are taken before exp and are
never positive.

The delta rule (triton_delta.py) is made of the same parts.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from kernels.compat import triton_call

CHUNK = 64  # steps; half as many where products of float32 take their registers
# One walk makes the outputs too where it has a program for each multiprocessor of an
# H100 or H200, or few chunks to go through.
PROGRAMS = 132
FEW = 4


@jax.custom_vjp
def scan(q, k, v, g, state, segment):
    """o [B, L, H, V] and the final state of q, k [B, L, G, K], v [B, L, H, V], and in
    the state's dtype g [B, L, H]; state [B, H, K, V], segment [B, L] or None."""
    if is_one_walk(k, v):
        return _through(q, k, v, g, state, segment)
    states, final = walk(k, v, g, state, segment, reverse=False)
    return outputs(q, k, v, g, states, segment), final


def _forward_rule(q, k, v, g, state, segment):
    return scan(q, k, v, g, state, segment), (q, k, v, g, state, segment)


def _backward_rule(saved, cotangents):
    q, k, v, g, state, segment = saved
    d_out, d_final = cotangents
    states, _ = walk(k, v, g, state, segment, reverse=False)
    # the gradient of the states is the same walk from the end with (q, do) for (k, v)
    d_states, d_state = walk(q, d_out, g, d_final, segment, reverse=True)
    dq, dk, dv, dg = gradients(q, k, v, d_out, g, states, d_states, segment)
    return of_group(dq, q), of_group(dk, k), dv, dg, d_state, None


scan.defvjp(_forward_rule, _backward_rule)


def is_one_walk(k, v):
    """Whether the forward pass makes the outputs while it walks through the chunks."""
    batch, length, heads, width = v.shape
    programs = batch * heads * triton.cdiv(width, walk_tile(k, width))
    return programs >= PROGRAMS or triton.cdiv(length, chunk(k)) <= FEW


def walk_tile(k, width):
    """Values of a program that walks; more would spill registers."""
    return min(32 if k.dtype == jnp.bfloat16 else 16, fitting(width))


def _through(q, k, v, g, state, segment):
    """o and the final state in one walk."""
    batch, length, heads, width = v.shape
    tile = walk_tile(k, width)
    final, out = triton_call(
        _through_kernel,
        (batch * heads, triton.cdiv(width, tile)),
        (state, q, k, v, g, either(segment, g), length, heads, k.shape[2]),
        (
            jax.ShapeDtypeStruct(state.shape, state.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ),
        num_warps=4,
        in_place=1,
        **constants(k, v, segment),
        TILE=tile,
    )
    return out, final


def walk(k, v, g, state, segment, reverse):
    """The state before (in reverse: behind) every chunk [B, H, C, K, V], in the dtype
    of its products, and the last one."""
    batch, length, heads, width = v.shape
    chunks = triton.cdiv(length, chunk(k))
    tile = walk_tile(k, width)
    return triton_call(
        _states_kernel,
        (batch * heads, triton.cdiv(width, tile)),
        (k, v, g, state, either(segment, g), length, heads, k.shape[2], chunks),
        (
            per_chunk(k, state, chunks),
            jax.ShapeDtypeStruct(state.shape, state.dtype),
        ),
        num_warps=4,
        **constants(k, v, segment),
        TILE=tile,
        REVERSE=reverse,
    )


def per_chunk(k, state, chunks):
    """Of the states between chunks. What becomes of them are products with k or q, so
    that bfloat16 ones keep no more of them; the walk itself does."""
    batch, heads, modes, width = state.shape
    dtype = k.dtype if k.dtype == jnp.bfloat16 else state.dtype
    return jax.ShapeDtypeStruct((batch, heads, chunks, modes, width), dtype)


def outputs(q, k, v, g, states, segment):
    """o [B, L, H, V] of all chunks, from the state before each."""
    batch, length, heads, width = v.shape
    chunks = states.shape[2]
    tile = min(64 if k.dtype == jnp.bfloat16 else 16, fitting(width))
    (out,) = triton_call(
        _outputs_kernel,
        (chunks, triton.cdiv(width, tile), batch * heads),
        (q, k, v, g, states, either(segment, g), length, heads, k.shape[2], chunks),
        (jax.ShapeDtypeStruct(v.shape, v.dtype),),
        num_warps=4,
        **constants(k, v, segment),
        TILE=tile,
    )
    return out


def gradients(q, k, v, d_out, g, states, d_states, segment, of_values=True):
    """Those of q and k by head, of v where it is wanted, and of g, from the states
    before every chunk and the gradients of those behind."""
    batch, length, heads, _ = v.shape
    chunks = states.shape[2]
    sizes = (length, heads, k.shape[2], chunks)
    return triton_call(
        _gradients_kernel,
        (chunks, batch * heads),
        (q, k, v, d_out, g, states, d_states, either(segment, g), *sizes),
        (
            per_head(q, heads, g),
            per_head(k, heads, g),
            jax.ShapeDtypeStruct(v.shape if of_values else (1,), v.dtype),
            jax.ShapeDtypeStruct(g.shape, g.dtype),
        ),
        num_warps=8,
        **gradients_constants(k, v, segment, "ieee" if of_values else "tf32x3"),
        OF_VALUES=of_values,
    )


def gradients_constants(k, v, segment, precision):
    """What kernels are compiled for that hold a gradient by k while they go through the
    values, with the precision of products of float32.

    Values at a time and precision are those that spill no registers: more values would,
    and where a kernel has many products, so would tensor cores (tf32x3), which take
    each factor in parts.
    """
    roomy = k.dtype == jnp.bfloat16 and k.shape[-1] <= 64
    tile = min(32 if roomy else 16, fitting(v.shape[-1]))
    precision = precision if k.dtype == jnp.float32 else "ieee"
    return constants(k, v, segment) | {"PRECISION": precision, "TILE": tile}


def per_head(like, heads, g):
    """Of a gradient of q or k by each head; what is added up afterwards is not rounded
    before."""
    batch, length, groups, modes = like.shape
    dtype = like.dtype if heads == groups else g.dtype
    return jax.ShapeDtypeStruct((batch, length, heads, modes), dtype)


def of_group(x, like):
    """Gradients by head, added up over the heads of each group."""
    batch, length, groups, modes = like.shape
    return x.reshape(batch, length, groups, -1, modes).sum(3).astype(like.dtype)


def fitting(size):
    """The size of a tile that holds `size` entries: a power of two, 16 or more."""
    return max(16, triton.next_power_of_2(size))


def chunk(k):
    """Steps of a chunk, by the dtype of the products."""
    return CHUNK if k.dtype == jnp.bfloat16 else CHUNK // 2


def either(array, other):
    """An array for a pointer that is not read where the array is None."""
    return other if array is None else array


def constants(k, v, segment):
    """What all kernels are compiled for."""
    return {
        "K": k.shape[-1],
        "V": v.shape[-1],
        "MODES": fitting(k.shape[-1]),
        "CHUNK": chunk(k),
        "SEGMENTS": segment is not None,
        "PRECISION": "tf32x3" if k.dtype == jnp.float32 else "ieee",
    }


@triton.jit
def decays(
    g, segment, b, h, heads, length, start,
    CHUNK: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """For the tokens of a chunk: G in two parts, segment numbers, and how much of the
    state before reaches them (`enter`), of them the state behind (`leave`), of the
    state before the state behind (`through`); -1 where a reset lies between.

    Differences of one cumulated sum would lose a small decay after a large one: its
    parts are multiples of 1/16, exact in float32, and a rest that stays small.
    """
    t = start + tl.arange(0, CHUNK)
    log_decay = tl.load(g + (b * length + t) * heads + h, mask=t < length, other=0.0)
    # exp of which is 0 as well
    log_decay = tl.maximum(log_decay, -1e4, propagate_nan=tl.PropagateNan.ALL)
    coarse = tl.floor(16.0 * log_decay) / 16.0
    fine = log_decay - coarse
    number = tl.zeros_like(t)
    if SEGMENTS:
        number = tl.load(segment + b * length + tl.minimum(t, length - 1))
        # of each segment alone: NaN must not reach the next
        G, _ = tl.associative_scan((coarse, number), 0, add_in_segment)
        F, _ = tl.associative_scan((fine, number), 0, add_in_segment)
        end = t == start + CHUNK - 1
        G_last = tl.sum(tl.where(end, G, 0.0), 0)
        F_last = tl.sum(tl.where(end, F, 0.0), 0)
    else:
        G, F = tl.cumsum(coarse, 0), tl.cumsum(fine, 0)
        G_last, F_last = tl.sum(coarse, 0), tl.sum(fine, 0)
    enter = tl.exp(G + F)
    leave = tl.exp((G_last - G) + (F_last - F))
    through = tl.exp(G_last + F_last)
    if SEGMENTS:
        before = tl.load(segment + b * length + start - 1, mask=start > 0, other=0)
        last = tl.max(number, 0)
        enter = tl.where(number == before, enter, -1.0)
        leave = tl.where(number == last, leave, -1.0)
        through = tl.where(before == last, through, -1.0)
    return G, F, number, enter, leave, through


@triton.jit
def add_in_segment(a, m, b, n):
    return tl.where(m == n, a, 0.0) + b, n


@triton.jit
def rows(x, b, length, heads, h, start, column, width, CHUNK: tl.constexpr):
    """Addresses and mask of a tile [CHUNK, columns] of x [B, L, heads, width]."""
    t = start + tl.arange(0, CHUNK)
    at = ((b * length + t) * heads + h)[:, None] * width + column[None, :]
    return x + at, (t < length)[:, None] & (column < width)[None, :]


@triton.jit
def _states_kernel(
    k, v, g, state, segment, length, heads, groups, chunks,
    states, final,
    K: tl.constexpr, V: tl.constexpr, MODES: tl.constexpr, CHUNK: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, h = row // heads, row % heads
    group = h // (heads // groups)
    n, d = tl.arange(0, MODES), tl.program_id(1) * TILE + tl.arange(0, TILE)
    offset = n[:, None] * V + d[None, :]
    real = (n < K)[:, None] & (d < V)[None, :]
    S = tl.load(state + row * K * V + offset, mask=real, other=0.0)
    for step in range(0, chunks):
        c = chunks - 1 - step if REVERSE else step
        start = c * CHUNK
        at = (row * chunks + c) * K * V + offset
        tl.store(states + at, S.to(states.dtype.element_ty), mask=real)
        _, _, _, enter, leave, through = decays(
            g, segment, b, h, heads, length, start, CHUNK, SEGMENTS
        )
        weight = enter if REVERSE else leave
        k_at, k_mask = rows(k, b, length, groups, group, start, n, K, CHUNK)
        v_at, v_mask = rows(v, b, length, heads, h, start, d, V, CHUNK)
        k_tile = tl.load(k_at, mask=k_mask, other=0.0)
        v_tile = tl.load(v_at, mask=v_mask, other=0.0)
        S = advanced(S, k_tile, v_tile, weight, through, SEGMENTS, PRECISION)
    tl.store(final + row * K * V + offset, S, mask=real)


@triton.jit
def _through_kernel(
    state, q, k, v, g, segment, length, heads, groups,
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
    for start in range(0, length, CHUNK):
        G, F, number, enter, leave, through = decays(
            g, segment, b, h, heads, length, start, CHUNK, SEGMENTS
        )
        q_at, q_mask = rows(q, b, length, groups, group, start, n, K, CHUNK)
        k_at, k_mask = rows(k, b, length, groups, group, start, n, K, CHUNK)
        v_at, v_mask = rows(v, b, length, heads, h, start, d, V, CHUNK)
        q_tile = tl.load(q_at, mask=q_mask, other=0.0)
        k_tile = tl.load(k_at, mask=k_mask, other=0.0)
        v_tile = tl.load(v_at, mask=v_mask, other=0.0).to(k_tile.dtype)
        between = mask(G, F, number, CHUNK)
        o = read(q_tile, k_tile, v_tile, S, between, enter, SEGMENTS, PRECISION)
        o_at, o_mask = rows(out, b, length, heads, h, start, d, V, CHUNK)
        tl.store(o_at, o.to(out.dtype.element_ty), mask=o_mask)
        S = advanced(S, k_tile, v_tile, leave, through, SEGMENTS, PRECISION)
    tl.store(final + row * K * V + offset, S, mask=real)


@triton.jit
def read(
    q_tile, k_tile, v_tile, S, between, enter,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o of a chunk that S enters."""
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * between
    o = tl.dot(scores.to(v_tile.dtype), v_tile, input_precision=PRECISION)
    from_state = tl.dot(q_tile, S.to(q_tile.dtype), input_precision=PRECISION)
    return o + linked(enter[:, None], from_state, SEGMENTS)


@triton.jit
def advanced(
    S, k_tile, v_tile, weight, through,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state on the other side of a chunk, which its tokens reach with a weight."""
    weighted = linked(weight[:, None], k_tile, SEGMENTS).to(k_tile.dtype)
    v_tile = reached(weight[:, None], v_tile, SEGMENTS).to(k_tile.dtype)
    increment = tl.dot(tl.trans(weighted), v_tile, input_precision=PRECISION)
    return linked(through, S, SEGMENTS) + increment.to(S.dtype)


@triton.jit
def _outputs_kernel(
    q, k, v, g, states, segment, length, heads, groups, chunks,
    out,
    K: tl.constexpr, V: tl.constexpr, MODES: tl.constexpr, CHUNK: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    row = tl.program_id(2).to(tl.int64)
    b, h = row // heads, row % heads
    group = h // (heads // groups)
    start = c * CHUNK
    n, d = tl.arange(0, MODES), tl.program_id(1) * TILE + tl.arange(0, TILE)
    G, F, number, enter, _, _ = decays(
        g, segment, b, h, heads, length, start, CHUNK, SEGMENTS
    )
    q_at, q_mask = rows(q, b, length, groups, group, start, n, K, CHUNK)
    k_at, k_mask = rows(k, b, length, groups, group, start, n, K, CHUNK)
    v_at, v_mask = rows(v, b, length, heads, h, start, d, V, CHUNK)
    q_tile = tl.load(q_at, mask=q_mask, other=0.0)
    k_tile = tl.load(k_at, mask=k_mask, other=0.0)
    v_tile = tl.load(v_at, mask=v_mask, other=0.0).to(k_tile.dtype)
    S = tl.load(
        states + (row * chunks + c) * K * V + n[:, None] * V + d[None, :],
        mask=(n < K)[:, None] & (d < V)[None, :],
        other=0.0,
    )
    between = mask(G, F, number, CHUNK)
    o = read(q_tile, k_tile, v_tile, S, between, enter, SEGMENTS, PRECISION)
    o_at, o_mask = rows(out, b, length, heads, h, start, d, V, CHUNK)
    tl.store(o_at, o.to(out.dtype.element_ty), mask=o_mask)


@triton.jit
def linked(weight, x, SEGMENTS: tl.constexpr):
    """weight x, or 0 where the weight is -1: 0 times what is not finite is NaN."""
    return reached(weight, weight * x, SEGMENTS)


@triton.jit
def reached(weight, x, SEGMENTS: tl.constexpr):
    """x, or 0 where the weight is -1."""
    if SEGMENTS:
        # By bits: flags that are spread over the columns of a tile cannot change their
        # layout, so that a choice by them does not compile.
        keep = tl.where(weight < 0, 0, -1)
        if x.dtype.primitive_bitwidth == 16:
            bits = x.to(tl.int16, bitcast=True) & keep.to(tl.int16)
        elif x.dtype.primitive_bitwidth == 32:
            bits = x.to(tl.int32, bitcast=True) & keep
        else:
            bits = x.to(tl.int64, bitcast=True) & keep.to(tl.int64)
        x = bits.to(x.dtype, bitcast=True)
    return x


@triton.jit
def mask(G, F, number, CHUNK: tl.constexpr):
    """[i, j] the decay from j to i where j <= i in one segment, else 0."""
    i = tl.arange(0, CHUNK)
    near = (i[:, None] >= i[None, :]) & (number[:, None] == number[None, :])
    span = (G[:, None] - G[None, :]) + (F[:, None] - F[None, :])
    return tl.where(near, tl.exp(tl.where(near, span, 0.0)), 0.0)


@triton.jit
def _gradients_kernel(
    q, k, v, d_out, g, states, d_states, segment, length, heads, groups, chunks,
    dq_out, dk_out, dv_out, dg_out,
    K: tl.constexpr, V: tl.constexpr, MODES: tl.constexpr, CHUNK: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
    OF_VALUES: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    b, h = row // heads, row % heads
    group = h // (heads // groups)
    start = c * CHUNK
    n = tl.arange(0, MODES)
    G, F, number, enter, leave, through = decays(
        g, segment, b, h, heads, length, start, CHUNK, SEGMENTS
    )
    between = mask(G, F, number, CHUNK)
    q_at, q_mask = rows(q, b, length, groups, group, start, n, K, CHUNK)
    k_at, k_mask = rows(k, b, length, groups, group, start, n, K, CHUNK)
    q_tile = tl.load(q_at, mask=q_mask, other=0.0)
    k_tile = tl.load(k_at, mask=k_mask, other=0.0)
    dtype = k_tile.dtype
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * between
    d_scores = tl.zeros_like(scores)
    dq = tl.zeros([CHUNK, MODES], scores.dtype)
    dk = tl.zeros([CHUNK, MODES], scores.dtype)
    products = tl.zeros([MODES, TILE], scores.dtype)
    for first in range(0, V, TILE):
        d = first + tl.arange(0, TILE)
        v_at, v_mask = rows(v, b, length, heads, h, start, d, V, CHUNK)
        o_at, o_mask = rows(d_out, b, length, heads, h, start, d, V, CHUNK)
        v_tile = tl.load(v_at, mask=v_mask, other=0.0).to(dtype)
        do = tl.load(o_at, mask=o_mask, other=0.0).to(dtype)
        at = (row * chunks + c) * K * V + n[:, None] * V + d[None, :]
        real = (n < K)[:, None] & (d < V)[None, :]
        S = tl.load(states + at, mask=real, other=0.0)
        dS = tl.load(d_states + at, mask=real, other=0.0)
        products += S.to(products.dtype) * dS.to(products.dtype)
        S, dS = S.to(dtype), dS.to(dtype)
        d_scores += tl.dot(do, tl.trans(v_tile), input_precision=PRECISION)
        dq += tl.dot(do, tl.trans(S), input_precision=PRECISION)
        dk += tl.dot(v_tile, tl.trans(dS), input_precision=PRECISION)
        if OF_VALUES:
            dv = tl.dot(k_tile, dS, input_precision=PRECISION)
            dv = linked(leave[:, None], dv, SEGMENTS)
            dv += tl.dot(tl.trans(scores).to(dtype), do, input_precision=PRECISION)
            dv_at, dv_mask = rows(dv_out, b, length, heads, h, start, d, V, CHUNK)
            tl.store(dv_at, dv.to(dv_out.dtype.element_ty), mask=dv_mask)
    dq = linked(enter[:, None], dq, SEGMENTS)
    dk = linked(leave[:, None], dk, SEGMENTS)
    if MODES > 64:  # read again, for want of registers
        q_tile = tl.load(q_at, mask=q_mask & (n < K)[None, :], other=0.0)
    entered, left = tl.sum(q_tile * dq, 1), tl.sum(k_tile * dk, 1)
    d_g = by_decay(scores * d_scores, entered, left, CHUNK)
    # and the last step's in what is left of the state behind the chunk
    d_g += linked(through, tl.sum(tl.sum(products, 1), 0), SEGMENTS)
    d_scores = (d_scores * between).to(dtype)
    dq += tl.dot(d_scores, k_tile, input_precision=PRECISION)
    dk += tl.dot(tl.trans(d_scores), q_tile, input_precision=PRECISION)
    dq_at, per_head = rows(dq_out, b, length, heads, h, start, n, K, CHUNK)
    dk_at, _ = rows(dk_out, b, length, heads, h, start, n, K, CHUNK)
    tl.store(dq_at, dq.to(dq_out.dtype.element_ty), mask=per_head)
    tl.store(dk_at, dk.to(dk_out.dtype.element_ty), mask=per_head)
    t = start + tl.arange(0, CHUNK)
    g_at = dg_out + (b * length + t) * heads + h
    tl.store(g_at, d_g.to(dg_out.dtype.element_ty), mask=t < length)


@triton.jit
def by_decay(between, entered, left, CHUNK: tl.constexpr):
    """The gradient of g from those of the decays between two tokens, up to a token and
    behind it, each times its decay. g of step t is in the decay from j to i where
    j < t <= i. Summed as that: differences of sums would lose what is small."""
    i = tl.arange(0, CHUNK)
    before = i[:, None] > i[None, :]
    since = tl.cumsum(between, 0, reverse=True)
    d_g = tl.sum(tl.where(before, since + left[None, :], 0.0), 1)
    return d_g + tl.sum(tl.where(before, 0.0, entered[None, :]), 1)
