"""Sums of powers over modes (a filter) or over time (a state), without [N, L]."""

from functools import partial

import jax
from jax.sharding import PartitionSpec

from kernels import checks, dispatch, nodes, pairs, rows, shards, varying
from kernels.vandermonde import reference, xla

BACKENDS = {
    "triton": dispatch.triton("kernels.vandermonde.triton"),
    "xla": xla,
    "reference": reference,
}


def vandermonde(
    c: jax.Array, log_z: jax.Array, length: int, *, backend: str | None = None
) -> jax.Array:
    """K[l] = Re sum_n c[n] exp(l log_z[n]) for l < length.

    Args:
        c: [*E, *H, N] coefficients, real or complex.
        log_z: [*H, N] logarithms of the nodes, real or complex; c may have axes *E
            before them: several filters over the same nodes.
        length: the number of taps, >= 1.
        backend: a key of BACKENDS, or None for the first that supports these arguments.

    Returns:
        K: [*E, *H, length] real, float32 or wider.

    Reverse-mode differentiable in c and log_z. The phases l Im(log_z) stay accurate at
    any length.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the backend cannot run.
    """
    op = "vandermonde"
    checks.arrays(op, c=c, log_z=log_z)
    length = checks.positive(op, "length", length)
    checks.floating(op, c=c, log_z=log_z)
    nodes.check(op, "c", c, "[*E, *H, N]", "log_z", log_z)
    nodes.check_count(op, "c", c, "log_z", log_z)
    if shards.active():
        call = partial(vandermonde, length=length, backend=backend)
        of_c, of_z = (nodes.spec(x, log_z) for x in (c, log_z))
        return shards.run(call, (c, log_z), (of_c, of_z), of_c)
    module = dispatch.pick(op, BACKENDS, backend, c, log_z)
    c, log_z = varying.together(*nodes.promote(c, log_z))
    if module is reference:
        return reference.vandermonde(c, log_z, length)
    flat_c, flat_z = nodes.flat(c, log_z), nodes.flat_nodes(log_z)
    taps = _vandermonde(module, length, pairs.split(flat_c), pairs.split(flat_z))
    return taps.reshape(*c.shape[:-1], length)


def vandermonde_transpose(
    u: jax.Array, log_z: jax.Array, *, backend: str | None = None
) -> jax.Array:
    """s[n] = sum_l u[l] exp(l log_z[n]): the moments of u, the final state of a filter.

    Args:
        u: [*B, *H, L] real.
        log_z: [*H, N] logarithms of the nodes, real or complex.
        backend: a key of BACKENDS, or None for the first that supports these arguments.

    Returns:
        s: [*B, *H, N], float32 or wider, complex if log_z is. Real u: its linear
            transpose, K -> c, of `vandermonde` is conj(s).

    Reverse-mode differentiable in u and log_z.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the backend cannot run.
    """
    op = "vandermonde_transpose"
    checks.arrays(op, log_z=log_z)
    checks.rows(op, u=u)
    checks.floating(op, log_z=log_z)
    checks.floating(op, real=True, u=u)
    nodes.check(op, "u", u, "[*B, *H, L]", "log_z", log_z)
    call = partial(vandermonde_transpose, backend=backend)
    if not u.shape[0]:
        return rows.none(call, u, log_z)
    if shards.active():
        of_u, of_z = (nodes.spec(x, log_z) for x in (u, log_z))
        if u.ndim > log_z.ndim:
            of_u = PartitionSpec(shards.ROWS, *[*of_u][1:])
        return shards.run(call, (u, log_z), (of_u, of_z), of_u)
    module = dispatch.pick(op, BACKENDS, backend, u, log_z)
    _, log_z = nodes.promote(u, log_z)
    if u.dtype.itemsize >= 4 or module is reference:  # others are widened when read
        u = u.astype(log_z.real.dtype)
    u, log_z = varying.together(u, log_z)
    if module is reference:
        return reference.moments(u, log_z)
    flat_u, flat_z = nodes.flat(u, log_z), nodes.flat_nodes(log_z)
    sums = pairs.join(_moments(module, flat_u, pairs.split(flat_z)))
    return sums.reshape(*u.shape[:-1], log_z.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _vandermonde(module, length, c, log_z):
    """c [E, G, N], log_z [G, N], pairs of one width -> [E, G, length]."""
    return module.vandermonde(c, log_z, length)


def _vandermonde_forward(module, length, c, log_z):
    return module.vandermonde(c, log_z, length), (c, log_z)


# Of k[l] = Re sum_n c z^l, gradients as pairs (by re, by im):
#     dc = conj(sum_l dk[l] z^l)             dlog_z = sum_e conj(c sum_l l dk[l] z^l)
def _vandermonde_backward(module, length, saved, dk):
    c, log_z = saved
    plain, weighted = module.moments(dk, log_z, (0, 1))
    turned = pairs.mul(c, weighted)
    dz = tuple(part.sum(0) for part in pairs.conj(turned))
    return pairs.conj(plain), dz


_vandermonde.defvjp(_vandermonde_forward, _vandermonde_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _moments(module, u, log_z):
    """u [E, G, L] real, log_z [G, N] a pair -> [E, G, N] a pair like log_z."""
    return module.moments(u, log_z, (0,))[0]


def _moments_forward(module, u, log_z):
    return module.moments(u, log_z, (0,))[0], (u, log_z)


# Of s = sum_l u[l] z^l:
#     du[l] = Re sum_n conj(ds) z^l          dlog_z = sum_e ds conj(sum_l l u[l] z^l)
def _moments_backward(module, saved, ds):
    u, log_z = saved
    du = module.vandermonde(pairs.conj(ds), log_z, u.shape[-1]).astype(u.dtype)
    (weighted,) = module.moments(u, log_z, (1,))
    dz = pairs.mul(pairs.conj(weighted), ds)
    return du, tuple(part.sum(0) for part in dz)


_moments.defvjp(_moments_forward, _moments_backward)
