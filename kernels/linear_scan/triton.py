"""One pass over memory: a program owns some channels and walks through time in tiles.

Inside a tile the recurrence is an associative scan in registers, between tiles the
state is carried. The backward pass is the same walk in the other direction, which makes
the gradients of a and x together from h. Complex numbers are (re, im).
"""

import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from kernels.compat import triton_call

PAIRS = True
TILE = 32  # steps per tile


def unsupported(*arguments) -> str | None:
    return None


def forward(a, x, initial_state, keep, reverse):
    """h and the final state; pairs a [B|1, L|1, *S|1], x [B, L, *S]; keep [B, L]."""
    a, view = _view(a, x)
    sizes, grid, constants = _plan(a, x, initial_state, keep, reverse, view)
    parts, state = len(initial_state), initial_state[0]
    # Real results are in x's dtype; complex ones are float32 or wider.
    dtype = x[0].dtype if parts == 1 else state.dtype
    results = triton_call(
        _forward,
        grid,
        (*_both(a), *_both(x), *_both(initial_state), _flags(keep, x[0]), *sizes),
        [
            *_outputs(x[0].shape, dtype, parts),
            *_outputs(state.shape, state.dtype, parts),
        ],
        **constants,
    )
    return results[:parts], results[2 : 2 + parts]


def backward(a, h, initial_state, keep, like_x, h_gradient, final_gradient, reverse):
    """Gradients of a, x and the initial state as plain gradients of their parts:
    g[t] = h_gradient[t] + conj(a[t+1]) g[t+1], da[t] = conj(h[t-1]) g[t]."""
    decay, view = _view(a, h)
    sizes, grid, constants = _plan(decay, h, initial_state, keep, reverse, view)
    constants["X_COMPLEX"] = len(like_x) == 2
    constant = decay[0].shape[1] == 1
    da_shape = (h[0].shape[0], *h[0].shape[2:]) if constant else h[0].shape
    state = initial_state[0]
    # what is added up afterwards is not rounded before
    da_dtype = a[0].dtype if a[0].shape == da_shape else state.dtype
    results = triton_call(
        _backward,
        grid,
        (
            *_both(decay),
            *_both(h),
            *_both(h_gradient),
            *_both(initial_state),
            *_both(final_gradient),
            _flags(keep, h[0]),
            *sizes,
        ),
        [
            *_outputs(da_shape, da_dtype, len(a)),
            *_outputs(h[0].shape, like_x[0].dtype, len(like_x)),
            *_outputs(state.shape, state.dtype, len(initial_state)),
        ],
        **constants,
    )
    da = tuple(
        _reduced(part[:, None] if constant else part, like.shape).astype(like.dtype)
        for part, like in zip(results[:2], a, strict=False)
    )
    dx = results[2 : 2 + len(like_x)]
    return da, dx, results[4 : 4 + len(initial_state)]


def _view(a, x):
    """a, and (inner, count): channel d of x has the decay of channel
    (d // inner) % count. Only a mixed broadcast is written out."""
    channels, decays = x[0].shape[2:], a[0].shape[2:]
    full = [i for i, size in enumerate(decays) if size > 1]
    first, last = (full[0], full[-1]) if full else (0, -1)
    if decays[first : last + 1] != channels[first : last + 1]:
        shape = (*a[0].shape[:2], *channels)
        return tuple(jnp.broadcast_to(part, shape) for part in a), (1, _size(channels))
    return a, (_size(channels[last + 1 :]), _size(decays))


def _size(shape):
    return math.prod(shape)


def _plan(a, x, initial_state, keep, reverse, view):
    batch, length = x[0].shape[:2]
    channels = _size(x[0].shape[2:])
    # complex values and their links to the next step: half as many to a thread
    heavy = len(initial_state) == 2 and keep is not None
    width = 64 if batch * channels >= 64 * 512 else 16
    if heavy and width == 64:
        width = 32
    width = min(width, triton.next_power_of_2(channels))
    constants = {
        "A_COMPLEX": len(a) == 2,
        "X_COMPLEX": len(x) == 2,
        "COMPLEX": len(initial_state) == 2,
        "A_BATCH": a[0].shape[0] > 1,
        "A_TIME": a[0].shape[1] > 1,
        "KEEP": keep is not None,
        "REVERSE": reverse,
        "TILE": min(TILE, triton.next_power_of_2(length)),
        "WIDTH": width,
        "num_warps": 4 if width > 16 else 2 if heavy else 1,
    }
    sizes = (length, channels, *view)
    return sizes, (batch, triton.cdiv(channels, width)), constants


