"""exp(z) and phi(z) = expm1(z) / z on pairs, accurate for every z, 0 included.

The exact hold of an input over dt steps is dt phi(dt log_a) / phi(log_a).
"""

from math import factorial

import jax
import jax.numpy as jnp

from kernels import pairs


@jax.custom_jvp
def exp_and_phi(z: pairs.Pair) -> tuple[pairs.Pair, pairs.Pair]:
    """Both from one expm1, one sine and one cosine: cos(y) - 1 = -2 sin(y/2)^2."""
    grown = jnp.expm1(z[0])
    if len(z) == 1:
        less_one = (grown,)
    else:
        sine, cosine = jnp.sin(0.5 * z[1]), jnp.cos(0.5 * z[1])
        turned = 2 * sine * sine
        less_one = (
            grown * (1 - turned) - turned,
            (grown + 1) * (2 * sine * cosine),
        )
    one = (jnp.ones_like(z[0]), jnp.zeros_like(z[0]))[: len(z)]
    return pairs.add(less_one, one), _divide(less_one, z, one)


@exp_and_phi.defjvp
def _exp_and_phi_jvp(primals, tangents):
    (z,), (dz,) = primals, tangents
    grown, phi = exp_and_phi(z)
    slope = _phi_derivative(z, grown, phi)
    return (grown, phi), (pairs.mul(grown, dz), pairs.mul(slope, dz))


def phi(z: pairs.Pair) -> pairs.Pair:
    return exp_and_phi(z)[1]


def _phi_derivative(z, grown, phi):
    """(exp(z) - phi(z)) / z, by its series sum_k (k+1) z^k / (k+2)! where |z| < 1."""
    terms = 17 if z[0].dtype == jnp.float64 else 9
    near = _size(z) < 1
    small = tuple(jnp.where(near, part, 0.0) for part in z)
    series = tuple(jnp.zeros_like(part) for part in z)
    for k in reversed(range(terms)):
        series = pairs.mul(series, small)
        series = (series[0] + (k + 1) / factorial(k + 2), *series[1:])
    direct = _divide(pairs.add(grown, pairs.scale(phi, -1.0)), z, series)
    return tuple(
        jnp.where(near, inside, outside)
        for inside, outside in zip(series, direct, strict=True)
    )


def _divide(top, bottom, at_zero):
    """top / bottom, `at_zero` where |bottom| is too small to be squared."""
    tiny = _size(bottom) < 1e-18
    safe = (jnp.where(tiny, 1.0, bottom[0]), *bottom[1:])
    ratio = pairs.mul(top, pairs.scale(pairs.conj(safe), 1 / sum(p * p for p in safe)))
    return tuple(
        jnp.where(tiny, limit, part) for limit, part in zip(at_zero, ratio, strict=True)
    )


def _size(z):
    return sum(jnp.abs(part) for part in z)
