"""A bank of diagonal systems whose states are contracted as they are made."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels import checks, dispatch, pairs, relay, rows, segments, shards, varying
from kernels.linear_scan import contracted_xla, reference

BACKENDS = {"xla": contracted_xla, "reference": reference}


def contracted_scan(
    log_a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    u: jax.Array,
    dt: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    reset: jax.Array | None = None,
    *,
    reverse: bool = False,
    return_transition: bool = False,
    backend: str | None = None,
) -> tuple[jax.Array, ...]:
    """H independent diagonal systems of N modes, without their states [B, L, H, N].

        h[t] = exp(dt[t] log_a) h[t-1] + w(dt[t]) b u[t]
        y[t] = Re sum_n c h[t],        w(dt) = expm1(dt log_a) / expm1(log_a)

    w is the exact hold of an input over dt steps: dt = k equals k steps with the same
    input, dt = 0 leaves the state untouched, dt = None means 1 everywhere.

    Args:
        log_a, b, c: [H, N], real or complex.
        u: [B, L, H], real.
        dt: [B, L] elapsed time before each token, in nominal steps, real and >= 0.
        initial_state: [B, H, N]; zeros if None.
        reset: [B, L] bool; True cuts the link between t-1 and t.
        reverse: the recurrence runs from L-1 to 0, where the initial state enters at
            L-1.
        return_transition: also return the total decay.
        backend: a key of BACKENDS, or None for the first that supports these arguments.

    Returns:
        y: [B, L, H] in u's dtype.
        final_state: [B, H, N], float32 or wider, complex if log_a, b or c is; the
            initial_state of the next call.
        transition: [B, H, N], d final_state / d initial_state: 0 where a reset lies
            inside.

    Reverse-mode differentiable in every floating argument through all results. Memory
    is linear in L: states are kept at chunk boundaries and recomputed inside. Without
    dt and resets a value that is not finite reaches its whole chunk of up to 128
    tokens, earlier ones too, but never another row.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the backend cannot run.
    """
    op = "contracted_scan"
    _check(op, log_a, b, c, u, dt, initial_state, reset)
    how = dict(reverse=reverse, return_transition=return_transition)
    call = partial(contracted_scan, **how, backend=backend)
    if not u.shape[0]:
        return rows.none(call, log_a, b, c, u, dt, initial_state, reset)
    if shards.active():
        system = [shards.BY_CHANNEL] * 3
        sequences = shards.SEQUENCE, shards.BY_TOKEN, shards.STATE, shards.BY_TOKEN
        arguments = log_a, b, c, u, dt, initial_state, reset
        results = (shards.SEQUENCE, *[shards.STATE] * (1 + return_transition))
        relayed = relay.of(call, 5, **how)
        specs = *system, *sequences
        return shards.run(call, arguments, specs, results, relayed)
    module = dispatch.pick(op, BACKENDS, backend, log_a, u)
    dtype = checks.state_dtype(u, log_a, b, c, dt, initial_state)
    system, u, dt, initial_state, reset = varying.together(
        (log_a, b, c), u, dt, initial_state, reset
    )
    log_a, b, c = (array.astype(dtype) for array in system)
    state = segments.initial(initial_state, (u.shape[0], *log_a.shape), dtype, u)
    dt = None if dt is None else dt.astype(log_a.real.dtype)
    into, out = segments.links(reset, reverse)
    u, dt, into = segments.flipped(reverse, u, dt, into)
    y, final = module.contracted_scan(log_a, b, c, u, dt, state, into)
    y, final = segments.flipped(reverse, y), segments.cut(final, out)
    if not return_transition:
        return y, final
    if dt is None:
        transition = pairs.join(pairs.power(pairs.split(log_a), u.shape[1]))
    else:
        transition = pairs.join(_elapsed_power(pairs.split(log_a), dt))
    transition = jnp.broadcast_to(transition, final.shape).astype(dtype)
    return y, final, segments.through(transition, reset)


def _elapsed_power(log_a, dt):
    """exp(sum_t dt[t] log_a) [B, H, N]: as a power, because the sum of all phases would
    be rounded as much as it is large."""
    sixteenths, rest = _elapsed(dt)

    def times(total, digit):
        place, size = digit
        step = jnp.where(sixteenths >> place & 1 == 1, size, 0)
        return pairs.mul(total, over(step)), None

    def over(steps):
        return pairs.exp(pairs.scale(log_a, steps[:, None, None]))

    places = np.arange(31)  # 2^27 steps at most
    digits = jnp.asarray(places, jnp.int32), jnp.asarray(2.0**places / 16, rest.dtype)
    return jax.lax.scan(times, over(rest), digits)[0]


def _elapsed(dt):
    """[B], the sum of dt [B, L] as a number of sixteenths and a small rest."""
    sixteenths = jnp.zeros(dt.shape, jnp.int32)
    while True:
        rounded = jax.lax.stop_gradient(jnp.round(16 * dt))
        sixteenths, dt = sixteenths + rounded.astype(jnp.int32), dt - rounded / 16
        if dt.shape[1] == 1:
            return sixteenths[:, 0], dt[:, 0]
        padding = ((0, 0), (0, dt.shape[1] % 2))
        sixteenths, dt = (jnp.pad(x, padding) for x in (sixteenths, dt))
        sixteenths, dt = (x[:, ::2] + x[:, 1::2] for x in (sixteenths, dt))


def _check(op, log_a, b, c, u, dt, initial_state, reset):
    checks.arrays(op, log_a=log_a, b=b, c=c)
    checks.rows(op, u=u)
    checks.arrays_or_none(op, dt=dt, initial_state=initial_state, reset=reset)
    checks.floating(op, log_a=log_a, b=b, c=c, initial_state=initial_state)
    checks.floating(op, real=True, u=u, dt=dt)
    checks.sequence(op, "u", u, "[B, L, H]", ndim=3)
    batch, _, channels = u.shape
    if log_a.ndim != 2 or log_a.shape[0] != channels or log_a.shape[1] < 1:
        raise ValueError(
            f"{op}: log_a must be [H, N] with H = {channels} as in u, got {log_a.shape}"
        )
    checks.shape(op, "b", b, log_a.shape, "[H, N]")
    checks.shape(op, "c", c, log_a.shape, "[H, N]")
    checks.shape(op, "dt", dt, u.shape[:2], "[B, L]")
    checks.shape(op, "initial_state", initial_state, (batch, *log_a.shape), "[B, H, N]")
    if jnp.iscomplexobj(initial_state) and not any(
        jnp.iscomplexobj(array) for array in (log_a, b, c)
    ):
        raise ValueError(
            f"{op}: initial_state must be real where log_a, b and c are, got complex"
        )
    checks.reset(op, reset, u)
