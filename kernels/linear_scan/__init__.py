"""Diagonal linear recurrences: every state, or only their contraction."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels import checks, dispatch, relay, rows, segments, shards, varying
from kernels.linear_scan import gradient, product, reference, xla
from kernels.linear_scan.contracted import contracted_scan

__all__ = ["contracted_scan", "linear_scan"]

BACKENDS = {
    "triton": dispatch.triton("kernels.linear_scan.triton"),
    "pallas_tpu": dispatch.pallas_tpu("kernels.linear_scan.pallas_tpu"),
    "xla": xla,
    "reference": reference,
}


def linear_scan(
    a: jax.Array,
    x: jax.Array,
    initial_state: jax.Array | None = None,
    reset: jax.Array | None = None,
    *,
    reverse: bool = False,
    return_transition: bool = False,
    backend: str | None = None,
) -> tuple[jax.Array, ...]:
    """Solves h[t] = a[t] * h[t-1] + x[t], elementwise, along the second axis of x.

    The first axis is always the batch. A single sequence [L, D] is given as x[None]:
    two axes are L rows of D steps, each with one number as its state.

    Args:
        a: the decay, real or complex: [B, L, *S] where any axis may be 1, or [*S] for
            one decay at all times. An axis of size 1 is never expanded, its gradient is
            summed.
        x: [B, L, *S] input, real or complex.
        initial_state: [B, *S] state before the first step; zeros if None.
        reset: [B, L] bool; True cuts the link between t-1 and t.
        reverse: solves h[t] = a[t] * h[t+1] + x[t]; the initial state enters at L-1.
        return_transition: also return the product of all decays.
        backend: a key of BACKENDS, or None for the first that supports these arguments.

    Returns:
        h: [B, L, *S] in x's dtype (its complex counterpart if a is complex).
        final_state: [B, *S], the initial_state of the next call, float32 or wider. It
            is h[:, -1]; with reverse h[:, 0], or zero where reset[:, 0] cuts the way
            out.
        transition: [B, *S], d final_state / d initial_state: 0 where a reset lies
            inside.

    Reverse-mode differentiable in a, x and initial_state, through all results; the
    backward pass is the scan in the other direction.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the backend cannot run.
    """
    op = "linear_scan"
    _check(op, a, x, initial_state, reset)
    how = dict(reverse=reverse, return_transition=return_transition)
    call = partial(linear_scan, **how, backend=backend)
    if not x.shape[0]:
        return rows.none(call, a, x, initial_state, reset)
    if shards.active():
        into, each, state = _specs(a, x)
        specs = into, each, state, shards.BY_TOKEN
        results = (each, state, state)[: 2 + return_transition]
        relayed = relay.of(call, 2, **how)
        return shards.run(call, (a, x, initial_state, reset), specs, results, relayed)
    module = dispatch.pick(op, BACKENDS, backend, a, x)
    a, x, initial_state, reset = varying.together(a, x, initial_state, reset)
    if a.ndim == x.ndim - 2:
        a = a[None, None]
    into, out = segments.links(reset, reverse)
    dtype = checks.state_dtype(a, x, initial_state)
    state = segments.initial(initial_state, (x.shape[0], *x.shape[2:]), dtype, x)
    if module is reference:
        h, final = reference.linear_scan(a, x, state, into, reverse)
    else:
        keep = None if into is None else ~into
        h, final = gradient.solve(module, reverse, a, x, state, keep)
    final = segments.cut(final, out)
    if not return_transition:
        return h, final
    transition = _transition(a, x.shape, reset).astype(final.dtype)
    return h, final, transition


def _specs(a, x):
    """Of a, x and a state on several devices; of *S there are the most channels."""
    state = [None] * (x.ndim - 2)
    if state:
        sizes = x.shape[2:]
        last_largest = max(range(len(sizes)), key=lambda i: (sizes[i], i))
        state[last_largest] = shards.CHANNELS
    each = PartitionSpec(shards.ROWS, shards.TIME, *state)
    into = each if a.ndim == x.ndim else PartitionSpec(*state)
    return into, each, PartitionSpec(shards.ROWS, *state)


def _transition(a, shape, reset):
    """The product of a over time, in a's own shape as long as that is possible."""
    batch, length, *rest = shape
    a = a.astype(jnp.promote_types(a.dtype, jnp.float32))
    varies = a.shape[1] > 1
    total = product.over_time(a) if varies else product.power(a[:, 0], length)
    return segments.through(jnp.broadcast_to(total, (batch, *rest)), reset)


def _check(op, a, x, initial_state, reset):
    checks.rows(op, a=a, x=x)
    checks.arrays_or_none(op, initial_state=initial_state, reset=reset)
    checks.floating(op, a=a, x=x, initial_state=initial_state)
    checks.sequence(op, "x", x, "[B, L, *S]")
    state_shape = (x.shape[0], *x.shape[2:])
    with_time = a.ndim == x.ndim and all(
        size in (1, full) for size, full in zip(a.shape, x.shape, strict=True)
    )
    if not with_time and a.shape != x.shape[2:]:
        raise ValueError(
            f"{op}: a must be [B, L, *S] = {x.shape} (any axis may be 1) or [*S] = "
            f"{x.shape[2:]}, got {a.shape}"
        )
    checks.shape(op, "initial_state", initial_state, state_shape, "[B, *S]")
    if jnp.iscomplexobj(initial_state) and not (
        jnp.iscomplexobj(a) or jnp.iscomplexobj(x)
    ):
        raise ValueError(
            f"{op}: initial_state must be real where a and x are, got complex"
        )
    checks.reset(op, reset, x)
