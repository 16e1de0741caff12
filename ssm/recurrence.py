"""One linear system, four modes: step, scan, chunked, convolution.

A bank of H independent systems with n modes each (S4D), `Diagonal(log_a, b, c)`:

    h[t] = a^elapsed[t] h[t-1] + w(elapsed[t]) b u[t]        [B, H, n]
    y[t] = Re sum_n c h[t]                                   [B, H]

w(e) = (a^e - 1) / (a - 1) is the exact hold: an input that lasts e steps weighs like e
repeated steps, so w(0) = 0 (a masked token) and w(1) = 1. All modes return (y, state)
and agree to rounding; `tests/test_recurrence.py` holds them to it.

`mixed` is the multi-input system of S5 and the LRU, whose P states are shared by all
features. `varying` discretises per token, for rules whose gaps are not a power of a.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from kernels import contracted_scan, fft_conv, linear_scan, vandermonde_transpose
from ssm import filters
from ssm.chunks import bound, in_chunks
from ssm.discretize import expm1_ratio
from ssm.sequence import align_right

CHUNK = 128  # tokens whose states [H, n] exist at once in the chunked forms
MIXED_CHUNK = 512  # the same for the states [P] that all features share


class Diagonal(NamedTuple):
    """A discrete bank of diagonal systems; log_a, b, c are [H, n], real or complex."""

    log_a: jax.Array
    b: jax.Array
    c: jax.Array


def hold(log_a: jax.Array, elapsed: jax.Array) -> jax.Array:
    """w(e) = (a^e - 1) / (a - 1), finite as a -> 1. Shapes broadcast."""
    return elapsed * expm1_ratio(elapsed * log_a) / expm1_ratio(log_a)


def step(
    system: Diagonal,
    u: jax.Array,
    state: jax.Array,
    elapsed: jax.Array | None = None,
    reset: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token. u [B, H], state [B, H, n], elapsed, reset [B] -> y [B, H], state."""
    log_a, b, c = system
    if elapsed is None:
        return advance(jnp.exp(log_a), b, c, u, state, reset)
    e = elapsed[:, None, None]
    return advance(jnp.exp(e * log_a), hold(log_a, e) * b, c, u, state, reset)


