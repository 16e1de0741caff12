"""Diagonal plus low rank systems (S4, https://arxiv.org/abs/2111.00396), bilinear.

    x' = A x + B u,   A = Lam - P P*,   y = 2 Re(C x)

on stored halves of conjugate pairs: lam, B, C [H, n], P [R, H, n] complex, where
P* x means 2 Re(conj(P) . x). One step of length dt solves

    (I - dt/2 A) x[t] = (I + dt/2 A) x[t-1] + dt B u[t],

by Woodbury in O(n R); dt = 0 leaves the state as it was. Between chunks, and to get C
from the trained C~ = C (I - A_bar^length), the same step is a dense real matrix
A_bar [H, N, N] on [Re x, Im x], N = 2n. It is a contraction, so its powers are stable,
where those of a diagonalised A_bar are not: eigenvectors of HiPPO have condition 1e15.
Dense products are of full precision: accelerators by default round their factors.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from kernels.cauchy import small_solve
from kernels.varying import together
from ssm.chunks import in_chunks


class DPLR(NamedTuple):
    """lam, B [H, n], P [R, H, n] complex; dt [H, 1] or [..., H, 1] real."""

    lam: jax.Array
    P: jax.Array
    B: jax.Array
    dt: jax.Array


class Step(NamedTuple):
    """What a step of fixed length needs besides the system: see `prepare`."""

    decay: jax.Array  # [..., H, n], 1 / (1 - dt lam / 2)
    rows: jax.Array  # [R, ..., H, n], G^-1 (conj(P) decay)


def _both(x):
    """2 Re sum_n x, keeping the axis: the sum over a conjugate pair."""
    return 2.0 * jnp.sum(x.real, -1, keepdims=True)


def _low_rank(P, weights, x):
    """sum_r P_r 2 Re(weights_r . x)."""
    return sum(p * _both(w * x) for p, w in zip(P, weights, strict=True))


def prepare(system: DPLR) -> Step:
    """The constants of a step, for a dt that may have axes before [H, 1]."""
    lam, P, _, dt = system
    half = 0.5 * dt
    decay = 1.0 / (1.0 - half * lam)
    rows = [p.conj() * decay for p in P]
    if not rows:
        return Step(decay, jnp.zeros((0, *decay.shape), decay.dtype))
    G = [
        [(1.0 if r == s else 0.0) + half * _both(row * p) for s, p in enumerate(P)]
        for r, row in enumerate(rows)
    ]
    return Step(decay, jnp.stack(small_solve(G, rows)))


def step(system: DPLR, prepared: Step, u: jax.Array, state: jax.Array) -> jax.Array:
    """One token: u [..., H], state [..., H, n] -> the next state."""
    lam, P, B, dt = system
    half = 0.5 * dt
    changed = lam * state - _low_rank(P, P.conj(), state)
    right = state + half * changed + dt * B * u[..., None]
    return prepared.decay * (right - half * _low_rank(P, prepared.rows, right))


def output(C: jax.Array, state: jax.Array) -> jax.Array:
    """y = 2 Re(C . x): C [H, n], state [..., H, n] -> [..., H]."""
    return 2.0 * jnp.sum((C * state).real, -1)


def varying(
    system: DPLR,
    C: jax.Array,
    u: jax.Array,
    state: jax.Array | None = None,
    elapsed: jax.Array | None = None,
    reset: jax.Array | None = None,
    chunk: int = 32,
) -> tuple[jax.Array, jax.Array]:
    """Token by token with dt elapsed[t], in memory of one chunk of states.

    u [B, L, H], state [B, H, n], elapsed and reset [B, L] -> y [B, L, H], state.
    """
    if state is None:
        state = jnp.zeros((u.shape[0], *C.shape), C.dtype)
    return in_chunks(Partial(_steps, system, C), state, u, elapsed, reset, chunk)


def _steps(system, C, state, u, elapsed, reset):
    """`varying` over one chunk."""
    lam, P, B, dt = system
    steps = jnp.ones(u.shape[:2], dt.dtype) if elapsed is None else elapsed

    def one(state, token):
        u, step_length, restart = token
        if restart is not None:
            state = jnp.where(restart[:, None, None], 0, state)
        current = DPLR(lam, P, B, dt * step_length[:, None, None])
        state = step(current, prepare(current), u, state)
        return state, output(C, state)

    tokens = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (u, steps, reset))
    state, y = jax.lax.scan(one, state, tokens)
    return state, jnp.swapaxes(y, 0, 1)


# Dense real matrices, for what is done once per call.


def to_real(x: jax.Array) -> jax.Array:
    """[..., n] complex -> [..., N] real coordinates of a state."""
    return jnp.concatenate([x.real, x.imag], -1)


def from_real(x: jax.Array) -> jax.Array:
    """[..., N] real -> [..., n] complex."""
    return jax.lax.complex(*jnp.split(x, 2, -1))


def row(C: jax.Array) -> jax.Array:
    """The real row c with c . to_real(x) = 2 Re(C . x)."""
    return 2.0 * jnp.concatenate([C.real, -C.imag], -1)


def from_row(c: jax.Array) -> jax.Array:
    """The C [..., n] of a real row [..., N]."""
    re, im = jnp.split(0.5 * c, 2, -1)
    return jax.lax.complex(re, -im)


def _units(lam):
    """The N real unit vectors as states [N, H, n]."""
    n = lam.shape[-1]
    eye = from_real(jnp.eye(2 * n, dtype=lam.real.dtype))
    return jnp.broadcast_to(eye[:, None], (2 * n, *lam.shape))


def dense(system: DPLR) -> tuple[jax.Array, jax.Array]:
    """A_bar [H, N, N] and B_bar [H, N] in real coordinates."""
    prepared = prepare(system)
    units = _units(system.lam)
    dtype = system.lam.real.dtype
    columns = step(system, prepared, jnp.zeros(units.shape[:-1], dtype), units)
    zeros = jnp.zeros_like(units[0])
    ones = jnp.ones(zeros.shape[:-1], dtype)
    B_bar = to_real(step(system, prepared, ones, zeros))
    return jnp.moveaxis(to_real(columns), 0, -1), B_bar


def _inverse(system):
    """A^-1 [H, N, N], dense in real coordinates, by Woodbury."""
    lam, P, _, _ = system
    rows = [p.conj() / lam for p in P]
    units = _units(lam)
    right = units / lam
    if rows:
        G = [
            [(1.0 if r == s else 0.0) - _both(w * p) for s, p in enumerate(P)]
            for r, w in enumerate(rows)
        ]
        solved = small_solve(G, [_both(w * units) for w in rows])
        right = right + sum(p * s for p, s in zip(P, solved, strict=True)) / lam
    return jnp.moveaxis(to_real(right), 0, -1)


@jax.default_matmul_precision("highest")
def power(A_bar: jax.Array, count: int) -> jax.Array:
    """A_bar^count [H, N, N] by squaring; count is static."""
    result = jnp.broadcast_to(jnp.eye(A_bar.shape[-1], dtype=A_bar.dtype), A_bar.shape)
    while count:
        result = result @ A_bar if count & 1 else result
        count >>= 1
        A_bar = A_bar @ A_bar if count else A_bar
    return result


@jax.default_matmul_precision("highest")
def _geometric(A_bar, count):
    """sum_{k < count} A_bar^k, count >= 1, by doubling."""
    total = jnp.broadcast_to(jnp.eye(A_bar.shape[-1], dtype=A_bar.dtype), A_bar.shape)
    A_power = A_bar
    for digit in bin(count)[3:]:
        total, A_power = total + A_power @ total, A_power @ A_power
        if digit == "1":
            total, A_power = total + A_power, A_power @ A_bar
    return total


@jax.default_matmul_precision("highest")
def truncated(system: DPLR, C: jax.Array, length: int) -> jax.Array:
    """C~ = C (I - A_bar^length): C [..., H, n] -> [..., H, n]."""
    A_bar, _ = dense(system)
    c = row(C)
    remainder = jnp.einsum("...hm,hmn->...hn", c, power(A_bar, length))
    return from_row(c - remainder)


@jax.default_matmul_precision("highest")
def lengthened(system: DPLR, C_tilde: jax.Array, length: int, times: int) -> jax.Array:
    """C (I - A_bar^(times length)) from C~ = C (I - A_bar^length), times >= 1.

    It is C~ (I + A_bar^length + ... + A_bar^((times - 1) length)), without the inverse
    of `untruncated`, which enlarges rounding where the slow modes outlive the length.
    """
    if times == 1:
        return C_tilde
    A_bar, _ = dense(system)
    S = _geometric(power(A_bar, length), times)
    return from_row(jnp.einsum("...hm,hmn->...hn", row(C_tilde), S))


@jax.default_matmul_precision("highest")
def untruncated(system: DPLR, C_tilde: jax.Array, length: int) -> jax.Array:
    """C from C~ = C (I - A_bar^length): [..., H, n] -> [..., H, n].

    By I - A_bar^length = (I - A_bar) S with S = sum_k A_bar^k and
    (I - A_bar)^-1 = I/2 - A^-1 / dt: the plain difference would lose the slow modes,
    for which A_bar^length is near I.
    """
    A_bar, _ = dense(system)
    S = _geometric(A_bar, length)
    c = row(C_tilde)
    columns = jnp.moveaxis(c.reshape(-1, *c.shape[-2:]), 0, -1)  # [H, N, *]
    columns = jnp.linalg.solve(S.swapaxes(-1, -2), columns)
    inverse = _inverse(system) / system.dt[..., None]
    columns = 0.5 * columns - jnp.einsum("hnm,hnc->hmc", inverse, columns)
    return from_row(jnp.moveaxis(columns, -1, 0).reshape(c.shape))


def _chunk(length):
    """A power of two near sqrt(length)."""
    return 1 << ((length - 1).bit_length() + 1) // 2


@jax.default_matmul_precision("highest")
def response(system: DPLR, C: jax.Array, state: jax.Array, length: int) -> jax.Array:
    """What a state still says: y[l] = 2 Re(C A_bar^(l+1) x), l < length.

    state [B, H, n] -> [B, length, H].
    """
    system, C, state = together(system, C, state)
    A_bar, _ = dense(system)
    size = _chunk(length)
    rows, A_power = row(C)[:, None] @ A_bar, A_bar  # [H, 1, N]
    while rows.shape[1] < size:
        rows = jnp.concatenate([rows, rows @ A_power], 1)
        A_power = A_power @ A_power
    # A_power = A_bar^size

    def one(x, _):
        return jnp.einsum("hmn,bhn->bhm", A_power, x), x

    count = -(-length // size)
    start = to_real(state).astype(A_bar.dtype)
    _, states = jax.lax.scan(one, start, None, length=count)
    y = jnp.einsum("hln,cbhn->bclh", rows, states)
    return y.reshape(y.shape[0], count * size, y.shape[-1])[:, :length]


@jax.default_matmul_precision("highest")
def final_state(
    system: DPLR,
    u: jax.Array,
    state: jax.Array | None = None,
    counts: jax.Array | None = None,
) -> jax.Array:
    """The state after u [B, L, H], in which padding is zero and stands first.

    state [B, H, n] entered before the counts [B] tokens that exist (L where None).
    """
    A_bar, B_bar = dense(system)
    length = u.shape[1]
    size = _chunk(length)
    columns, A_power = B_bar[..., None], A_bar  # [H, N, 1]: A_bar^(size-1-l) B_bar
    while columns.shape[-1] < size:
        columns = jnp.concatenate([A_power @ columns, columns], -1)
        A_power = A_power @ A_power
    u = jnp.pad(u, ((0, 0), (-length % size, 0), (0, 0)))
    u = u.reshape(u.shape[0], u.shape[1] // size, size, u.shape[2])
    driven = jnp.einsum("hnl,bclh->cbhn", columns, u)

    def one(x, driven):
        return jnp.einsum("hmn,bhn->bhm", A_power, x) + driven, None

    x, _ = jax.lax.scan(one, jnp.zeros_like(driven[0]), driven)
    if state is not None:
        counts = jnp.full(u.shape[0], length) if counts is None else counts
        start = to_real(state).astype(A_bar.dtype)
        x = x + _advanced(A_bar, start, counts, length)
    return from_real(x)


def _advanced(A_bar, x, counts, limit):
    """A_bar^counts[b] x[b] for counts <= limit: one matrix per binary digit."""
    for digit in range(limit.bit_length()):
        stepped = jnp.einsum("hmn,bhn->bhm", A_bar, x)
        x = jnp.where((counts >> digit & 1 == 1)[:, None, None], stepped, x)
        A_bar = A_bar @ A_bar
    return x
