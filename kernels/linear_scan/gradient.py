"""The scan on pairs and its gradient, from a backend's `forward` and `backward`."""

from functools import partial

import jax


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def solve(module, reverse, a, x, initial_state, keep):
    return module.forward(a, x, initial_state, keep, reverse)


def _rule_forward(module, reverse, a, x, initial_state, keep):
    h, final = module.forward(a, x, initial_state, keep, reverse)
    like_x = tuple(part[:0] for part in x)
    return (h, final), (a, h, initial_state, keep, like_x)


def _rule_backward(module, reverse, saved, gradients):
    return *module.backward(*saved, *gradients, reverse), None


solve.defvjp(_rule_forward, _rule_backward)
