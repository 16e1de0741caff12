"""Diagonal linear recurrences: every state, or only their contraction."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels import checks, dispatch, pairs, segments
from kernels.linear_scan import reference, xla

BACKENDS = {"xla": xla, "reference": reference}


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
    """Solves h[t] = a[t] * h[t-1] + x[t], elementwise.

    Args:
        a: the decay, real or complex: [B, L, *S] where any axis may be 1, or [*S] for one
            decay at all times. An axis of size 1 is never expanded, its gradient is summed.
        x: [B, L, *S] input, real or complex.
        initial_state: [B, *S] state before the first step; zeros if None.
        reset: [B, L] bool; True cuts the link between t-1 and t.
        reverse: solves h[t] = a[t] * h[t+1] + x[t]; the initial state enters at L-1.
        return_transition: also return the product of all decays.
        backend: a key of BACKENDS, or None for the first that supports these arguments.

    Returns:
        h: [B, L, *S] in x's dtype (its complex counterpart if a is complex).
        final_state: [B, *S], the initial_state of the next call, float32 or wider. It is
            h[:, -1]; with reverse h[:, 0], or zero where reset[:, 0] cuts the way out.
        transition: [B, *S], d final_state / d initial_state: 0 where a reset lies inside.

    Differentiable in a, x and initial_state, through all results; the backward pass is the
    scan in the other direction.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the backend cannot run.
    """
    op = "linear_scan"
    _check(op, a, x, initial_state, reset)
    module = dispatch.pick(op, BACKENDS, backend, a, x)
    if a.ndim == x.ndim - 2:
        a = a[None, None]
    into, out = (None, None) if reset is None else segments.links(reset, reverse)
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], *x.shape[2:]), _state_dtype(a, x))
    initial_state = initial_state.astype(_state_dtype(a, x))
    if module is reference:
        h, final = reference.linear_scan(a, x, initial_state, into, reverse)
    else:
        h, final = solve(module, a, x, initial_state, into, reverse)
    if out is not None:
        final = jnp.where(_per_row(out, final), 0, final)
    if not return_transition:
        return h, final
    transition = _transition(a, x.shape, reset).astype(final.dtype)
    return h, final, transition


def solve(module, a, x, initial_state, into, reverse):
    """The checked call, on pairs: a [B|1, L|1, *S|1], initial_state in the state's dtype."""
    keep = None if into is None else (~into).astype(initial_state.real.dtype)
    h, final = _solve(
        module,
        reverse,
        pairs.split(a),
        pairs.split(x),
        pairs.split(initial_state),
        keep,
    )
    return pairs.join(h), pairs.join(final)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _solve(module, reverse, a, x, initial_state, keep):
    return module.forward(a, x, initial_state, keep, reverse)


def _solve_forward(module, reverse, a, x, initial_state, keep):
    h, final = module.forward(a, x, initial_state, keep, reverse)
    return (h, final), (a, h, initial_state, keep, x[0][:0])


def _solve_backward(module, reverse, saved, gradients):
    a, h, initial_state, keep, like_x = saved
    da, dx, dstate = module.backward(a, h, initial_state, keep, *gradients, reverse)
    return da, pairs.cast(dx, like_x.dtype), dstate, None


_solve.defvjp(_solve_forward, _solve_backward)
