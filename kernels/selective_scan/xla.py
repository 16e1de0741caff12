"""Chunks of time; only the states between them are kept for the backward pass.

Forward, one loop over time holds a single state [B, D, N]. Backward, the states of one
chunk are made again, and a loop over them in reverse makes all gradients together.
"""

import jax
import jax.numpy as jnp

CHUNK = 32  # steps whose states exist at once in the backward pass


def unsupported(*arguments) -> str | None:
    return None


def forward(u, dt, A, B, C, state, keep):
    """y [B, L, D], the final state, and the states [chunks, B, D, N] before each chunk;
    keep [B, L] is 0 where the carry into a step is cut, or None."""
    length = u.shape[1]
    size = min(CHUNK, length)
    u, dt, B, C, keep = _whole(size, u, dt, B, C, keep)
    count = u.shape[1] // size
    y = jnp.zeros(u.shape, u.dtype)
    states = jnp.zeros((count, *state.shape), state.dtype)

    def step(t, carry):
        h, y = carry
        token = _token(t, u, dt, B, C, keep)
        h = _advance(A, h, token)
        return h, _put(y, jnp.sum(h * token["C"][:, None], -1), t)

    def chunk(i, carry):
        h, y, states = carry
        states = states.at[i].set(h)
        h, y = jax.lax.fori_loop(i * size, (i + 1) * size, step, (h, y))
        return h, y, states

    final, y, states = jax.lax.fori_loop(0, count, chunk, (state, y, states))
    return y[:, :length], final, states


def backward(u, dt, A, B, C, keep, states, dy, dfinal):
    """Gradients of u, dt, A, B, C and the initial state."""
    length = u.shape[1]
    size = min(CHUNK, length)
    u, dt, B, C, keep = _whole(size, u, dt, B, C, keep)
    dy = _padded(dy, size)
    history = jnp.zeros((size, *states.shape[1:]), states.dtype)

    def again(i, first, h, history):
        """The states before each step of a chunk, and the one after it."""
        token = _token(first + i, u, dt, B, C, keep)
        return _advance(A, h, token), history.at[i].set(h)

    def chunk(j, carry):
        k = len(states) - 1 - j
        first = k * size
        last, before = jax.lax.fori_loop(
            0, size, lambda i, c: again(i, first, *c), (states[k], carry[-1])
        )

        def step(i, carry):
            h, g, du, ddt, dA, dB, dC = carry
            i = size - 1 - i
            t = first + i
            token = _token(t, u, dt, B, C, keep)
            d = _row(dy, t)
            g = g + d[..., None] * token["C"][:, None]
            dC = _put(dC, jnp.sum(h * d[..., None], 1), t)
            h = before[i]
            decay = _decay(A, token)
            through = g * decay * h
            gB = jnp.sum(g * token["B"][:, None], -1)
            du = _put(du, token["dt"] * gB, t)
            ddt = _put(ddt, token["u"] * gB + jnp.sum(through * A, -1), t)
            dA = dA + through * token["dt"][..., None]
            given = (token["dt"] * token["u"])[..., None]
            dB = _put(dB, jnp.sum(g * given, 1), t)
            return h, g * decay, du, ddt, dA, dB, dC

        _, *rest = jax.lax.fori_loop(0, size, step, (last, *carry[:-1]))
        return *rest, before

    start = (dfinal, *map(jnp.zeros_like, (u, dt, states[0], B, C)), history)
    g, du, ddt, dA, dB, dC, _ = jax.lax.fori_loop(0, len(states), chunk, start)
    du, ddt, dB, dC = (x[:, :length] for x in (du, ddt, dB, dC))
    return du, ddt, dA.sum(0), dB, dC, g


def _whole(size, u, dt, B, C, keep):
    """Whole chunks: steps with dt = 0 leave the state as it is."""
    kept = None
    if keep is not None:
        kept = jnp.pad(keep, ((0, 0), (0, -keep.shape[1] % size)), constant_values=1)
    return *(_padded(x, size) for x in (u, dt, B, C)), kept


def _padded(x, size):
    extra = -x.shape[1] % size
    return jnp.pad(x, ((0, 0), (0, extra), (0, 0))) if extra else x


def _row(x, t):
    return jax.lax.dynamic_index_in_dim(x, t, 1, keepdims=False)


def _put(x, row, t):
    return jax.lax.dynamic_update_index_in_dim(x, row, t, 1)


def _token(t, u, dt, B, C, keep):
    token = {"u": _row(u, t), "dt": _row(dt, t), "B": _row(B, t), "C": _row(C, t)}
    return token if keep is None else token | {"keep": _row(keep, t)}


def _decay(A, token):
    decay = jnp.exp(token["dt"][..., None] * A)
    return decay * token["keep"][:, None, None] if "keep" in token else decay


def _advance(A, h, token):
    given = (token["dt"] * token["u"])[..., None] * token["B"][:, None]
    return _decay(A, token) * h + given
