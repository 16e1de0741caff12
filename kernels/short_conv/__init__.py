"""Depthwise causal convolution of a few taps, with a carried tail."""

from functools import partial

import jax
from jax.sharding import PartitionSpec

from kernels import checks, dispatch, relay, rows, segments, shards, varying
from kernels.short_conv import reference, xla

BACKENDS = {
    "triton": dispatch.triton("kernels.short_conv.triton"),
    "pallas_tpu": dispatch.pallas_tpu("kernels.short_conv.pallas_tpu"),
    "xla": xla,
    "reference": reference,
}


def short_conv(
    u: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    reset: jax.Array | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y[t, h] = bias[h] + sum_{j < W} w[h, j] u[t-j, h].

    Args:
        u: [B, L, H] real input.
        w: [H, W] real taps; lag 0 is w[:, 0].
        bias: [H] or None.
        initial_state: [B, W-1, H], the inputs before the call in order of time; zeros
            if None.
        reset: [B, L] bool; True cuts the link between t-1 and t: nothing before t is
            seen.
        reverse: y[t] = bias + sum_j w[:, j] u[t+j]; the initial state holds the W-1
            inputs after the call, also in order of time.
        backend: a key of BACKENDS, or None for the first that supports these arguments.

    Returns:
        y: [B, L, H] in u's dtype.
        final_state: [B, W-1, H], the initial_state of the next call (with reverse, of
            the call to the left), float32 or wider; inputs beyond a reset are zero.

    There is no transition: the response is finite, the state is a window of the input.
    Differentiable in u, w, bias and initial_state, through both results.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the backend cannot run.
    """
    op = "short_conv"
    checks.rows(op, u=u)
    checks.arrays(op, w=w)
    checks.arrays_or_none(op, bias=bias, initial_state=initial_state, reset=reset)
    checks.floating(op, real=True, u=u, w=w, bias=bias, initial_state=initial_state)
    checks.sequence(op, "u", u, "[B, L, H]", ndim=3)
    batch, _, channels = u.shape
    if w.ndim != 2 or w.shape[0] != channels or w.shape[1] < 1:
        raise ValueError(
            f"{op}: w must be [H, W] with H = {channels}, W >= 1, got {w.shape}"
        )
    tail = (batch, w.shape[1] - 1, channels)
    checks.shape(op, "bias", bias, (channels,), "[H]")
    checks.shape(op, "initial_state", initial_state, tail, "[B, W-1, H]")
    checks.reset(op, reset, u)
    call = partial(short_conv, reverse=reverse, backend=backend)
    if not u.shape[0]:
        return rows.none(call, u, w, bias, initial_state, reset)
    if shards.active():
        each, by_channel = shards.SEQUENCE, shards.BY_CHANNEL
        window = PartitionSpec(shards.ROWS, None, shards.CHANNELS)
        specs = each, by_channel, by_channel, window, shards.BY_TOKEN
        arguments = u, w, bias, initial_state, reset
        relayed = partial(_relayed, call, reverse)
        return shards.run(call, arguments, specs, (each, window), relayed)
    module = dispatch.pick(op, BACKENDS, backend, u, w)
    dtype = checks.state_dtype(u, w, bias, initial_state)
    u, w, bias, initial_state, reset = varying.together(
        u, w, bias, initial_state, reset
    )
    state = segments.initial(initial_state, tail, dtype, u)
    into, out = segments.links(reset, reverse)
    u, state, into = segments.flipped(reverse, u, state, into)
    segment = None if into is None else segments.ids(into)
    y = module.short_conv(u, w, bias, state, segment)
    final = segments.tail(u, state, segment, out)
    return segments.flipped(reverse, y, final)


def _relayed(call, reverse, axes, u, w, bias, initial_state, reset):
    """Each device with its part of the length."""
    _, tail = call(u, w, bias, None, reset)
    cut = None if reset is None else reset.any(1)
    entering, last = relay.window(axes, tail, u.shape[1], cut, initial_state, reverse)
    return call(u, w, bias, entering, reset)[0], last
