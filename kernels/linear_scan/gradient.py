"""The scan with its gradient, from a backend's `forward` and `backward`.

A backend with PAIRS takes and gives (re, im) tuples, or (re,), for a, x, h and the
state and their gradients; one without takes arrays as they are.
"""

from functools import partial

import jax

from kernels import pairs


def solve(module, reverse, a, x, initial_state, keep):
    """a [B|1, L|1, *S|1], x [B, L, *S], initial_state [B, *S] in the state's dtype,
    keep [B, L] (False cuts the carry into step t) or None."""
    if not module.PAIRS:
        return _solve(module, reverse, a, x, initial_state, keep)
    split = (pairs.split(array) for array in (a, x, initial_state))
    h, final = _solve(module, reverse, *split, keep)
    return pairs.join(h), pairs.join(final)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _solve(module, reverse, a, x, initial_state, keep):
    return module.forward(a, x, initial_state, keep, reverse)


def _solve_forward(module, reverse, a, x, initial_state, keep):
    h, final = module.forward(a, x, initial_state, keep, reverse)
    like_x = jax.tree.map(lambda part: part[:0], x)
    return (h, final), (a, h, initial_state, keep, like_x)


def _solve_backward(module, reverse, saved, gradients):
    return *module.backward(*saved, *gradients, reverse), None


_solve.defvjp(_solve_forward, _solve_backward)
