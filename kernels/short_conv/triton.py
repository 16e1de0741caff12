"""One pass over memory: programs walk over tiles of time and channels, which they read
at all lags at once, all but one from the cache.

The backward pass walks over the inputs, those of the state first. The outputs an input
has part in serve its own gradient and, times the input, that of the taps, which is
summed per program in registers and over programs by XLA.
"""

import jax
import triton
import triton.language as tl

from kernels.compat import triton_call

SIZE = 4096  # lags x steps x channels of a tile
TILES = 8  # tiles that a program walks over
TAPS = 32


def unsupported(u, w) -> str | None:
    if w.shape[1] > TAPS:
        return f"at most {TAPS} taps, got {w.shape[1]}"
    return None


@jax.custom_vjp
def short_conv(u, w, bias, state, segment):
    """u [B, L, H], state [B, W-1, H] in segment 0, segment [B, L] or None."""
    batch, length, channels = u.shape
    constants = _constants(w, bias, segment, channels)
    chunk = constants["TILE"] * TILES
    blocks = triton.cdiv(channels, constants["WIDTH"])
    (y,) = triton_call(
        _forward,
        (batch * triton.cdiv(length, chunk) * blocks,),
        (
            *(u, w.astype(state.dtype).T, _or(bias, w)),
            *(_or_empty(state, u), _or(segment, u), length, channels, chunk),
        ),
        [jax.ShapeDtypeStruct(u.shape, u.dtype)],
        **constants,
    )
    return y


def _short_conv_forward(u, w, bias, state, segment):
    return short_conv(u, w, bias, state, segment), (u, w, bias, state, segment)


def _short_conv_backward(saved, dy):
    u, w, bias, state, segment = saved
    batch, length, channels = u.shape
    constants = _constants(w, bias, segment, channels)
    taps = w.shape[1]
    chunk = constants["TILE"] * TILES
    chunks = triton.cdiv(length + taps - 1, chunk)
    blocks = triton.cdiv(channels, constants["WIDTH"])
    wide = state.dtype
    du, d_state, dw, d_bias = triton_call(
        _backward,
        (batch * chunks * blocks,),
        (
            *(u, w.astype(wide).T, _or_empty(state, u), _or(segment, u), dy),
            *(length, channels, chunk),
        ),
        [
            jax.ShapeDtypeStruct(u.shape, u.dtype),
            jax.ShapeDtypeStruct((batch, max(taps - 1, 1), channels), wide),
            jax.ShapeDtypeStruct((batch, chunks, taps, channels), wide),
            jax.ShapeDtypeStruct((batch, chunks, channels), wide),
        ],
        **constants,
    )
    dw = dw.sum((0, 1)).T.astype(w.dtype)
    d_bias = None if bias is None else d_bias.sum((0, 1)).astype(bias.dtype)
    return du, dw, d_bias, d_state[:, : taps - 1], None


short_conv.defvjp(_short_conv_forward, _short_conv_backward)


