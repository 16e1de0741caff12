"""Linear attention with decay: recurrences whose state is a matrix."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels import checks, dispatch, relay, rows, segments, shards, varying
from kernels.chunked_scan import reference, xla

BACKENDS = {
    "triton": dispatch.triton("kernels.chunked_scan.triton"),
    "pallas_tpu": dispatch.pallas_tpu("kernels.chunked_scan.pallas_tpu"),
    "xla": xla,
    "reference": reference,
}


def chunked_scan(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    beta: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    reset: jax.Array | None = None,
    *,
    reverse: bool = False,
    return_transition: bool = False,
    backend: str | None = None,
) -> tuple[jax.Array, ...]:
    """H heads, each with a state of K keys by V values.

        S[t] = exp(g[t]) S[t-1] + k[t] v[t]^T                [B, H, K, V]
        o[t] = S[t]^T q[t]                                   [B, H, V]

    with g the log decay, and with beta the delta rule, which first takes away what the
    state holds under the key:

        S[t] = (I - beta[t] k[t] k[t]^T) exp(g[t]) S[t-1] + beta[t] k[t] v[t]^T

    Nothing is scaled or normalised here; the delta rule is stable for beta |k|^2 <= 2.

    Args:
        q, k: [B, L, G, K] real; G divides H, and head h uses group h // (H / G).
        v: [B, L, H, V] real.
        log_decay: <= 0, -inf allowed: None for no decay, [H] for a constant one
            (retention, lightning attention), [B, L, H] (Mamba-2, gated DeltaNet), or
            [B, L, H, K] for one per key channel (GLA, Kimi delta attention).
        beta: [B, L, H] for the delta rule, or None.
        initial_state: [B, H, K, V]; zeros if None.
        reset: [B, L] bool; True cuts the link between t-1 and t.
        reverse: the recurrence runs from L-1 to 0, where the initial state enters at
            L-1.
        return_transition: also return how the initial state arrives.
        backend: a key of BACKENDS, or None for the first that supports these arguments.

    Returns:
        o: [B, L, H, V] in v's dtype.
        final_state: [B, H, K, V], float32 or wider, the initial_state of the next call.
        transition: d final_state / d initial_state, 0 where a reset lies inside: the
            total decay [B, H], or [B, H, K] where it is per channel; with beta a matrix
            [B, H, K, K] that multiplies the initial state from the left, at the cost of
            K more values per head.

    A token with g = 0 and k = 0, or with beta = 0, leaves the state as it was.
    Reverse-mode differentiable in every floating argument through all results. Memory
    is linear in L: states are kept at chunk boundaries and everything inside is made
    again. A value that is not finite reaches its whole chunk of up to 128 tokens,
    earlier ones too, but never another row; "xla" and "reference" stop it at a reset,
    the kernels for GPUs and TPUs stop it at the end of the reset's chunk. A cotangent
    that is not finite also passes resets with beta, to earlier tokens of its row.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the backend cannot run.

    Source: https://arxiv.org/abs/2405.21060 (scalar decay), 2312.06635 (per channel),
    2412.06464 (gated delta rule), 2510.26692 (delta rule with decay per channel).
    """
    op = "chunked_scan"
    _check(op, q, k, v, log_decay, beta, initial_state, reset)
    how = dict(reverse=reverse, return_transition=return_transition)
    call = partial(chunked_scan, **how, backend=backend)
    if not v.shape[0]:
        return rows.none(call, q, k, v, log_decay, beta, initial_state, reset)
    if shards.active():
        constant = log_decay is not None and log_decay.ndim == 1
        decay = shards.BY_CHANNEL if constant else shards.SEQUENCE
        sequences = [shards.SEQUENCE] * 3  # heads, and groups of them
        specs = *sequences, decay, shards.SEQUENCE, shards.STATE, shards.BY_TOKEN
        arguments = q, k, v, log_decay, beta, initial_state, reset
        results = (shards.SEQUENCE, *[shards.STATE] * (1 + return_transition))
        carry = relay.decayed if beta is None else jnp.matmul
        relayed = relay.of(call, 5, **how, carry=carry)
        return shards.run(call, arguments, specs, results, relayed)
    # which are multiplied with each other: kernels do that in one dtype
    q, k = (x.astype(jnp.promote_types(q.dtype, k.dtype)) for x in (q, k))
    module = dispatch.pick(op, BACKENDS, backend, q, v, log_decay, beta)
    dtype = checks.state_dtype(q, k, v, log_decay, beta, initial_state)
    batch, _, heads, values = v.shape
    shape = batch, heads, q.shape[-1], values
    q, k, v, log_decay, beta, initial_state, reset = varying.together(
        q, k, v, log_decay, beta, initial_state, reset
    )
    state = segments.initial(initial_state, shape, dtype, v)
    if log_decay is None:
        log_decay = varying.like(jnp.zeros(heads, dtype), v)
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, v.shape[:3])
    inputs = v
    by_columns = return_transition and beta is not None
    if by_columns:
        # columns without values, which begin as the unit matrix
        unit = jnp.broadcast_to(jnp.eye(shape[2], dtype=dtype), (*shape[:3], shape[2]))
        state = jnp.concatenate([state, unit], -1)
        inputs = jnp.pad(v, [(0, 0)] * 3 + [(0, shape[2])])
    into, out = segments.links(reset, reverse)
    *sequences, into = segments.flipped(reverse, q, k, inputs, log_decay, beta, into)
    o, final = module.chunked_scan(*sequences, state, into)
    o, final = segments.flipped(reverse, o), segments.cut(final, out)
    o, result = o[..., :values].astype(v.dtype), final[..., :values]
    if not return_transition:
        return o, result
    if by_columns:
        return o, result, final[..., values:]
    transition = jnp.exp(log_decay.astype(dtype).sum(1))
    return o, result, segments.through(transition, reset)


def _check(op, q, k, v, log_decay, beta, initial_state, reset):
    checks.rows(op, q=q, k=k, v=v)
    checks.arrays_or_none(
        op, log_decay=log_decay, beta=beta, initial_state=initial_state, reset=reset
    )
    checks.floating(
        op,
        real=True,
        q=q,
        k=k,
        v=v,
        log_decay=log_decay,
        beta=beta,
        initial_state=initial_state,
    )
    checks.sequence(op, "v", v, "[B, L, H, V]", ndim=4)
    batch, length, heads, values = v.shape
    if q.ndim != 4 or q.shape[:2] != (batch, length):
        raise ValueError(
            f"{op}: q must be [B, L, G, K] with B = {batch} and L = {length} as in v, "
            f"got {q.shape}"
        )
    if q.shape[2] < 1 or heads % q.shape[2]:
        raise ValueError(
            f"{op}: q must have a number of groups G that divides H = {heads}, the "
            f"heads of v, got {q.shape}"
        )
    checks.shape(op, "k", k, q.shape, "[B, L, G, K]")
    scalar, vector = v.shape[:3], (*v.shape[:3], q.shape[3])
    if log_decay is not None and log_decay.shape not in ((heads,), scalar, vector):
        raise ValueError(
            f"{op}: log_decay must be [H] = {(heads,)}, [B, L, H] = {scalar} or "
            f"[B, L, H, K] = {vector}, got {log_decay.shape}"
        )
    checks.shape(op, "beta", beta, scalar, "[B, L, H]")
    checks.shape(
        op, "initial_state", initial_state, (batch, heads, *vector[3:], values),
        "[B, H, K, V]",
    )  # fmt: skip
    checks.reset(op, reset, v)
