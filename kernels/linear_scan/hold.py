"""phi(z) = expm1(z) / z and its derivative on pairs, accurate for every z, 0 included.

The exact hold of an input over dt steps is dt phi(dt log_a) / phi(log_a).
"""

from math import factorial

import jax
import jax.numpy as jnp

from kernels import pairs


@jax.custom_jvp
def phi(z: pairs.Pair) -> pairs.Pair:
    return _divide(_expm1(z), z, (jnp.ones_like(z[0]), 0.0))


@phi.defjvp
def _phi_jvp(primals, tangents):
    return phi(*primals), pairs.mul(phi_derivative(*primals), *tangents)


def phi_derivative(z: pairs.Pair) -> pairs.Pair:
    """(exp(z) - phi(z)) / z, by its series sum_k (k+1) z^k / (k+2)! where |z| < 1."""
    terms = 17 if z[0].dtype == jnp.float64 else 9
    near = _size(z) < 1
    small = tuple(jnp.where(near, part, 0.0) for part in z)
    series = tuple(jnp.zeros_like(part) for part in z)
    for k in reversed(range(terms)):
        series = pairs.mul(series, small)
        series = (series[0] + (k + 1) / factorial(k + 2), *series[1:])
    away = pairs.add(pairs.exp(z), pairs.scale(phi(z), -1.0))
    direct = _divide(away, z, series)
    return tuple(
        jnp.where(near, inside, outside)
        for inside, outside in zip(series, direct, strict=True)
    )


def _expm1(z):
    """exp(z) - 1 without cancellation: cos(y) - 1 = -2 sin(y/2)^2."""
    if len(z) == 1:
        return (jnp.expm1(z[0]),)
    grown, half = jnp.expm1(z[0]), jnp.sin(0.5 * z[1])
    return (
        grown * jnp.cos(z[1]) - 2 * half * half,
        (grown + 1) * jnp.sin(z[1]),
    )


def _divide(top, bottom, at_zero):
    """top / bottom, `at_zero` where |bottom| is too small to be squared."""
    tiny = _size(bottom) < 1e-18
    safe = (jnp.where(tiny, 1.0, bottom[0]), *bottom[1:])
    ratio = pairs.mul(top, pairs.scale(pairs.conj(safe), 1 / sum(p * p for p in safe)))
    return tuple(
        jnp.where(tiny, limit, part)
        for limit, part in zip(at_zero, ratio, strict=False)
    )


def _size(z):
    return sum(jnp.abs(part) for part in z)