def _outputs(shape, dtype, parts):
    """Of a real part and an imaginary one, which is never written where there is none
    and has no memory."""
    return [
        jax.ShapeDtypeStruct(shape if part < parts else (1,), dtype)
        for part in range(2)
    ]


def _both(pair):
    return pair if len(pair) == 2 else (pair[0], pair[0])


def _flags(keep, other):
    """[B, L], 0 or 1; something to point at where there are none."""
    return other if keep is None else keep.astype(jnp.int32)


def _reduced(array, shape):
    axes = [i for i, size in enumerate(shape) if size == 1 and array.shape[i] != 1]
    return array.sum(axes, keepdims=True) if axes else array


@triton.jit
def _combine(a, x, b, y):
    return b * a, b * x + y


@triton.jit
def _combine_pairs(a_re, a_im, x_re, x_im, b_re, b_im, y_re, y_im):
    return (
        b_re * a_re - b_im * a_im,
        b_re * a_im + b_im * a_re,
        b_re * x_re - b_im * x_im + y_re,
        b_re * x_im + b_im * x_re + y_im,
    )


@triton.jit
def _combine_kept(a, x, p, b, y, q):
    """Beyond a reset, where q is 0, nothing is multiplied: it may be NaN."""
    return b * a, tl.where(q != 0, b * x, 0.0) + y, p * q


@triton.jit
def _combine_kept_pairs(a_re, a_im, x_re, x_im, p, b_re, b_im, y_re, y_im, q):
    return (
        b_re * a_re - b_im * a_im,
        b_re * a_im + b_im * a_re,
        tl.where(q != 0, b_re * x_re - b_im * x_im, 0.0) + y_re,
        tl.where(q != 0, b_re * x_im + b_im * x_re, 0.0) + y_im,
        p * q,
    )


@triton.jit
def _scan(a, x, links, KEEP: tl.constexpr):
    """From nothing, with the product of the decays and whether all links are kept."""
    if KEEP:
        links = tl.broadcast_to(links[:, None], a.shape)
        p, h, links = tl.associative_scan((a, x, links), 0, _combine_kept)
    else:
        p, h = tl.associative_scan((a, x), 0, _combine)
    return p, h, links


@triton.jit
def _scan_pairs(a_re, a_im, x_re, x_im, links, KEEP: tl.constexpr):
    if KEEP:
        links = tl.broadcast_to(links[:, None], a_re.shape)
        pr, pi, hr, hi, links = tl.associative_scan(
            (a_re, a_im, x_re, x_im, links), 0, _combine_kept_pairs
        )
    else:
        pr, pi, hr, hi = tl.associative_scan(
            (a_re, a_im, x_re, x_im), 0, _combine_pairs
        )
    return pr, pi, hr, hi, links


@triton.jit
def _where(links, x, KEEP: tl.constexpr):
    return tl.where(links != 0, x, 0.0) if KEEP else x


@triton.jit
def _row(tile, index, steps):
    """Row `index` of a tile [TILE, WIDTH]."""
    return tl.sum(tl.where((steps == index)[:, None], tile, 0.0), 0)


