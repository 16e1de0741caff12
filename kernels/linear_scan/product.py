"""Products of many decays, each number as a sum of two.

A rounding of an early factor is raised to a power with it, and those of products near 1
all have one sign: a plain product of 2^16 decays is off by 1e-4, a power by squaring by
1e-3. Here a number is (top, rest), top with half the digits, so that products of two
tops are exact: one and a half times the digits of its dtype, and 0 stays 0.

Only the rests have gradients, which are those of the numbers themselves.
"""

import jax
import jax.numpy as jnp

from kernels import pairs

Parts = tuple[tuple[jax.Array, jax.Array], ...]  # of re, or of re and im


def power(a, count):
    """a^count, by squaring."""
    result, square = None, _split(a)
    while count:
        if count % 2:
            result = square if result is None else _times(result, square)
        count //= 2
        square = _times(square, square) if count else square
    return _joined(result)


def over_time(a):
    """[B, L, *S] -> [B, *S], in two loops of about sqrt(L) steps."""
    batch, length, *state = a.shape
    size = 1 << ((length - 1).bit_length() + 1) // 2
    a = jnp.pad(
        a, [(0, 0), (0, -length % size)] + [(0, 0)] * len(state), constant_values=1
    )
    parts = _split(a.reshape(batch, -1, size, *state))
    return _joined(_along_rows(_along_rows(parts)))


def _along_rows(parts: Parts) -> Parts:
    first = jax.tree.map(lambda x: x[:, 0], parts)
    following = jax.tree.map(lambda x: jnp.moveaxis(x[:, 1:], 1, 0), parts)
    return jax.lax.scan(lambda p, q: (_times(p, q), None), first, following)[0]


def _split(a) -> Parts:
    return tuple(_parted(part, jnp.zeros_like(part)) for part in pairs.split(a))


def _joined(parts: Parts):
    return pairs.join(tuple(top + rest for top, rest in parts))


def _parted(total, rest):
    """total + rest as (top, rest)."""
    estimate = jax.lax.stop_gradient(total + rest)
    info = jnp.finfo(estimate.dtype)
    top = jax.lax.reduce_precision(estimate, info.nexp, (info.nmant - 1) // 2)
    return top, (total - top) + rest


def _times(p: Parts, q: Parts) -> Parts:
    if len(p) == 1:
        return (_sum((p[0], q[0])),)
    re, im = p
    minus = -im[0], -im[1]
    return _sum((re, q[0]), (minus, q[1])), _sum((re, q[1]), (im, q[0]))


def _sum(*products):
    """The sum of one or two products as (top, rest)."""
    high, rest = 0, 0
    for (top, small), (other, little) in products:
        exact = top * other
        total = high + exact
        addend = total - high
        rest = rest + (high - (total - addend)) + (exact - addend)
        rest = rest + (top * little + small * other + small * little)
        high = total
    return _parted(high, rest)
