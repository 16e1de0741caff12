"""The definitions, one step after another. Differentiated by JAX, not by hand."""

import jax
import jax.numpy as jnp


def unsupported(*arguments) -> str | None:
    return None


def linear_scan(a, x, initial_state, into, reverse):
    """h[t] = a[t] h[t-1] + x[t]; `into` [B, L] or None cuts the carry into step t.

    a [B|1, L|1, *S|1], x [B, L, *S], initial_state [B, *S] in the state's dtype.
    """
    state = initial_state.dtype
    a = jnp.broadcast_to(a, x.shape).astype(
        jnp.promote_types(a.dtype, state.type(0).real.dtype)
    )
    if into is not None:
        into = into.T.reshape(*into.T.shape, *[1] * (x.ndim - 2))

    def step(h, inputs):
        decay, value, cut = inputs
        if cut is not None:
            decay, h = jnp.where(cut, 0, decay), jnp.where(cut, 0, h)
        h = (decay * h + value).astype(state)
        return h, h

    steps = (jnp.moveaxis(a, 1, 0), jnp.moveaxis(x, 1, 0), into)
    final, h = jax.lax.scan(step, initial_state, steps, reverse=reverse)
    complex_x = jnp.issubdtype(state, jnp.complexfloating)
    return jnp.moveaxis(h, 0, 1).astype(state if complex_x else x.dtype), final


def hold(log_a, dt):
    """w = expm1(dt log_a) / expm1(log_a): the weight of an input that lasts dt steps.

    Around log_a = 0 the first terms of the series, which also carry the derivative.
    """
    small = jnp.abs(log_a) < 1e-5
    safe = jnp.where(small, 1.0, log_a)
    series = dt * (1 + (dt - 1) / 2 * log_a * (1 + (2 * dt - 1) / 6 * log_a))
    return jnp.where(small, series, jnp.expm1(dt * safe) / jnp.expm1(safe))


def contracted_scan(log_a, b, c, u, dt, initial_state, into):
    """h[t] = exp(dt[t] log_a) h[t-1] + w(dt[t]) b u[t];  y[t] = Re sum_n c h[t].

    log_a, b, c [H, N]; u [B, L, H]; dt, into [B, L] or None; initial_state [B, H, N].
    """
    into = jnp.zeros(u.shape[:2], bool) if into is None else into

    def step(h, inputs):
        u, cut, dt = inputs
        h = jnp.where(cut[:, None, None], 0, h)
        if dt is None:
            h = jnp.exp(log_a) * h + b * u[..., None]
        else:
            dt = dt[:, None, None]
            h = jnp.exp(dt * log_a) * h + hold(log_a, dt) * b * u[..., None]
        h = h.astype(initial_state.dtype)
        return h, jnp.sum(c * h, -1).real

    steps = (u.swapaxes(0, 1), into.T, None if dt is None else dt.T)
    final, y = jax.lax.scan(step, initial_state, steps)
    return y.swapaxes(0, 1).astype(u.dtype), final