@triton.jit
def _forward(
    a_re, a_im, x_re, x_im, s_re, s_im, keep,
    length, channels, inner, count,
    h_re, h_im, f_re, f_im,
    A_COMPLEX: tl.constexpr, X_COMPLEX: tl.constexpr, COMPLEX: tl.constexpr,
    A_BATCH: tl.constexpr, A_TIME: tl.constexpr, KEEP: tl.constexpr,
    REVERSE: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    steps = tl.arange(0, TILE)
    real = d < channels
    state = b * channels + d
    carry_re = tl.load(s_re + state, mask=real, other=0.0)
    dtype = carry_re.dtype
    carry_im = carry_re
    if COMPLEX:
        carry_im = tl.load(s_im + state, mask=real, other=0.0)
    a_first = (b * (length if A_TIME else 1) * count if A_BATCH else b * 0) + (
        d // inner
    ) % count
    for start in range(0, length, TILE):
        i = start + steps
        t_mask = i < length
        t = (length - 1 - i if REVERSE else i).to(tl.int64)
        mask = t_mask[:, None] & real[None, :]
        at = (b * length + t)[:, None] * channels + d[None, :]
        a_at = a_first[None, :] + ((t * count)[:, None] if A_TIME else 0)
        ar = tl.load(a_re + a_at, mask=mask, other=1.0).to(dtype)
        xr = tl.load(x_re + at, mask=mask, other=0.0).to(dtype)
        links = tl.full((TILE,), 1, tl.int32)
        if KEEP:
            links = tl.load(keep + b * length + t, mask=t_mask, other=1)
        if COMPLEX:
            ai = tl.zeros_like(ar)
            xi = tl.zeros_like(xr)
            if A_COMPLEX:
                ai = tl.load(a_im + a_at, mask=mask, other=0.0).to(dtype)
            if X_COMPLEX:
                xi = tl.load(x_im + at, mask=mask, other=0.0).to(dtype)
            pr, pi, hr, hi, linked = _scan_pairs(ar, ai, xr, xi, links, KEEP)
            from_re = pr * carry_re[None, :] - pi * carry_im[None, :]
            from_im = pr * carry_im[None, :] + pi * carry_re[None, :]
            hr += _where(linked, from_re, KEEP)
            hi += _where(linked, from_im, KEEP)
            tl.store(h_im + at, hi.to(h_im.dtype.element_ty), mask=mask)
            carry_im = _row(hi, TILE - 1, steps)
        else:
            pr, hr, linked = _scan(ar, xr, links, KEEP)
            hr += _where(linked, pr * carry_re[None, :], KEEP)
        tl.store(h_re + at, hr.to(h_re.dtype.element_ty), mask=mask)
        carry_re = _row(hr, TILE - 1, steps)
    tl.store(f_re + state, carry_re, mask=real)
    if COMPLEX:
        tl.store(f_im + state, carry_im, mask=real)


@triton.jit
def _backward(
    a_re, a_im, h_re, h_im, g_re, g_im, s_re, s_im, df_re, df_im, keep,
    length, channels, inner, count,
    da_re, da_im, dx_re, dx_im, ds_re, ds_im,
    A_COMPLEX: tl.constexpr, X_COMPLEX: tl.constexpr, COMPLEX: tl.constexpr,
    A_BATCH: tl.constexpr, A_TIME: tl.constexpr, KEEP: tl.constexpr,
    REVERSE: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    steps = tl.arange(0, TILE)
    real = d < channels
    state = b * channels + d
    carry_re = tl.load(df_re + state, mask=real, other=0.0)
    dtype = carry_re.dtype
    first_re = tl.load(s_re + state, mask=real, other=0.0)
    carry_im = carry_re
    first_im = first_re
    if COMPLEX:
        carry_im = tl.load(df_im + state, mask=real, other=0.0)
        first_im = tl.load(s_im + state, mask=real, other=0.0)
    sum_re = tl.zeros_like(carry_re)
    sum_im = tl.zeros_like(carry_re)
    a_first = (b * (length if A_TIME else 1) * count if A_BATCH else b * 0) + (
        d // inner
    ) % count
    for start in range(0, length, TILE):
        # step i of the recurrence, from the last to the first
        i = length - 1 - start - steps
        t_mask = i >= 0
        t = (length - 1 - i if REVERSE else i).to(tl.int64)
        after = t - 1 if REVERSE else t + 1
        before = t + 1 if REVERSE else t - 1
        mask = t_mask[:, None] & real[None, :]
        linked = mask & (i < length - 1)[:, None]
        at = (b * length + t)[:, None] * channels + d[None, :]
        h_at = (b * length + before)[:, None] * channels + d[None, :]
        a_at = a_first[None, :] + ((after * count)[:, None] if A_TIME else 0)
        # into the last step nothing decays: the final state's gradient is the carry
        ar = tl.load(a_re + a_at, mask=linked, other=1.0).to(dtype)
        gr = tl.load(g_re + at, mask=mask, other=0.0).to(dtype)
        hr = tl.load(h_re + h_at, mask=mask & (i > 0)[:, None], other=0.0).to(dtype)
        hr = tl.where((i == 0)[:, None], first_re[None, :], hr)
        links = t_mask.to(tl.int32)
        links_after = links
        if KEEP:
            joined = t_mask & (i < length - 1)
            links_after = tl.load(keep + b * length + after, mask=joined, other=1)
            links = tl.load(keep + b * length + t, mask=t_mask, other=0)
        links = links[:, None]
        if COMPLEX:
            ai = tl.zeros_like(ar)
            if A_COMPLEX:
                ai = -tl.load(a_im + a_at, mask=linked, other=0.0).to(dtype)
            gi = tl.load(g_im + at, mask=mask, other=0.0).to(dtype)
            hi = tl.load(h_im + h_at, mask=mask & (i > 0)[:, None], other=0.0).to(dtype)
            hi = tl.where((i == 0)[:, None], first_im[None, :], hi)
            pr, pi, gr, gi, unbroken = _scan_pairs(ar, ai, gr, gi, links_after, KEEP)
            from_re = pr * carry_re[None, :] - pi * carry_im[None, :]
            from_im = pr * carry_im[None, :] + pi * carry_re[None, :]
            gr += _where(unbroken, from_re, KEEP)
            gi += _where(unbroken, from_im, KEEP)
            through = tl.where(links != 0, gr * hr + gi * hi, 0.0)
            if A_COMPLEX:
                turned = tl.where(links != 0, gi * hr - gr * hi, 0.0)
                if A_TIME:
                    tl.store(da_im + at, turned.to(da_im.dtype.element_ty), mask=mask)
                else:
                    sum_im += tl.sum(tl.where(mask, turned, 0.0), 0)
            if X_COMPLEX:
                tl.store(dx_im + at, gi.to(dx_im.dtype.element_ty), mask=mask)
            carry_im = _row(gi, TILE - 1, steps)
        else:
            pr, gr, unbroken = _scan(ar, gr, links_after, KEEP)
            gr += _where(unbroken, pr * carry_re[None, :], KEEP)
            through = tl.where(links != 0, gr * hr, 0.0)
        if A_TIME:
            tl.store(da_re + at, through.to(da_re.dtype.element_ty), mask=mask)
        else:
            sum_re += tl.sum(tl.where(mask, through, 0.0), 0)
        tl.store(dx_re + at, gr.to(dx_re.dtype.element_ty), mask=mask)
        carry_re = _row(gr, TILE - 1, steps)
    # out of the first step the gradient passes its decay
    t = ((length - 1) if REVERSE else 0) + b * 0
    a_at = a_first + (t * count if A_TIME else 0)
    ar = tl.load(a_re + a_at, mask=real, other=0.0).to(dtype)
    links = b * 0 + 1
    if KEEP:
        links = tl.load(keep + b * length + t)
    if COMPLEX:
        ai = tl.zeros_like(ar)
        if A_COMPLEX:
            ai = -tl.load(a_im + a_at, mask=real, other=0.0).to(dtype)
        carry_re, carry_im = (
            ar * carry_re - ai * carry_im,
            ar * carry_im + ai * carry_re,
        )
        tl.store(ds_im + state, _where(links, carry_im, KEEP), mask=real)
    else:
        carry_re = ar * carry_re
    tl.store(ds_re + state, _where(links, carry_re, KEEP), mask=real)
    if not A_TIME:
        tl.store(da_re + state, sum_re, mask=real)
        if A_COMPLEX:
            tl.store(da_im + state, sum_im, mask=real)
