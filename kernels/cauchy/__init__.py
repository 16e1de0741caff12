"""Cauchy sums of conjugate pairs on the grid of a bilinear filter, without [N, L]."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels import checks, dispatch, nodes, pairs, shards, varying
from kernels.cauchy import reference, xla
from kernels.cauchy.low_rank import filter_of_sums, small_solve

__all__ = ["cauchy", "dplr_filter", "small_solve"]

BACKENDS = {
    "triton": dispatch.triton("kernels.cauchy.triton"),
    "xla": xla,
    "reference": reference,
}


def cauchy(
    v: jax.Array, z: jax.Array, length: int, *, backend: str | None = None
) -> jax.Array:
    """k[m] = sum_n v[n] / (w_m - s_m z[n]) + conj(v[n]) / (w_m - s_m conj(z[n])).

    With theta = 2 pi m / length, w = 4i sin(theta / 2) and s = 2 cos(theta / 2): the
    points w / s = 2 (1 - e^{-i theta}) / (1 + e^{-i theta}) at which the generating
    function of a bilinear system is evaluated, multiplied through by s, so that nothing
    is infinite at theta = pi.

    Args:
        v: [*E, *H, n] complex numerators, one of each conjugate pair.
        z: [*H, n] complex nodes, not 0 (in float32, |z| > 1e-9); v may have axes *E
            before them: several sums over the same nodes, which share reciprocals.
        length: L >= 1; the grid is that of `rfft`, m = 0, ..., L // 2.

    Returns:
        k: [*E, *H, L // 2 + 1] complex.

    Reverse-mode differentiable in v and z. Memory O(n + L) per head, also of the
    gradient.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the backend cannot run.
    """
    op = "cauchy"
    length = _check(op, length, v=v, z=z)
    nodes.check(op, "v", v, "[*E, *H, n]", "z", z)
    nodes.check_count(op, "v", v, "z", z)
    if shards.active():
        call = partial(cauchy, length=length, backend=backend)
        of_v, of_z = (nodes.spec(x, z) for x in (v, z))
        return shards.run(call, (v, z), (of_v, of_z), of_v)
    module = dispatch.pick(op, BACKENDS, backend, v, z)
    v, z = varying.together(*nodes.promote(v, z))
    if module is reference:
        return reference.cauchy(v, z, length)
    flat_v, flat_z = nodes.flat(v, z), nodes.flat_nodes(z)
    sums = module.cauchy(pairs.split(flat_v), pairs.split(flat_z), length)
    return pairs.join(sums).reshape(*v.shape[:-1], length // 2 + 1)


def dplr_filter(
    c: jax.Array,
    b: jax.Array,
    p: jax.Array,
    z: jax.Array,
    length: int,
    *,
    backend: str | None = None,
) -> jax.Array:
    """K[l] = 2 Re(C a^l b'), l < length, a and b' the bilinear form of z - p p*.

    By the truncated generating function at the roots of unity e^{-i theta} and the
    Woodbury identity, multiplied through by s = 2 cos(theta / 2):

        K^ = 2 e^{i theta / 2} [g(c, b) - s g(c, p) (I + s g(p*, p))^-1 g(p*, b)],

    where g(u, v) is `cauchy` of u v.

    Args:
        c: [E, *H, n] complex, C (I - a^length) of E outputs.
        b: [*H, n] complex, the input weights times the step dt.
        p: [R, *H, n] complex, the low-rank factors times sqrt(dt); R >= 0, small.
        z: [*H, n] complex, the diagonal part times dt.
        length: L >= 1.
        backend: a name, as `cauchy` takes it, or None for the default.

    Returns:
        K: [E, *H, L] real.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the backend cannot run.

    Source: https://arxiv.org/abs/2111.00396, section 3 and appendix C.
    """
    op = "dplr_filter"
    checks.arrays(op, allow_empty=True, p=p)
    length = _check(op, length, c=c, b=b, z=z)
    checks.complex(op, p=p)
    checks.shape(op, "b", b, z.shape, "[*H, n] as z")
    for name, array in (("c", c), ("p", p)):
        checks.shape(op, name, array, (*array.shape[:1], *z.shape), "[*, *H, n]")
    left = jnp.concatenate([c, p.conj()])
    right = jnp.concatenate([b[None], p])
    g = cauchy(left[:, None] * right, z, length, backend=backend)
    return filter_of_sums(g, len(p), length)


def _check(op, length, **arrays):
    """The length as an int."""
    checks.arrays(op, **arrays)
    checks.complex(op, **arrays)
    return checks.positive(op, "length", length)
