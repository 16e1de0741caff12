"""Resets inside a chunk of matmuls, where 0 times what is not finite is NaN.

So what is not finite, or has no finite square, is taken out before, and what it would
reach is set to NaN after: in the outputs the tokens behind it in its segment, in the
gradients all tokens of its segment in that chunk.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from kernels import segments


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunk(inner: Callable, state, q, k, v, g, beta, into):
    """inner(state, q, k, v, g, beta, into), the state behind a chunk and its outputs.

    state [N, R, K, V]; q, k [N, 1, T, K], v [N, R, T, V], g [N, R, T] or [N, R, T, K],
    beta [N, R, T] or None, into [N, 1, T].
    """
    number = segments.ids(into[:, 0])[:, None]
    bad = unusable(k, v, g, beta)
    after = reached_by(number, bad, behind=True) | _first(number, state)
    arguments = (finite(x) for x in (state, q, k, v))
    final, o = inner(*arguments, decays(g), finite(beta), into)
    o = jnp.where((after | _bad(q, 3))[..., None], jnp.nan, o)
    return jnp.where(after[..., -1:, None], jnp.nan, final), o


def _forward(inner, *arguments):
    return chunk(inner, *arguments), arguments


def _backward(inner, saved, gradients):
    state, q, k, v, g, beta, into = saved
    d_final, d_o = gradients
    number = segments.ids(into[:, 0])[:, None]
    bad = unusable(k, v, g, beta) | _bad(q, 3) | _bad(d_o, 3)
    at_end = number == number[..., -1:]
    bad = bad | (at_end & _bad(d_final, (2, 3))[..., None])
    reached = reached_by(number, bad, behind=False) | _first(number, state)

    def run(state, q, k, v, g, beta):
        return inner(state, q, k, v, g, beta, into)

    arguments = (finite(x) for x in (state, q, k, v))
    _, pull = jax.vjp(run, *arguments, decays(g), finite(beta))
    d_state, *d_inputs = pull((finite(d_final), finite(d_o)))
    start = jnp.any(reached & (number == 0), -1)[..., None, None]
    d_inputs = [_marked(x, reached) for x in d_inputs]
    return jnp.where(start, jnp.nan, d_state), *d_inputs, None


chunk.defvjp(_forward, _backward)


def _usable(x):
    return jnp.abs(x) < jnp.sqrt(jnp.finfo(x.dtype).max)


def _bad(x, axes):
    return ~_usable(x).all(axes)


def unusable(k, v, g, beta):
    """[N, R, T], whether a token gives the state something that is not finite."""
    unknown = ~(g < jnp.inf)  # -inf is a decay
    bad = _bad(k, 3) | _bad(v, 3) | (unknown.any(3) if g.ndim == 4 else unknown)
    return bad if beta is None else bad | ~_usable(beta)


def reached_by(number, bad, behind):
    """Which tokens have a bad one in their segment, at all or at or before them."""
    linked = number[..., None] == number[..., None, :]
    if behind:
        linked = jnp.tril(linked)
    return jnp.any(linked & bad[..., None, :], -1)


def _first(number, state):
    """The tokens that a bad state reaches."""
    return _bad(state, (2, 3))[..., None] & (number == 0)


def finite(x):
    """x, or 0 where it or its square is not finite; None stays None."""
    return None if x is None else jnp.where(_usable(x), x, 0)


def decays(g):
    """g, or 0 where it is no decay: NaN and infinity; -inf is one."""
    return jnp.where(g < jnp.inf, g, 0)


def _marked(x, reached):
    """NaN where a token is reached; x may have one row for all heads of a group."""
    if x is None:
        return None
    if x.shape[1] < reached.shape[1]:
        reached = reached.any(1, keepdims=True)
    return jnp.where(reached if x.ndim == 3 else reached[..., None], jnp.nan, x)
