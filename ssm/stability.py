"""Unconstrained parameters of stable eigenvalues, and complex numbers as real pairs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FLOOR = 1e-4  # the smallest decay rate that an inverse transform represents
STEEPEST = 1000.0  # the largest derivative of `root`


class Positive(NamedTuple):
    """A map R -> (0, inf) and its inverse (NumPy, for initial values)."""

    forward: callable
    inverse: callable


POSITIVE = {
    "exp": Positive(jnp.exp, np.log),
    "softplus": Positive(jax.nn.softplus, lambda x: x + np.log(-np.expm1(-x))),
    "relu": Positive(lambda x: jax.nn.relu(x) + FLOOR, lambda x: x - FLOOR),
    "sigmoid": Positive(jax.nn.sigmoid, lambda x: np.log(x) - np.log1p(-x)),
    "none": Positive(lambda x: x, lambda x: x),
}


def positive(name: str) -> Positive:
    """The transform called `name`; a `ValueError` lists the valid names."""
    if name not in POSITIVE:
        raise ValueError(f"transform: must be one of {sorted(POSITIVE)}, got {name!r}")
    return POSITIVE[name]


def inverse(name: str, rate: np.ndarray) -> np.ndarray:
    """The parameter whose transform is `rate` (NumPy float64), with rates below FLOOR
    raised to it first. `sigmoid` reaches only rates below 1."""
    rate = np.maximum(np.asarray(rate, np.float64), FLOOR)
    if name == "sigmoid" and np.any(rate >= 1):
        raise ValueError(
            f"transform: must reach the rate {rate.max():.3g}, got 'sigmoid', which "
            "stays below 1"
        )
    return positive(name).inverse(rate)


def clip_real(lam: jax.Array, bound: float = -FLOOR) -> jax.Array:
    """lam with its real part at most `bound`: no mode may grow over a long rollout."""
    return jax.lax.complex(jnp.minimum(lam.real, bound), lam.imag)


def ring(nu_log: jax.Array, theta_log: jax.Array) -> jax.Array:
    """LRU: log lam = -exp(nu_log) + i exp(theta_log), so |lam| < 1. Shape kept.
    Source: https://arxiv.org/abs/2303.06349."""
    return jax.lax.complex(-jnp.exp(nu_log), jnp.exp(theta_log))


@jax.custom_jvp
def root(x: jax.Array) -> jax.Array:
    """sqrt(x), x >= 0, with a derivative that stays finite at 0: at most STEEPEST."""
    return jnp.sqrt(x)


@root.defjvp
def _root_jvp(primals, tangents):
    square_root = jnp.sqrt(primals[0])
    return square_root, tangents[0] / jnp.maximum(2 * square_root, 1 / STEEPEST)


def to_pair(z: jax.Array) -> jax.Array:
    """[...] complex -> [..., 2] real: how complex parameters are stored, so that
    optimisers see R^2 (JAX's complex gradient is the conjugate one)."""
    return jnp.stack([jnp.real(z), jnp.imag(z)], axis=-1)


def from_pair(pair: jax.Array) -> jax.Array:
    """[..., 2] real -> [...] complex."""
    return jax.lax.complex(pair[..., 0], pair[..., 1])
