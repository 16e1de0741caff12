"""Two nested loops over time, chunks and their steps, with the gradient by hand.

A step touches one state [B, N, D]. Forward keeps the states between chunks and no
others; backward makes a chunk's states again from the one that entered it, then runs
the adjoint from the chunk's end to its start. exp(dt A) is computed in all three
passes: on a CPU that costs less than to store it and read it back. What a step makes
is written in place, which JAX would differentiate at a cost that grows as L^2.

D is the minor axis of the state, so that exp and the sums over N run along whole
vectors. Every contraction is a matrix product: XLA's own sum over N is ten times slower
where B is 1.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels import varying
from kernels.selective_scan import wide

# States in memory at once: L / CHUNK between chunks and CHUNK inside one. 16 to 64 are
# equally fast, and 32 is the least memory at L = 1024.
CHUNK = 32


def unsupported(*arguments) -> str | None:
    return None


@wide.in_state_dtype
def selective_scan(u, dt, A, B, C, state, into):
    """y [B, L, D] and the final state; see reference.selective_scan."""
    length = u.shape[1]
    count = -(-length // CHUNK)
    size = -(-length // count)
    # dt = 0 in the steps beyond the end: they leave the state as it is
    u, dt, B, C, into = jax.tree.map(
        lambda x: _lengthened(x, count * size - length), (u, dt, B, C, into)
    )
    keep = None if into is None else ~into
    y, final = _scan(size, u, dt, A.T, B, C, state.swapaxes(1, 2), keep)
    return y[:, :length], final.swapaxes(1, 2)


def _lengthened(x, steps):
    return jnp.pad(x, [(0, steps if axis == 1 else 0) for axis in range(x.ndim)])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(size, u, dt, A, B, C, state, keep):
    """L a multiple of size; A [N, D], state [B, N, D], keep [B, L] or None."""
    return _forward(size, u, dt, A, B, C, state, keep)[0]


def _forward(size, u, dt, A, B, C, state, keep):
    count = u.shape[1] // size

    def chunk(c, carry):
        h, y, entering = carry

        def step(i, carry):
            h, y = carry
            t = c * size + i
            h = _next(h, t, u, dt, A, B, keep)
            return h, _put(y, _over_modes(_row(C, t), h), t)

        entering = _put(entering, h, c, axis=0)
        return *jax.lax.fori_loop(0, size, step, (h, y)), entering

    entering = jnp.zeros((count, *state.shape), state.dtype)
    carry = (state, *varying.like((jnp.zeros_like(u), entering), state))
    final, y, entering = jax.lax.fori_loop(0, count, chunk, carry)
    # A policy of `jax.checkpoint` that keeps this name spares a second forward pass.
    y, final, entering = checkpoint_name((y, final, entering), "selective_scan")
    return (y, final), (u, dt, A, B, C, keep, entering)


# With a[t] = exp(dt[t] A) and g[t] the gradient of h[t], from the end to the start:
#     g[t] = C[t] dy[t] + a[t+1] g[t+1]
#     r[t] = a[t] h[t-1] g[t]                                the gradient of dt[t] A
#     du[t] = dt[t] sum_n B[t] g[t]          ddt[t] = sum_n (u[t] B[t] g[t] + A r[t])
#     dB[t] = sum_d dt[t] u[t] g[t]          dC[t] = sum_d dy[t] h[t]
#     dA = sum_t dt[t] r[t]                  dstate = a[0] g[0]
# Where a link is cut a[t] is 0.
def _backward(size, saved, gradients):
    u, dt, A, B, C, keep, entering = saved
    dy, dfinal = gradients
    count = len(entering)

    def chunk(k, carry):
        c = count - 1 - k
        g, dA, du, ddt, dB, dC, before = carry

        def again(i, carry):
            h, before, dC = carry
            t = c * size + i
            h = _next(h, t, u, dt, A, B, keep)
            dC = _put(dC, _over_channels(_row(dy, t), h), t)
            return h, _put(before, h, i + 1, axis=0), dC

        def back(k, carry):
            g, dA, du, ddt, dB = carry
            i = size - 1 - k
            t = c * size + i
            x, step = _row(u, t), _row(dt, t)
            g = g + _row(dy, t)[:, None] * _row(C, t)[..., None]
            through = _kept(keep, t, g * jnp.exp(step[:, None] * A))
            # the gradient of dt A
            rate = _kept(keep, t, through * _row(before, i, axis=0))
            input_gradient = _over_modes(_row(B, t), g)
            slope = _over_modes(jnp.ones(rate.shape[:2], rate.dtype), rate * A)
            du = _put(du, input_gradient * step, t)
            ddt = _put(ddt, input_gradient * x + slope, t)
            dB = _put(dB, _over_channels(step * x, g), t)
            return through, dA + rate * step[:, None], du, ddt, dB

        h = _row(entering, c, axis=0)
        start = (h, _put(before, h, 0, axis=0), dC)
        _, before, dC = jax.lax.fori_loop(0, size, again, start)
        carry = jax.lax.fori_loop(0, size, back, (g, dA, du, ddt, dB))
        return *carry, dC, before

    before = jnp.zeros((size + 1, *dfinal.shape), dfinal.dtype)
    before = varying.like(before, dfinal)
    zeros = map(jnp.zeros_like, (dfinal, u, dt, B, C))
    carry = jax.lax.fori_loop(0, count, chunk, (dfinal, *zeros, before))
    dstate, dA, du, ddt, dB, dC, _ = carry
    return du, ddt, dA.sum(0), dB, dC, dstate, None


_scan.defvjp(_forward, _backward)


def _next(h, t, u, dt, A, B, keep):
    """The state after step t."""
    step = _row(dt, t)
    increment = (step * _row(u, t))[:, None] * _row(B, t)[..., None]
    return _kept(keep, t, jnp.exp(step[:, None] * A) * h) + increment


def _kept(keep, t, value):
    """What passes the link into step t: chosen, because 0 times NaN is NaN."""
    if keep is None:
        return value
    return jnp.where(_row(keep, t)[:, None, None], value, 0)


def _over_modes(weight, states):
    return jnp.einsum("bn,bnd->bd", weight, states, precision="highest")


def _over_channels(weight, states):
    return jnp.einsum("bd,bnd->bn", weight, states, precision="highest")


def _row(x, t, axis=1):
    return jax.lax.dynamic_index_in_dim(x, t, axis, keepdims=False)


def _put(array, row, t, axis=1):
    return jax.lax.dynamic_update_index_in_dim(array, row, t, axis)
