"""Long convolution with a carried tail, causal or bidirectional."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels import checks, dispatch, rows, segments, shards, varying
from kernels.fft_conv import (
    choice,
    direct,
    monarch,
    overlap_save,
    reference,
    taps,
    xla,
)
from kernels.fft_conv.butterfly import block_sizes, butterfly_conv, dft_factors

__all__ = ["block_sizes", "butterfly_conv", "dft_factors", "fft_conv"]

BACKENDS = {
    "direct": direct,
    "overlap_save": overlap_save,
    "triton": dispatch.triton("kernels.fft_conv.triton"),
    "pallas_tpu": dispatch.pallas_tpu("kernels.fft_conv.pallas_tpu"),
    "monarch": monarch,
    "xla": xla,
    "reference": reference,
}


def fft_conv(
    u: jax.Array,
    k: jax.Array,
    initial_state: jax.Array | None = None,
    reset: jax.Array | None = None,
    *,
    k_reverse: jax.Array | None = None,
    skip: jax.Array | None = None,
    pre_gate: jax.Array | None = None,
    post_gate: jax.Array | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Convolves v = pre_gate * u with a filter as long as the input, or longer.

        y[t] = post_gate[t] (sum_{j < K} k[j] v[t-j] + skip v[t])

    With k_reverse, + sum_{j < K2} k_reverse[j] v[t+1+j] inside the bracket: lag 0 lies
    in k alone (the convention of S4's bidirectional filters).

    Args:
        u: [B, L, H] real input.
        k: [H, K] real filter.
        initial_state: [B, K-1, H], the values of v before the call in order of time;
            zeros if None. Not with k_reverse.
        reset: [B, L] bool; True cuts the link between t-1 and t: the result equals
            separate convolutions of the segments; the initial state reaches the first
            only.
        k_reverse: [H, K2] real filter of the future, or None.
        skip: [H] or None.
        pre_gate, post_gate: [B, L, H] or None.
        reverse: time runs the other way, v[t+j] for v[t-j] and v[t-1-j] for v[t+1+j];
            the initial state holds the values after the call, also in order of time.
        backend: a key of BACKENDS, or None for the one that suits the sizes, the dtype
            and the device: few taps or steps "direct", a filter much shorter than a
            long sequence "overlap_save", otherwise one FFT, as "monarch" where that is
            faster; `backend_report()` says which and why.

    Returns:
        y: [B, L, H] in u's dtype. "monarch" with bfloat16 u multiplies in bfloat16.
        final_state: [B, K-1, H], the initial_state of the next call (with reverse, of
            the call to the left), float32 or wider, zero beyond a reset; None with
            k_reverse, which has no state because it needs the future.

    There is no return_transition: the response is finite, so the state is a window of
    the input and nothing decays; a call is summarised by its last K-1 inputs alone.
    Reverse-mode differentiable in every floating argument, through both results. A
    value that is not finite reaches all of its row up to the next resets, earlier
    tokens too, but never another row.

    Raises:
        ValueError: shapes or dtypes do not fit together, an initial state with
            k_reverse, or the backend cannot run.
    """
    op = "fft_conv"
    _check(op, u, k, initial_state, reset, k_reverse, skip, pre_gate, post_gate)
    call = partial(_positional, reverse, backend)
    arguments = u, k, initial_state, reset, k_reverse, skip, pre_gate, post_gate
    if not u.shape[0]:
        return rows.none(call, *arguments)
    if shards.active():
        each, channel = shards.LONG, shards.BY_SPREAD
        specs = each, channel, each, shards.BY_ROW, channel, channel, each, each
        return shards.run(call, arguments, specs, (each, each))
    advice = choice.advice(u, k, initial_state, k_reverse)
    module = dispatch.pick(op, BACKENDS, backend, u, k, advice=advice)
    gates = skip, pre_gate, post_gate
    dtype = checks.state_dtype(u, k, initial_state, k_reverse, *gates)
    u, k, initial_state, reset, k_reverse, gates = varying.together(
        u, k, initial_state, reset, k_reverse, gates
    )
    skip, pre_gate, post_gate = gates
    v = u.astype(dtype)
    if pre_gate is not None:
        v = v * pre_gate.astype(dtype)
    state = None if initial_state is None else initial_state.astype(dtype)
    into, out = segments.links(reset, reverse)
    v, state, into = segments.flipped(reverse, v, state, into)
    segment = None if into is None else segments.ids(into)
    k = k.astype(dtype)
    ahead = None if k_reverse is None else k_reverse.astype(dtype)
    y = module.convolve(v, k, ahead, state, segment, u.dtype == jnp.bfloat16)
    if skip is not None:
        y = y + skip.astype(dtype) * v
    final = None
    if k_reverse is None:
        tail = u.shape[0], k.shape[1] - 1, u.shape[2]
        state = segments.initial(state, tail, dtype, u)
        final = segments.tail(v, state, segment, out)
    y, final = segments.flipped(reverse, y, final)
    if post_gate is not None:
        y = y * post_gate.astype(dtype)
    return y.astype(u.dtype), final


def _positional(reverse, backend, *arguments):
    *arguments, k_reverse, skip, pre_gate, post_gate = arguments
    return fft_conv(
        *arguments,
        k_reverse=k_reverse,
        skip=skip,
        pre_gate=pre_gate,
        post_gate=post_gate,
        reverse=reverse,
        backend=backend,
    )


def _check(op, u, k, initial_state, reset, k_reverse, skip, pre_gate, post_gate):
    checks.rows(op, u=u)
    checks.arrays(op, k=k)
    checks.arrays_or_none(
        op,
        initial_state=initial_state,
        reset=reset,
        k_reverse=k_reverse,
        skip=skip,
        pre_gate=pre_gate,
        post_gate=post_gate,
    )
    checks.floating(
        op,
        real=True,
        u=u,
        k=k,
        initial_state=initial_state,
        k_reverse=k_reverse,
        skip=skip,
        pre_gate=pre_gate,
        post_gate=post_gate,
    )
    checks.sequence(op, "u", u, "[B, L, H]", ndim=3)
    batch, _, channels = u.shape
    taps.check(op, "k", k, channels)
    taps.check(op, "k_reverse", k_reverse, channels)
    if k_reverse is not None and initial_state is not None:
        raise ValueError(
            f"{op}: initial_state must be None with k_reverse, which has no state, "
            f"got {initial_state.shape}"
        )
    tail = (batch, k.shape[1] - 1, channels)
    checks.shape(op, "initial_state", initial_state, tail, "[B, K-1, H]")
    checks.shape(op, "skip", skip, (channels,), "[H]")
    checks.shape(op, "pre_gate", pre_gate, u.shape, "[B, L, H]")
    checks.shape(op, "post_gate", post_gate, u.shape, "[B, L, H]")
    checks.reset(op, reset, u)