def advance(
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    u: jax.Array,
    state: jax.Array,
    reset: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token with the decay a itself, O(H n) multiplications and nothing else."""
    if reset is not None:
        state = jnp.where(reset[:, None, None], 0, state)
    state = a * state + b * u[:, :, None]
    return jnp.sum((c * state).real, axis=-1), state


def scan(
    system: Diagonal,
    u: jax.Array,
    state: jax.Array | None = None,
    elapsed: jax.Array | None = None,
    reset: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """All states at once, [B, L, H, n]: the definition, for short calls and reading.

    u [B, L, H], state [B, H, n], elapsed and reset [B, L] -> y [B, L, H], state.
    """
    log_a, b, c = system
    if elapsed is None:
        a, x = jnp.exp(log_a), b * u[..., None]
    else:
        e = elapsed[:, :, None, None]
        a, x = jnp.exp(e * log_a), hold(log_a, e) * b * u[..., None]
    h, state = linear_scan(a, x, state, reset)
    return jnp.sum(c * h, axis=-1).real, state


def chunked(
    system: Diagonal,
    u: jax.Array,
    state: jax.Array | None = None,
    elapsed: jax.Array | None = None,
    reset: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The same in memory O(L H + H n): states live only inside a chunk. Any state,
    reset and elapsed time; shapes as in `scan`."""
    return contracted_scan(*system, u, elapsed, state, reset)


def convolution(
    system: Diagonal,
    u: jax.Array,
    mask: jax.Array | None = None,
    skip: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y = K * u (+ skip u) by FFT. No state enters, no reset and no gap may lie inside.

    Args:
        u: [B, L, H], zero where masked.
        mask: [B, L] with padding on the right only; it concerns the final state, which
            is that of the last existing token.
        skip: [H] feed-through D, or None.

    Returns:
        y [B, L, H] and the final state [B, H, n], which costs nothing when unused.
    """
    log_a, b, c = system
    y, _ = fft_conv(u, filters.diagonal(log_a, b, c, u.shape[1]), skip=skip)
    return y, final_state(system, u.astype(y.dtype), mask)


def final_state(
    system: Diagonal, u: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """The state [B, H, n] after u, which no state entered; see `convolution`."""
    aligned = u if mask is None else align_right(u, mask)
    backwards = jnp.flip(aligned, axis=1).swapaxes(1, 2)
    return system.b * vandermonde_transpose(backwards, system.log_a)


def varying(
    rule: Callable[..., tuple[jax.Array, jax.Array]],
    B: jax.Array,
    c: jax.Array,
    u: jax.Array,
    state: jax.Array | None = None,
    elapsed: jax.Array | None = None,
    reset: jax.Array | None = None,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """A bank whose discretisation is evaluated at every token's own step.

    rule(elapsed [B, T, 1, 1]) -> (log_a, gain), each broadcastable to [B, T, H, n];
    B, c [H, n]; everything else as in `scan`. Memory of one chunk of states.
    """
    if state is None:
        state = jnp.zeros((u.shape[0], *c.shape), c.dtype)

    inputs = Partial(_of_tokens, bound(rule), B)
    body = Partial(_read, inputs, c)
    alone = Partial(functools.partial(_twice, reverse=False), inputs)
    return in_chunks(body, state, u, elapsed, reset, chunk, alone=alone)


def _of_tokens(rule, B, u, elapsed):
    """a and x of `varying`."""
    log_a, gain = rule(elapsed[:, :, None, None])
    return jnp.exp(log_a), gain * B * u[..., None]


def _read(inputs, c, state, u, elapsed, reset):
    h, state = linear_scan(*inputs(u, elapsed), state, reset)
    return state, jnp.sum(c * h, axis=-1).real


def _twice(inputs, state, u, elapsed, reset, *, reverse):
    """The last state of two scans side by side, the second one without input."""
    a, x = inputs(u, elapsed)
    x, nothing = jnp.broadcast_arrays(x, jnp.zeros((), x.dtype))
    a = jnp.concatenate([jnp.broadcast_to(a, (*a.shape[:-1], x.shape[-1]))] * 2, -1)
    x = jnp.concatenate([x, nothing], -1)
    return linear_scan(a, x, state, reset, reverse=reverse)[1]


def mixed(
    rule: Callable[..., tuple[jax.Array, jax.Array]],
    B: jax.Array,
    C: jax.Array,
    u: jax.Array,
    state: jax.Array | None = None,
    elapsed: jax.Array | None = None,
    reset: jax.Array | None = None,
    *,
    reverse: bool = False,
    chunk: int = MIXED_CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """x[t] = a[t] x[t-1] + gain[t] (B u[t]), y[t] = Re(C x[t]): S5 and the LRU.

    Each chunk is one matmul, one scan and one matmul; [B, L, P] never exists, forward
    or backward.

    Args:
        rule: rule(None) -> (log_a, gain) [P] for regular tokens; rule(elapsed
            [B, T, 1]) -> [B, T, P] for elapsed times.
        B, C: [P, H] and [H, P] complex.
        u: [B, L, H], zero where masked.
        state: [B, P] complex or None; elapsed, reset: [B, L] or None.
        reverse: run from the last token to the first; a reset at t then cuts the link
            from t to t-1, the same link as forward.

    Returns:
        y [B, L, H] and the final state [B, P].
    """
    if state is None:
        dtype = jnp.promote_types(u.dtype, C.dtype)
        state = jnp.zeros((u.shape[0], C.shape[1]), dtype)
    into = jnp.concatenate([B.real, B.imag]).T  # [H, 2P]: one real matmul, not two
    out = jnp.concatenate([C.real.T, -C.imag.T])  # [2P, H]
    maps = Partial(_onto, into), Partial(_onto, out)
    return driven(rule, *maps, u, state, elapsed, reset, reverse=reverse, chunk=chunk)


def _onto(weights, x, u=None):
    """x @ weights."""
    return x @ weights


def driven(
    rule: Callable[..., tuple[jax.Array, jax.Array]],
    into: Callable[[jax.Array], jax.Array],
    out: Callable[[jax.Array, jax.Array], jax.Array],
    u: jax.Array,
    state: jax.Array,
    elapsed: jax.Array | None,
    reset: jax.Array | None,
    *,
    reverse: bool,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """`mixed` between any two linear maps, over any places S (pixels, or none).

    Args:
        rule: as in `mixed`; the elapsed times it is given are [B, T, 1, ..].
        into: u [B, T, ...] -> [B, T, *S, 2P], real parts before imaginary ones.
        out: ([B, T, *S, 2P], u) -> y [B, T, ...], real parts before imaginary ones.
        u: [B, L, ...], zero where masked.
        state: [B, *S, P] complex.
        elapsed, reset, reverse, chunk: as in `mixed`.

    Returns:
        y [B, L, ...] and the final state.
    """
    # once, and not in every chunk
    regular = rule(None) if elapsed is None else None
    inputs = Partial(_mapped, bound(rule), bound(into), regular)
    body = Partial(functools.partial(_answer, reverse=reverse), inputs, bound(out))
    alone = Partial(functools.partial(_twice, reverse=reverse), inputs)
    return in_chunks(body, state, u, elapsed, reset, chunk, reverse, alone)


def _mapped(rule, into, regular, u, elapsed):
    """a and x of `driven`; regular: what the rule says of regular tokens."""
    x = into(u)
    P = x.shape[-1] // 2
    places = (1,) * (x.ndim - 1)
    if elapsed is None:
        log_a, gain = regular
        log_a = log_a.reshape(*places, P)
    else:
        elapsed = elapsed.reshape(*elapsed.shape, *places[2:], 1)
        log_a, gain = rule(elapsed)
    return jnp.exp(log_a), gain * jax.lax.complex(x[..., :P], x[..., P:])


def _answer(inputs, out, state, u, elapsed, reset, *, reverse):
    h, state = linear_scan(*inputs(u, elapsed), state, reset, reverse=reverse)
    return state, out(jnp.concatenate([h.real, h.imag], axis=-1), u)
