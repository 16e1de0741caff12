"""The scan as one loop over time that updates its output in place.

No stacked residuals: forwards nothing exists but the inputs and h, and the backward
loop makes the gradients of x and a together from h. (Differentiating through the
in-place updates instead would cost O(L^2).) Several steps per iteration are slower: XLA
computes the chain again for each of its outputs.

The loop runs in the state's dtype: on a CPU a bfloat16 buffer in a loop is converted
whole at every step. Complex arrays stay complex: here that is two to three times faster
than loops over (re, im).
"""

import jax
import jax.numpy as jnp

from kernels import varying

PAIRS = False


def unsupported(*arguments) -> str | None:
    return None


def forward(a, x, initial_state, keep, reverse):
    """h and the final state; a [B|1, L|1, *S|1], x [B, L, *S], keep [B, L] or None.

    Where keep is False nothing is multiplied by it: what is cut may be NaN.
    """
    length, dtype = x.shape[1], initial_state.dtype
    a, wide = _wide(a, dtype), _wide(x, dtype)

    def step(i, carry):
        h, out = carry
        t = length - 1 - i if reverse else i
        h = (_kept(keep, t, _row(a, t) * h) + _row(wide, t)).astype(dtype)
        return h, _write(out, h, t)

    carry = (initial_state, varying.like(jnp.zeros(x.shape, dtype), x))
    final, out = jax.lax.fori_loop(0, length, step, carry)
    return out if jnp.iscomplexobj(out) else out.astype(x.dtype), final


def backward(a, h, initial_state, keep, like_x, h_gradient, final_gradient, reverse):
    """Gradients of a, x, initial state, with g the gradient of h:

        g[t] = h_gradient[t] + a[t+1] g[t+1],    final_gradient for a[L] g[L]
        dx[t] = g[t],    da[t] = g[t] h[t-1],    dstate = a[0] g[0].

    As everywhere in JAX the gradient of a complex array is not conjugated.
    """
    length, dtype, a_dtype = h.shape[1], initial_state.dtype, a.dtype
    a, h, h_gradient = (_wide(array, dtype) for array in (a, h, h_gradient))
    at_each = a.shape[1] > 1

    def step(i, carry, before=None):
        g, da, dx = carry
        t = i if reverse else length - 1 - i
        if before is None:
            before = _row(h, t + 1 if reverse else t - 1)
        g = g + _row(h_gradient, t)
        through = _kept(keep, t, before * g)
        da = _write(da, through, t) if at_each else da + _like(through, da)
        g_before = _kept(keep, t, _row(a, t) * g).astype(dtype)
        return g_before, da, _write(dx, g, t)

    da_shape = a.shape if at_each else initial_state.shape
    dx_dtype = _wide(like_x, dtype).dtype
    zeros = jnp.zeros(da_shape, a.dtype), jnp.zeros(h.shape, dx_dtype)
    carry = final_gradient, *varying.like(zeros, h)
    if length > 1:
        carry = jax.lax.fori_loop(0, length - 1, step, carry)
    dstate, da, dx = step(length - 1, carry, before=initial_state)
    if not at_each:
        da = _reduce(da, a[:, 0].shape)[:, None]
    return da.astype(a_dtype), dx.astype(like_x.dtype), dstate


def _wide(array, state_dtype):
    """The precision of the state, real where the array is."""
    if jnp.iscomplexobj(array):
        return array.astype(state_dtype)
    return array.astype(jnp.finfo(state_dtype).dtype)


def _row(array, t):
    """Row t, or the only one of an array that is the same at all times."""
    return jax.lax.dynamic_index_in_dim(
        array, t if array.shape[1] > 1 else 0, 1, keepdims=False
    )


def _kept(keep, t, value):
    """What passes the link into step t."""
    if keep is None:
        return value
    return jnp.where(_row(keep, t).reshape(-1, *[1] * (value.ndim - 1)), value, 0)


def _write(array, row, t):
    """Puts a step's row in place, summed over axes along which the array is 1."""
    row = _reduce(_like(row, array), array[:, 0].shape)
    return jax.lax.dynamic_update_index_in_dim(array, row, t, 1)


def _like(array, target):
    return array if jnp.iscomplexobj(target) else array.real


def _reduce(array, shape):
    """Sums over the axes along which `shape` was broadcast."""
    axes = [i for i, size in enumerate(shape) if size == 1 and array.shape[i] != 1]
    return array.sum(axes, keepdims=True) if axes else array
