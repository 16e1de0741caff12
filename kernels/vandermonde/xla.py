"""Blocks of time: l = i T + j turns [N] x [N, L] into one [L/T, 2N] x [2N, T] real
matmul.

z^(iT) and z^j are two tables of about sqrt(L) powers per node, exact in phase (see
pairs.powers). Gradients are the moments of the cotangent, two matmuls of the same kind.
All are of full precision: accelerators by default round the factors, phases and all.
"""

import jax
import jax.numpy as jnp

from kernels import pairs


def unsupported(*arguments) -> str | None:
    return None


@jax.default_matmul_precision("highest")
def vandermonde(c, log_z, length):
    """c [E, G, N], log_z [G, N], pairs -> [E, G, length]."""
    size = _block(length)
    count = -(-length // size)
    inner = pairs.powers(log_z, size)
    outer = _strided(log_z, count, size)
    left = pairs.mul(tuple(part[..., None] for part in c), outer)  # [E, G, N, I]
    taps = jnp.einsum(
        "egni,gnj->egij",
        jnp.concatenate(pairs.conj(left), -2),
        jnp.concatenate(inner, -2),
    )
    return taps.reshape(*taps.shape[:2], -1)[..., :length]


@jax.default_matmul_precision("highest")
def moments(u, log_z, orders):
    """sum_l l^k u[l] z^l for k in orders (0 or 1). u [E, G, L] -> pairs [E, G, N]."""
    length = u.shape[-1]
    size = _block(length)
    count = -(-length // size)
    u = u.astype(log_z[0].dtype)
    u = jnp.pad(u, ((0, 0), (0, 0), (0, count * size - length)))
    u = u.reshape(*u.shape[:2], count, size)
    inner = pairs.powers(log_z, size)
    outer = _strided(log_z, count, size)
    parts = len(inner)
    block = jnp.arange(count, dtype=u.dtype) * size

    def over_blocks(sums):
        return tuple(part.sum(-1) for part in pairs.mul(outer, sums))

    def within(table):
        sums = jnp.einsum("egij,gnj->egni", u, jnp.concatenate(table, -2))
        return tuple(jnp.split(sums, parts, -2))

    plain = within(inner)
    results = {0: plain}
    if 1 in orders:
        steps = jnp.arange(size, dtype=u.dtype)
        weighted = within(pairs.scale(inner, steps))
        results[1] = pairs.add(pairs.scale(plain, block), weighted)
    return tuple(over_blocks(results[order]) for order in orders)


def _block(length):
    """A power of two near sqrt(L)."""
    return 1 << ((length - 1).bit_length() + 1) // 2


def _strided(log_z, count, size):
    """z^(i size), i < count; size is a power of two, so scaling by it is exact."""
    return pairs.powers(pairs.scale(log_z, float(size)), count)
