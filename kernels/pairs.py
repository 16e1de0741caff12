"""Complex numbers as tuples of real arrays: (re,) where real, (re, im) where complex.

For matmuls, which are fast on reals only, and for backends that have no complex type
(Triton, Pallas). A gradient on pairs is the plain one: it has no convention about
conjugation.
"""

import jax
import jax.numpy as jnp
import numpy as np

Pair = tuple[jax.Array, ...]


def split(x: jax.Array) -> Pair:
    """(re, im) of a complex array, (re,) of a real one."""
    return (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)


def join(pair: Pair) -> jax.Array:
    """The array of a pair: undoes `split`."""
    return jax.lax.complex(*pair) if len(pair) == 2 else pair[0]


def mul(p: Pair, q: Pair) -> Pair:
    """p q; one of them may be real."""
    if len(p) == 1:
        return tuple(p[0] * part for part in q)
    if len(q) == 1:
        return tuple(part * q[0] for part in p)
    return p[0] * q[0] - p[1] * q[1], p[0] * q[1] + p[1] * q[0]


def conj(p: Pair) -> Pair:
    """The complex conjugate."""
    return p if len(p) == 1 else (p[0], -p[1])


def add(p: Pair, q: Pair) -> Pair:
    """p + q, where p is at least as wide as q."""
    return tuple(part + q[i] if i < len(q) else part for i, part in enumerate(p))


def scale(p: Pair, factor) -> Pair:
    """A real factor times p."""
    return tuple(part * factor for part in p)


def exp(p: Pair) -> Pair:
    """exp(p)."""
    size = jnp.exp(p[0])
    return (size,) if len(p) == 1 else (size * jnp.cos(p[1]), size * jnp.sin(p[1]))


def powers(log_z: Pair, count: int) -> Pair:
    """exp(l log_z) for l < count along a new last axis.

    The product of exp(2^k log_z) over the binary digits k of l. Scaling by a power of
    two is exact, so no phase l * Im(log_z) is ever rounded and the error grows with
    log2(l) instead of l.
    """
    return _table(log_z, jnp.arange(count, dtype=log_z[0].dtype))


@jax.custom_jvp
def _table(log_z: Pair, index: jax.Array) -> Pair:
    """exp(index log_z); index = 0, 1, 2, ... carries the length and its own dtype."""
    count = index.shape[0]
    digits = max(1, (count - 1).bit_length())
    doubling = (2.0 ** np.arange(digits)).astype(index.dtype)
    # A loop, because the compiler does not fuse across it: inside a larger loop (a scan
    # over layers) it would compute every sine anew for every power, at six times the
    # cost.
    factors = jax.lax.map(lambda step: exp(scale(log_z, step)), jnp.asarray(doubling))
    one = (1.0, 0.0)[: len(factors)]
    table = tuple(
        jnp.full((*part.shape, count), value, part.dtype)
        for part, value in zip(log_z, one, strict=True)
    )
    for digit in range(digits):
        present = (np.arange(count) >> digit & 1).astype(bool)
        factor = tuple(
            jnp.where(present, part[digit, ..., None], value)
            for part, value in zip(factors, one, strict=True)
        )
        table = mul(table, factor)
    return table


@_table.defjvp
def _table_jvp(primals, tangents):
    log_z, index = primals
    table = _table(log_z, index)
    moved = tuple(part[..., None] * index for part in tangents[0])
    return table, mul(table, moved)


def power(log_z: Pair, count: int) -> Pair:
    """exp(count log_z), one exact factor per binary digit of count as in `powers`."""
    result = tuple(jnp.full_like(part, float(i == 0)) for i, part in enumerate(log_z))
    for digit in range(count.bit_length()):
        if count >> digit & 1:
            result = mul(result, exp(scale(log_z, float(2**digit))))
    return result
