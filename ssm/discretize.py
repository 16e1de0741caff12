"""From continuous to discrete time.

A diagonal mode x' = lam x + B u, sampled with step dt, becomes

    x[t] = a x[t-1] + gain B u[t],      a = exp(log_a).

Every rule for diagonal systems has one signature, `rule(lam, dt, elapsed=None)`, and
returns `(log_a, gain)`. The logarithm is returned, not a, because filters need powers
a^l and recurrences need a^elapsed, and both lose digits by way of log(exp(.)).

`elapsed` is the time since the previous token in units of the nominal step (None, as 1:
regular sampling); it broadcasts against lam and dt. elapsed = 0 gives a = 1.

Sources: ZOH, bilinear and GBT from S4 (https://arxiv.org/abs/2111.00396) and HiPPO
(https://arxiv.org/abs/2008.07669); dirac and async from Event-SSM
(https://arxiv.org/abs/2404.18508).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg


def expm1_ratio(z: jax.Array) -> jax.Array:
    """phi(z) = (e^z - 1) / z, accurate and differentiable at z = 0. Any shape."""
    small = jnp.abs(z) < 1e-2
    safe = jnp.where(small, 1.0, z)
    series = jnp.ones_like(z)
    for k in (7, 6, 5, 4, 3, 2):  # Horner: 1 + z/2 (1 + z/3 (1 + ...)), to z^6 / 7!
        series = 1.0 + z / k * series
    return jnp.where(small, series, jnp.expm1(safe) / safe)


def _steps(elapsed):
    """`elapsed`, or the one step of regular sampling."""
    return 1.0 if elapsed is None else elapsed


def zoh(
    lam: jax.Array, dt: jax.Array, elapsed: jax.Array | float | None = None
) -> tuple[jax.Array, jax.Array]:
    """Zero-order hold: a = e^{lam dt}, gain = (e^{lam dt} - 1) / lam, exact for an
    input that is constant over the step; dt is multiplied by `elapsed`."""
    step = dt * _steps(elapsed)
    z = lam * step
    return z, step * expm1_ratio(z)


def gbt(
    lam: jax.Array,
    dt: jax.Array,
    elapsed: jax.Array | float | None = None,
    *,
    alpha: float,
) -> tuple[jax.Array, jax.Array]:
    """Generalised bilinear transform: a = (1 + (1-alpha) z) / (1 - alpha z) and
    gain = dt / (1 - alpha z), z = lam dt. alpha 0 is Euler, 1/2 bilinear, 1 backward
    Euler; dt is multiplied by `elapsed`."""
    step = dt * _steps(elapsed)
    z = lam * step
    denominator = 1.0 - alpha * z
    log_a = jnp.log1p((1.0 - alpha) * z) - jnp.log1p(-alpha * z)
    return log_a, step / denominator


def bilinear(
    lam: jax.Array, dt: jax.Array, elapsed: jax.Array | float | None = None
) -> tuple[jax.Array, jax.Array]:
    """Bilinear (Tustin): a = (1 + z/2) / (1 - z/2), gain = dt / (1 - z/2)."""
    return gbt(lam, dt, elapsed, alpha=0.5)


def dirac(
    lam: jax.Array, dt: jax.Array, elapsed: jax.Array | float | None = None
) -> tuple[jax.Array, jax.Array]:
    """Events as impulses: a = e^{lam dt elapsed}, gain = 1."""
    z = lam * dt * _steps(elapsed)
    return z, jnp.ones_like(z)


def async_(
    lam: jax.Array, dt: jax.Array, elapsed: jax.Array | float | None = None
) -> tuple[jax.Array, jax.Array]:
    """Asynchronous events: the state decays over the true gap, the input is scaled by
    the learned step alone: a = e^{lam dt elapsed}, gain = (e^{lam dt} - 1) / lam."""
    z = lam * dt
    log_a = z * _steps(elapsed)
    return log_a, jnp.broadcast_to(dt * expm1_ratio(z), log_a.shape)


DISCRETIZATIONS = {"zoh": zoh, "bilinear": bilinear, "dirac": dirac, "async": async_}


def get(name: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The diagonal rule called `name`; a `ValueError` lists the valid names."""
    if name not in DISCRETIZATIONS:
        raise ValueError(
            f"discretization: must be one of {sorted(DISCRETIZATIONS)}, got {name!r}"
        )
    return DISCRETIZATIONS[name]


def dense_zoh(A: np.ndarray, B: np.ndarray, dt: float) -> tuple[np.ndarray, np.ndarray]:
    """ZOH of a dense system in NumPy float64: (e^{A dt}, int_0^dt e^{A s} ds B).

    One exponential of the augmented matrix [[A, B], [0, 0]] dt, so A may be singular.
    A [N, N], B [N] or [N, M]; returns A_bar [N, N] and B_bar shaped like B.
    """
    A, B = np.asarray(A), np.asarray(B)
    columns = B.reshape(len(A), -1)
    width = columns.shape[1]
    zeros = np.zeros((width, len(A) + width))
    block = np.concatenate([np.concatenate([A, columns], axis=1), zeros])
    e = scipy.linalg.expm(block * dt)
    return e[: len(A), : len(A)], e[: len(A), len(A) :].reshape(B.shape)


def dense_gbt(
    A: np.ndarray, B: np.ndarray, dt: float, alpha: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """GBT(alpha) of a dense system in NumPy float64.

    A_bar = (I - alpha dt A)^{-1} (I + (1 - alpha) dt A),
    B_bar = dt (I - alpha dt A)^{-1} B.

    A [N, N], B [N] or [N, M]; returns arrays of the same shapes.
    """
    A, B = np.asarray(A), np.asarray(B)
    identity = np.eye(len(A))
    left = identity - alpha * dt * A
    right = identity + (1.0 - alpha) * dt * A
    return np.linalg.solve(left, right), np.linalg.solve(left, dt * B)
