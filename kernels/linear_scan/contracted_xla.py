"""The contracted scan in chunks: matmuls where the decay is constant, else a loop.

Constant decay: inside a chunk of T tokens the system is a T x T Toeplitz filter, its
state enters and leaves through [T, N] tables of powers, and only the states at the
chunk boundaries are scanned. Three real matmuls per chunk; JAX differentiates them.

With dt or resets the steps differ, and one loop makes, contracts and forgets each
state. Its backward pass keeps the states at chunk boundaries and makes a chunk's states
again.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels import pairs
from kernels.linear_scan import gradient, hold, xla

CHUNK = 64  # steps whose states exist at once in the backward loop


def unsupported(*arguments) -> str | None:
    return None


def contracted_scan(log_a, b, c, u, dt, initial_state, into):
    """y and the final state; log_a, b, c, initial_state are pairs of one width."""
    if dt is None and into is None:
        return _matmuls(log_a, b, c, u, initial_state)
    if dt is not None:
        # w = [dt phi(dt log_a)] / phi(log_a): the second factor is constant
        first = hold.phi(log_a)
        inverse = pairs.scale(pairs.conj(first), 1 / sum(p * p for p in first))
        b = pairs.mul(inverse, b)
    keep = None if into is None else (~into).astype(b[0].dtype)
    return _steps(log_a, b, c, u, dt, keep, initial_state)


def _matmuls(log_a, b, c, u, state):
    length = u.shape[1]
    size = _chunk(length, len(b) * b[0].shape[-1])
    whole = length // size * size
    outputs = []
    if whole:
        y, state = _matmul_chunks(log_a, b, c, u[:, :whole], state, size)
        outputs.append(y)
    if whole < length:
        y, state = _matmul_chunks(log_a, b, c, u[:, whole:], state, length - whole)
        outputs.append(y)
    return (outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, 1)), state


def _chunk(length, modes):
    """Work per token grows with the chunk, states with its inverse: near 2N."""
    return min(length, max(32, min(128, modes)))


def _matmul_chunks(log_a, b, c, u, state, size):
    batch, length, channels = u.shape
    chunks = length // size
    dtype = b[0].dtype
    table = pairs.powers(log_a, size + 1)  # [H, N, T + 1]
    parts = len(table)

    def column(p):
        return tuple(part[..., None] for part in p)

    into = pairs.mul(tuple(part[..., :size] for part in table), column(b))
    out = pairs.mul(tuple(part[..., 1:] for part in table), column(c))
    lags = _real_sum(into, c)  # [H, T]
    lag = jnp.arange(size)[None, :] - jnp.arange(size)[:, None]
    toeplitz = jnp.where(lag >= 0, lags[:, jnp.maximum(lag, 0)], 0)  # [H, from, to]

    inputs = (
        u.astype(dtype).reshape(batch, chunks, size, channels).transpose(3, 1, 0, 2)
    )
    driven = jnp.einsum("hcbt,hnt->hcbn", inputs, jnp.concatenate(into, 1)[..., ::-1])
    driven = tuple(jnp.split(driven, parts, -1))
    decay = tuple(part[:, None, None, :, size] for part in table)
    entering = tuple(part.swapaxes(0, 1) for part in state)
    after, last = gradient.solve(xla, False, decay, driven, entering, None)
    before = tuple(
        jnp.concatenate([first[:, None], rest[:, :-1]], 1)
        for first, rest in zip(entering, after, strict=True)
    )
    y = jnp.einsum(
        "hcbk,hkt->hcbt",
        jnp.concatenate([inputs, *before], -1),
        jnp.concatenate([toeplitz, *pairs.conj(out)], 1),
    )
    y = y.transpose(2, 1, 3, 0).reshape(batch, length, channels)
    return y.astype(u.dtype), tuple(part.swapaxes(0, 1) for part in last)


def _real_sum(table, c):
    """Re sum_n c[h, n] table[h, n, t]."""
    stacked = jnp.concatenate(pairs.conj(c), -1)
    return jnp.einsum("hn,hnt->ht", stacked, jnp.concatenate(table, 1))


@jax.custom_vjp
def _steps(log_a, b, c, u, dt, keep, state):
    y, state, _ = _forward(log_a, b, c, u, dt, keep, state)
    return y, state


def _steps_forward(log_a, b, c, u, dt, keep, state):
    y, last, boundaries = _forward(log_a, b, c, u, dt, keep, state)
    return (y, last), (log_a, b, c, u, dt, keep, boundaries)


def _forward(log_a, b, c, u, dt, keep, state):
    """y, the final state, and the states before each chunk [chunks, B, H, N]."""
    step = partial(_step, log_a, b)

    def one(state, inputs):
        state = step(state, inputs)
        return state, _contract(c, state)

    def chunk(state, inputs):
        last, y = jax.lax.scan(one, state, inputs)
        return last, (y, state)

    (main, rest), batch = _chunked(u, dt, keep), u.shape[0]
    state, (y, boundaries) = jax.lax.scan(chunk, state, main)
    y = y.reshape(-1, batch, u.shape[2])
    if rest is not None:
        last, (tail, state) = chunk(state, rest)
        y = jnp.concatenate([y, tail])
        boundaries = tuple(
            jnp.concatenate([old, new[None]])
            for old, new in zip(boundaries, state, strict=True)
        )
        state = last
    return y.swapaxes(0, 1).astype(u.dtype), state, boundaries


def _steps_backward(saved, gradients):
    log_a, b, c, u, dt, keep, boundaries = saved
    dy, g = gradients
    (main, rest), (dy_main, dy_rest) = _chunked(u, dt, keep), _chunked(dy, None, None)
    wide = boundaries[0].shape[1:]
    zero = tuple(jnp.zeros(wide, part.dtype) for part in b)
    carry = (g, zero, zero, zero)
    chunks = u.shape[1] // CHUNK
    du, ddt = [], []
    if rest is not None:
        entering = tuple(part[-1] for part in boundaries)
        carry, made = _chunk_backward(log_a, b, c, carry, (entering, rest, dy_rest))
        du.append(made[0])
        ddt.append(made[1])
    entering = tuple(part[:chunks] for part in boundaries)
    carry, made = jax.lax.scan(
        partial(_chunk_backward, log_a, b, c),
        carry,
        (entering, main, dy_main),
        reverse=True,
    )
    du.insert(0, _flat(made[0]))
    g, da, db, dc = carry
    da, db, dc = (tuple(part.sum(0) for part in total) for total in (da, db, dc))
    if dt is None:
        da = pairs.mul(pairs.conj(pairs.exp(log_a)), da)
    else:
        ddt.insert(0, _flat(made[1]))
        ddt = jnp.concatenate(ddt).T
    du = jnp.concatenate(du).swapaxes(0, 1).astype(u.dtype)
    return da, db, dc, du, (None if dt is None else ddt), None, g


_steps.defvjp(_steps_forward, _steps_backward)


def _chunk_backward(log_a, b, c, carry, inputs):
    """From the last step of a chunk to its first, over states made again."""
    entering, (u, dt, keep), dy = inputs[0], inputs[1], inputs[2][0]

    def again(state, step_inputs):
        return _step(log_a, b, state, step_inputs), state

    _, before = jax.lax.scan(again, entering, (u, dt, keep))

    def back(carry, step_inputs):
        g, da, db, dc = carry
        before, u, dt, keep, dy = step_inputs
        state = _step(log_a, b, before, (u, dt, keep))
        wide_u, wide_dy = u[..., None], dy.astype(g[0].dtype)[..., None]
        decay, weight = _decay_and_weight(log_a, dt)
        if keep is not None:
            before = pairs.scale(before, keep[:, None, None])
        g = pairs.add(g, pairs.scale(pairs.conj(c), wide_dy))
        dc = pairs.add(dc, pairs.scale(pairs.conj(state), wide_dy))
        held = g if weight is None else pairs.mul(pairs.conj(weight), g)
        db = pairs.add(db, pairs.scale(held, wide_u))
        du = _inner(b, held)
        d_decay = pairs.mul(pairs.conj(before), g)
        ddt = None
        if dt is None:
            da = pairs.add(da, d_decay)
        else:
            elapsed = dt[:, None, None]
            d_weight = pairs.scale(pairs.mul(pairs.conj(b), g), wide_u)
            dz = pairs.mul(pairs.conj(decay), d_decay)
            slope = hold.phi_derivative(pairs.scale(log_a, elapsed))
            bend = pairs.mul(pairs.conj(slope), d_weight)
            da = pairs.add(da, pairs.scale(dz, elapsed))
            da = pairs.add(da, pairs.scale(bend, elapsed * elapsed))
            ddt = _inner(log_a, dz).sum(-1) + _inner(decay, d_weight).sum(-1)
        g = pairs.mul(pairs.conj(decay), g)
        if keep is not None:
            g = pairs.scale(g, keep[:, None, None])
        return (g, da, db, dc), (du, ddt)

    return jax.lax.scan(back, carry, (before, u, dt, keep, dy), reverse=True)


def _step(log_a, b, state, inputs):
    u, dt, keep = inputs
    decay, weight = _decay_and_weight(log_a, dt)
    if keep is not None:
        state = pairs.scale(state, keep[:, None, None])
    driven = b if weight is None else pairs.mul(weight, b)
    state = pairs.mul(decay, state)
    return pairs.add(state, pairs.scale(driven, u.astype(b[0].dtype)[..., None]))


def _decay_and_weight(log_a, dt):
    """exp(dt log_a) and dt phi(dt log_a); the weight is None where it is 1."""
    if dt is None:
        return pairs.exp(log_a), None
    elapsed = dt[:, None, None]
    z = pairs.scale(log_a, elapsed)
    return pairs.exp(z), pairs.scale(hold.phi(z), elapsed)


def _contract(c, state):
    """Re sum_n c state."""
    return _inner(pairs.conj(c), state)


def _inner(p, q):
    """sum_n Re(conj(p) q)."""
    return sum(left * right for left, right in zip(p, q, strict=True)).sum(-1)


def _chunked(*arrays):
    """Time-major: whole chunks [L // T, T, B, ...] and what is left, or None."""
    length = arrays[0].shape[1]
    whole = length // CHUNK * CHUNK
    moved = tuple(None if x is None else jnp.swapaxes(x, 0, 1) for x in arrays)

    def fold(x):
        return x[:whole].reshape(whole // CHUNK, CHUNK, *x.shape[1:])

    main = jax.tree.map(fold, moved)
    rest = jax.tree.map(lambda x: x[whole:], moved) if whole < length else None
    return main, rest


def _flat(x):
    return x.reshape(-1, *x.shape[2:])