def _constants(w, bias, segment, channels):
    lags = triton.next_power_of_2(w.shape[1])
    width = min(64, triton.next_power_of_2(channels))
    return {
        "BIAS": bias is not None,
        "SEGMENTS": segment is not None,
        "W": w.shape[1],
        "LAGS": lags,
        "TILE": max(SIZE // (max(lags, 4) * width), 1),
        "WIDTH": width,
        "num_warps": 4,
    }


def _or(array, other):
    return other if array is None else array


def _or_empty(state, other):
    """One tap leaves no state."""
    return state if state.size else other


@triton.jit
def _place(length, channels, chunk, WIDTH: tl.constexpr):
    """Row of the batch, first step and channels of a program."""
    blocks = tl.cdiv(channels, WIDTH)
    chunks = tl.cdiv(length, chunk)
    program = tl.program_id(0)
    d = program % blocks * WIDTH + tl.arange(0, WIDTH)
    first = program // blocks % chunks * chunk
    return (program // blocks // chunks).to(tl.int64), first, d


@triton.jit
def _taps(w, channels, lag, d, real, W: tl.constexpr):
    mask = (lag < W)[:, None] & real[None, :]
    return tl.load(w + lag[:, None] * channels + d[None, :], mask=mask, other=0.0)


@triton.jit
def _forward(
    u, w, bias, state, segment,
    length, channels, chunk,
    y,
    BIAS: tl.constexpr, SEGMENTS: tl.constexpr, W: tl.constexpr, LAGS: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b, first, d = _place(length, channels, chunk, WIDTH)
    steps = tl.arange(0, TILE)
    lag = tl.arange(0, LAGS)
    real = d < channels
    dtype = w.dtype.element_ty
    taps = _taps(w, channels, lag, d, real, W)
    offset = steps[:, None] * channels + d[None, :]
    shift = steps[None, :] - lag[:, None]
    shifted = shift[:, :, None] * channels + d[None, None, :]
    for start in range(first, tl.minimum(first + chunk, length), TILE):
        row = b * length + start
        t_mask = start + steps < length
        tapped = (lag < W)[:, None] & t_mask[None, :]
        pair_mask = tapped & (start + shift >= 0)
        mask = pair_mask[:, :, None] & real[None, None, :]
        xs = tl.load(u + row * channels + shifted, mask=mask, other=0.0).to(dtype)
        if start < W - 1:
            before = state + (b * (W - 1) + W - 1 + start) * channels
            mask = (tapped & (start + shift < 0))[:, :, None] & real[None, None, :]
            xs += tl.load(before + shifted, mask=mask, other=0.0)
        if SEGMENTS:
            number = tl.load(segment + row + steps, mask=t_mask, other=0)
            shifted_number = tl.load(segment + row + shift, mask=pair_mask, other=0)
            xs = tl.where((number[None, :] == shifted_number)[:, :, None], xs, 0.0)
        ys = tl.sum(taps[:, None, :] * xs, 0)
        if BIAS:
            ys += tl.load(bias + d, mask=real, other=0.0).to(dtype)[None, :]
        mask = t_mask[:, None] & real[None, :]
        tl.store(y + row * channels + offset, ys.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    u, w, state, segment, dy,
    length, channels, chunk,
    du, d_state, dw, d_bias,
    BIAS: tl.constexpr, SEGMENTS: tl.constexpr, W: tl.constexpr, LAGS: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Step t of the inputs is t + W - 1 of the walk, which begins with the state."""
    walk = length + W - 1
    b, first, d = _place(walk, channels, chunk, WIDTH)
    steps = tl.arange(0, TILE)
    lag = tl.arange(0, LAGS)
    real = d < channels
    dtype = w.dtype.element_ty
    taps = _taps(w, channels, lag, d, real, W)
    offset = steps[:, None] * channels + d[None, :]
    shift = steps[None, :] + lag[:, None]
    shifted = shift[:, :, None] * channels + d[None, None, :]
    sums = tl.zeros((LAGS, TILE, WIDTH), dtype)
    bias_sums = tl.zeros((TILE, WIDTH), dtype)
    for start in range(first, tl.minimum(first + chunk, walk), TILE):
        t = start - (W - 1)
        row = b * length + t
        t_mask = (t + steps >= 0) & (t + steps < length)
        mask = t_mask[:, None] & real[None, :]
        xs = tl.load(u + row * channels + offset, mask=mask, other=0.0).to(dtype)
        pair_mask = (lag < W)[:, None] & (t + shift >= 0) & (t + shift < length)
        dy_mask = pair_mask[:, :, None] & real[None, None, :]
        dys = tl.load(dy + row * channels + shifted, mask=dy_mask, other=0.0)
        dys = dys.to(dtype)
        if BIAS:
            # x + -0 is x for every x: the compiler drops the sum
            plain = tl.where((lag == 0)[:, None, None], dys, -0.0)
            bias_sums += tl.sum(plain, 0)
        if SEGMENTS:
            number = tl.load(segment + row + steps, mask=t_mask, other=0)
            shifted_number = tl.load(segment + row + shift, mask=pair_mask, other=0)
            dys = tl.where((number[None, :] == shifted_number)[:, :, None], dys, 0.0)
        dxs = tl.sum(taps[:, None, :] * dys, 0)
        tl.store(du + row * channels + offset, dxs.to(du.dtype.element_ty), mask=mask)
        if t < 0:
            before = (b * (W - 1) + start) * channels + offset
            mask = (t + steps < 0)[:, None] & real[None, :]
            xs += tl.load(state + before, mask=mask, other=0.0)
            tl.store(d_state + before, dxs, mask=mask)
        sums += xs[None] * dys
    part = b * tl.cdiv(walk, chunk) + first // chunk
    at = part * W * channels + lag[:, None] * channels + d[None, :]
    mask = (lag < W)[:, None] & real[None, :]
    tl.store(dw + at, tl.sum(sums, 1), mask=mask)
    if BIAS:
        tl.store(d_bias + part * channels + d, tl.sum(bias_sums, 0), mask=real)
