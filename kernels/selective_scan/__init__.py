"""The selective scan of Mamba (S6), without its states [B, L, D, N]."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels import checks, dispatch, relay, rows, segments, shards, varying
from kernels.selective_scan import reference, xla

BACKENDS = {
    "triton": dispatch.triton("kernels.selective_scan.triton"),
    "pallas_tpu": dispatch.pallas_tpu("kernels.selective_scan.pallas_tpu"),
    "xla": xla,
    "reference": reference,
}

# Of the arguments on several devices: B and C are shared by all channels.
SPECS = (
    shards.SEQUENCE,
    shards.SEQUENCE,
    shards.BY_CHANNEL,
    shards.BY_TOKEN,
    shards.BY_TOKEN,
    shards.STATE,
    shards.BY_TOKEN,
    shards.BY_CHANNEL,
)


def selective_scan(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    initial_state: jax.Array | None = None,
    reset: jax.Array | None = None,
    *,
    skip: jax.Array | None = None,
    reverse: bool = False,
    return_transition: bool = False,
    backend: str | None = None,
) -> tuple[jax.Array, ...]:
    """D independent systems of N real modes whose step, input and output weights vary.

        h[t] = exp(dt[t] A) h[t-1] + dt[t] u[t] B[t]         [B, D, N]
        y[t] = sum_n C[t] h[t] + skip u[t]                   [B, D]

    Args:
        u: [B, L, D] real.
        dt: [B, L, D] real step, >= 0; dt = 0 leaves the state as it was.
        A: [D, N] real, negative where the state is to decay.
        B, C: [B, L, N] real, shared by all D.
        initial_state: [B, D, N]; zeros if None.
        reset: [B, L] bool; True cuts the link between t-1 and t.
        skip: [D] or None.
        reverse: the recurrence runs from L-1 to 0, where the initial state enters at
            L-1.
        return_transition: also return the total decay.
        backend: a key of BACKENDS, or None for the first that supports these arguments.

    Returns:
        y: [B, L, D] in u's dtype.
        final_state: [B, D, N], float32 or wider, the initial_state of the next call.
        transition: [B, D, N], d final_state / d initial_state: 0 where a reset lies
            inside.

    Reverse-mode differentiable in every floating argument through all results. Memory
    is linear in L and free of L x N: states are kept at chunk boundaries and made again
    inside.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the backend cannot run.

    Source: https://arxiv.org/abs/2312.00752, section 3.
    """
    op = "selective_scan"
    _check(op, u, dt, A, B, C, initial_state, reset, skip)
    how = dict(reverse=reverse, return_transition=return_transition)
    call = partial(_positional, **how, backend=backend)
    if not u.shape[0]:
        return rows.none(call, u, dt, A, B, C, initial_state, reset, skip)
    if shards.active():
        arguments = u, dt, A, B, C, initial_state, reset, skip
        results = (shards.SEQUENCE, *[shards.STATE] * (1 + return_transition))
        relayed = relay.of(call, 5, **how)
        return shards.run(call, arguments, SPECS, results, relayed)
    module = dispatch.pick(op, BACKENDS, backend, u, A)
    dtype = checks.state_dtype(u, dt, A, B, C, initial_state, skip)
    u, dt, A, B, C, initial_state, reset, skip = varying.together(
        u, dt, A, B, C, initial_state, reset, skip
    )
    state = segments.initial(initial_state, (u.shape[0], *A.shape), dtype, u)
    into, out = segments.links(reset, reverse)
    x, steps, B, C, into = segments.flipped(reverse, u, dt, B, C, into)
    y, final = module.selective_scan(x, steps, A, B, C, skip, state, into)
    y, final = segments.flipped(reverse, y), segments.cut(final, out)
    if not return_transition:
        return y, final
    transition = jnp.exp(dt.astype(dtype).sum(1)[..., None] * A.astype(dtype))
    return y, final, segments.through(transition, reset)


def _positional(*arguments, **options):
    *arguments, skip = arguments
    return selective_scan(*arguments, skip=skip, **options)


def _check(op, u, dt, A, B, C, initial_state, reset, skip):
    checks.rows(op, u=u, dt=dt, B=B, C=C)
    checks.arrays(op, A=A)
    checks.arrays_or_none(op, initial_state=initial_state, reset=reset, skip=skip)
    checks.floating(
        op,
        real=True,
        u=u,
        dt=dt,
        A=A,
        B=B,
        C=C,
        initial_state=initial_state,
        skip=skip,
    )
    checks.sequence(op, "u", u, "[B, L, D]", ndim=3)
    batch, length, channels = u.shape
    checks.shape(op, "dt", dt, u.shape, "[B, L, D]")
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] < 1:
        raise ValueError(
            f"{op}: A must be [D, N] with D = {channels} as in u, got {A.shape}"
        )
    for name, array in (("B", B), ("C", C)):
        checks.shape(op, name, array, (batch, length, A.shape[1]), "[B, L, N]")
    checks.shape(op, "initial_state", initial_state, (batch, *A.shape), "[B, D, N]")
    checks.shape(op, "skip", skip, (channels,), "[D]")
    checks.reset(op, reset, u)
